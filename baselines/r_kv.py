"""R-KV (arXiv 2505.24133): attended entries stay that no newer one repeats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.snapkv_every import SnapKVEveryPolicy
from buzz.entries import Entries
from buzz.policy import register

BLOCK = 256  # rows of the similarity matrix that exist at one time


@register()
@dataclass(frozen=True, kw_only=True)
class RKVPolicy(SnapKVEveryPolicy):
    """Ranks by `trade` parts of attention, less 1 - `trade` parts of how much keys are alike.

    As Zefan-Cai/R-KV (d15c9767) `rkv/compression/r1_kv.py`, but in order of time (see
    `snapkv_every`). Its code and runner have `trade` 0.07, its paper and README 0.1.

    Args:
        trade: share of attention in the score.
        similar: cosine above which keys are alike; the newest of those is no repetition.
    """

    trade: float = 0.1
    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within(0, 1, "trade", "similar")

    def score(self, entries: Entries) -> Tensor:
        attention = super().score(entries)
        return self.trade * attention - (1 - self.trade) * redundancy(entries.keys, self.similar)


def redundancy(keys: Tensor, similar: float) -> Tensor:
    """How much each key is like all others, as a share that sums to 1: [rows, kv_heads, held].

    For each key, the newest one that is alike does not count, or the first if none is, as in the
    original. Blocks of rows: memory is O(BLOCK * held).
    """
    keys = keys.float()
    directions = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    held = keys.shape[2]
    places = torch.arange(held, device=keys.device)
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for low in range(0, held, BLOCK):
        cosines = directions[:, :, low : low + BLOCK] @ directions.mT
        own = places[low : low + BLOCK, None] == places
        cosines.masked_fill_(own, 0)
        newest = torch.where(cosines > similar, places, 0).amax(-1, keepdim=True)
        total += cosines.scatter_(-1, newest, 0).sum(2)
    return (total / held).softmax(-1)
