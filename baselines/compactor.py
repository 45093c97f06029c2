"""Compactor (arXiv 2507.08143): keeps keys of high leverage, and those that their chunk attends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from baselines.ranking import PromptPolicy
from buzz.entries import Entries
from buzz.policy import FOREVER, BudgetBy, Policy, register

RIDGE = 1e-2  # added to the sketched keys' products, as in the original


@register()
@dataclass(frozen=True, kw_only=True)
class CompactorPolicy(PromptPolicy):
    """Ranks by non-causal attention within chunks, and by the leverage of the keys.

    Leverage is computed from the keys before RoPE, by a random sketch, and weighted by the share of
    the prompt that is evicted. As NVIDIA/kvpress (8bb29b9c) `compactor_press`, by the paper's
    author, with its errors: logits are not scaled, and the last chunk is padded with zeros that
    attend and are attended.

    Args:
        capacity: prompt entries kept, both ends included.
        sink: first entries, which stay; a budget makes them a third of it at most.
        window: last entries, which stay; a budget makes them a sixth of it at most.
        chunk: tokens that attend each other.
        sketch: dimensions that keys are sketched in.
        seed: of the sketch.
    """

    needs_rotation: ClassVar[bool] = True

    sink: int = 8
    window: int = 4
    chunk: int = 256
    sketch: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "chunk", "sketch")
        self._at_least(1 + self.sink + self.window, "capacity")

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def queries(self) -> int:
        return FOREVER

    def score(self, entries: Entries) -> Tensor:
        middle = slice(self.sink, entries.cache_length - self.window)
        attention = self._attention(entries, middle)
        received = attention * entries.values[:, :, middle].float().norm(dim=-1)
        pooled = avg_pool1d(received, 3, 1, 1)
        apart = leverage(entries.unrotated[:, :, middle], self._sketch(entries))
        # As the original, from a kept share of the prompt that gives the capacity, rounded down.
        dropped = max(0.0, 1 - (self.capacity + 0.5) / entries.cache_length)
        scores = dropped * standardized(apart) + standardized(pooled)
        return pad(scores, (self.sink, self.window), value=torch.inf)

    def _attention(self, entries: Entries, middle: slice) -> Tensor:
        """Attention to each entry from its chunk: the sum over queries, the mean over heads."""
        keys = entries.keys[:, :, middle].float()
        # The queries have the scale of the logits, which the original leaves out.
        queries = entries.queries[:, :, middle] * math.sqrt(keys.shape[-1])
        queries = queries.unflatten(1, (keys.shape[1], -1))
        received = []
        for own, others in zip(
            queries.split(self.chunk, dim=3), keys.split(self.chunk, dim=2), strict=True
        ):
            filled = (0, 0, 0, self.chunk - others.shape[2])
            logits = pad(own, filled) @ pad(others, filled)[:, :, None].mT
            received.append(logits.softmax(-1).sum(-2).mean(2)[..., : others.shape[2]])
        return torch.cat(received, dim=-1)

    def _sketch(self, entries: Entries) -> Tensor:
        """The layer's random sketch: [kv_heads, head_dim, sketch]."""
        own = torch.Generator().manual_seed(self.seed + entries.layer)
        shape = entries.keys.shape[1], entries.keys.shape[3], self.sketch
        drawn = torch.randn(shape, generator=own, device="cpu") / math.sqrt(self.sketch)
        return drawn.to(entries.keys.device, non_blocking=True)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """The budget is the cache length after the prompt; the answer's tokens add to it."""
        if "capacity" in fixed:
            return self
        most = {"sink": budget // 3, "window": budget // 6}
        ends = {
            name: getattr(self, name) if name in fixed else min(getattr(self, name), most[name])
            for name in most
        }
        self._require(budget, 1 + sum(ends.values()), capacity=budget)
        return self._replace(budget, minimum=0, **ends, capacity=budget)


def leverage(keys: Tensor, sketch: Tensor) -> Tensor:
    """Leverage score of each key among all: [rows, kv_heads, n].

    The diagonal of X (X^T X + r I)^-1 X^T, with X the centred keys [rows, kv_heads, n, head_dim]
    times the sketch and r = :data:`RIDGE`; in float64.
    """
    x = ((keys - keys.mean(2, keepdim=True)) @ sketch).double()
    products = x.mT @ x
    products.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    factor = torch.linalg.cholesky_ex(products).L
    whitened = torch.linalg.solve_triangular(factor, x.mT, upper=False)
    return whitened.square().sum(-2).float()


def standardized(scores: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over each row's heads and entries."""
    deviation = scores.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return (scores - scores.mean(dim=(1, 2), keepdim=True)) / deviation
