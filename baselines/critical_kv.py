"""CriticalKV (arXiv 2502.03805): attention, weighted by the norm of the projected value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.snapkv import SnapKVPolicy
from buzz.entries import Entries, projected_norms
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class CriticalKVPolicy(SnapKVPolicy):
    """SnapKV in two stages: a share of the capacity by attention alone, the rest weighted.

    The weight is the L1 norm of the value after the query heads' part of the output projection. As
    NVIDIA/kvpress (8bb29b9c) `criticalkv_press` on `snapkv_press`, by the paper's authors. The
    window is part of the first stage; here it stays even if it is larger than that share.

    Args:
        first: share of the capacity that is chosen by attention alone.
        epsilon: added to the attention before it is weighted.
    """

    needs_projection: ClassVar[bool] = True

    kernel: int = 5
    pooling: str = "avg"
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within(0, 1, "first", "epsilon")

    def score(self, entries: Entries) -> Tensor:
        pooled = super().score(entries)
        heads = entries.output_projection.shape[0]
        attention = pooled / (self.window * heads // pooled.shape[1])  # of a query and a head
        sure = max(0, int(self.capacity * self.first) - self.window)
        best = attention[..., : entries.cache_length - self.window].topk(sure, dim=-1).indices
        weighed = (attention + self.epsilon) * projected_norms(entries)
        return weighed.scatter(-1, best, torch.inf)
