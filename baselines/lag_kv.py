"""LagKV (arXiv 2504.04704): keeps entries that stand out from the next part of the text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.ranking import RankingPolicy
from buzz.entries import Entries
from buzz.policy import BudgetBy, Policy, register


@register()
@dataclass(frozen=True, kw_only=True)
class LagKVPolicy(RankingPolicy):
    """Keeps, of each part of `lag` entries, those that stand out most from the next part's range.

    The first `sink` entries and the last one to two parts are not scored, and stay. As
    NVIDIA/kvpress (8bb29b9c) `lagkv_press`, but in order of time: there, an eviction leaves entries
    in order of falling scores, which the next one divides into parts. The cache of the paper's
    authors keeps a share of every part for ever: it grows with the text and has no budget.

    Args:
        size: entries kept by an eviction, including sink and last parts.
        sink: first entries, which always stay.
        lag: entries of a part; a budget makes them a quarter of it at most.
        every: tokens between two evictions.
    """

    needs_rotation: ClassVar[bool] = True

    every: int = 128
    sink: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        self._at_least(2, "lag")
        super().__post_init__()
        self._at_least(self.sink + self.lag, "size")

    @property
    def num_recent(self) -> int:
        return self.lag

    def score(self, entries: Entries) -> Tensor:
        """Whole numbers; entries that are not scored come first, the newest before the others."""
        length, sink, lag = entries.cache_length, self.sink, self.lag
        keys, values = entries.keys_from_zero, entries.values
        first = torch.arange(length, 2 * length, device=keys.device, dtype=torch.float32)
        scores = first.expand(keys.shape[:3]).clone()
        scores[..., :sink] = torch.inf
        parts = (length - sink) // lag
        if parts > 1:
            within = slice(sink, sink + parts * lag)
            each = [standing_out(states[:, :, within], lag) for states in (keys, values)]
            unlike = each[0] + each[1]
            ranks = unlike.argsort(stable=True).argsort()
            # Every part has each rank once: of equal ranks, the earliest part's comes first.
            order = ranks * parts - torch.arange(parts - 1, device=keys.device)[:, None]
            scores[..., sink : sink + (parts - 1) * lag] = order.flatten(2).float()
        return scores

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        if "size" in fixed:
            return self
        quarter = budget // 4
        most = {"sink": quarter, "lag": max(2, quarter), "every": max(1, quarter)}
        own = {name: min(getattr(self, name), most[name]) for name in most.keys() - fixed}
        every = own.get("every", self.every)
        size = budget - (every - 1) // (1 if by == "peak" else 2)
        ends = own.get("sink", self.sink) + own.get("lag", self.lag)
        self._require(budget, max(1, ends), size=size)
        return dataclasses.replace(self, **own, size=size)


def standing_out(states: Tensor, lag: int) -> Tensor:
    """Softmax over a part of how much an entry's numbers vary, relative to the next part's ranges.

    Args:
        states: [rows, kv_heads, parts * lag, head_dim].

    Returns:
        float32 [rows, kv_heads, parts - 1, lag].
    """
    parts = states.float().unflatten(2, (-1, lag))
    low, high = parts[:, :, 1:].aminmax(dim=3, keepdim=True)
    placed = (parts[:, :, :-1] - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    return placed.std(dim=-1).softmax(-1)
