"""DefensiveKV (arXiv 2510.13334): keeps what any of the last queries attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from baselines.snapkv import SnapKVPolicy
from buzz.entries import Entries, projected_norms
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class DefensiveKVPolicy(SnapKVPolicy):
    """SnapKV by the maximum attention over queries and heads, weighted by the projected value.

    As FFY0/DefensiveKV (9251b95e) `efficient_defensivekv_press.py`, whose heads share a layer's
    capacity: here each KV head has its own. With the original's error: the share of attention on
    "the window" is that of the last `window` entries before it.

    Args:
        mass: share of the attention whose entries are kept first.
    """

    needs_scores: ClassVar[bool] = False
    needs_projection: ClassVar[bool] = True

    kernel: int = 5
    pooling: str = "avg"
    mass: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within(0, 1, "mass")

    @property
    def queries(self) -> int:
        return self.window

    def score(self, entries: Entries) -> Tensor:
        history = entries.cache_length - self.window
        keys, queries = entries.keys, entries.queries.unflatten(1, (entries.keys.shape[1], -1))
        future = torch.ones(self.window, self.window, dtype=torch.bool, device=keys.device).triu(1)
        means, highest, bias = [], [], []
        for head in range(keys.shape[1]):  # one at a time: [rows, group, window, n]
            logits = queries[:, head] @ keys[:, head, None].float().mT
            logits[..., history:].masked_fill_(future, -torch.inf)
            attention = logits.softmax(-1)[..., :history]
            pooled = self._pool(attention.flatten(0, 1)).view_as(attention)
            pooled = pooled / pooled.sum(-1, keepdim=True) * attention.sum(-1, keepdim=True)
            means.append(attention.mean((1, 2)))
            highest.append(pooled.amax((1, 2)))
            bias.append(attention[..., -self.window :].sum(-1).mean((1, 2)))
        mean, risk = torch.stack(means, 1), torch.stack(highest, 1)
        risk = risk.maximum(risk.mean(-1, keepdim=True))
        norms = projected_norms(entries)[..., :history]
        scores = risk * norms / norms.sum(1, keepdim=True)
        # Entries of the highest attention whose sum is below the mass.
        order = (mean / mean.sum(-1, keepdim=True)).sort(-1, descending=True)
        wanted = self.mass - torch.stack(bias, 1).mean(1)[:, None, None]
        count = (order.values.cumsum(-1) < wanted).sum(-1, keepdim=True)
        # As the original, from a kept share of the prompt that gives the capacity, rounded down.
        most = int(history * (self.capacity + 0.5) / entries.cache_length - self.window)
        sure = torch.arange(history, device=keys.device).expand_as(risk) < count.clamp(
            max=max(0, most)
        )
        scores = scores.masked_fill(
            torch.zeros_like(sure).scatter(-1, order.indices, sure), torch.inf
        )
        return pad(scores, (0, self.window), value=torch.inf)
