"""R-KV (arXiv 2505.24133): attention, minus the redundancy of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.snapkv_every import SnapKVEveryPolicy
from buzz.entries import Entries
from buzz.policy import register

BLOCK = 128  # keys that are compared with as many others at one time


@register()
@dataclass(frozen=True, kw_only=True)
class RKVPolicy(SnapKVEveryPolicy):
    """Ranks by `trade` x attention - (1 - `trade`) x similarity to other keys.

    As Zefan-Cai/R-KV (d15c9767) `rkv/compression/r1_kv.py`, but in order of time (see
    `snapkv_every`). Its code and runner have `trade` 0.07, its paper and README 0.1.

    Args:
        trade: weight of the attention.
        similar: cosine above which keys are similar; the newest of them is not redundant.
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
    """Softmax of each key's mean cosine to the others: [rows, kv_heads, n].

    As in the original, each key leaves the newest similar one out of the mean, or the first one if
    none is similar. It is searched for from the newest key back, in blocks of :data:`BLOCK` keys.
    In most heads keys are similar, and the first blocks are enough.
    """
    keys = keys.float()
    directions = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    held = keys.shape[2]
    places = torch.arange(held, device=keys.device)
    newest = places.new_zeros(keys.shape[:3])
    searching = places  # keys that have not found theirs in each head
    for end in range(held, 0, -BLOCK):
        others = slice(max(0, end - BLOCK), end)
        cosines = directions[:, :, searching] @ directions[:, :, others].mT
        alike = (cosines > similar) & (searching[:, None] != places[others])
        found = torch.where(alike, places[others], 0).amax(-1)
        newest[:, :, searching] = found = newest[:, :, searching].maximum(found)
        if keys.device.type == "cpu":  # on a GPU to ask would be to wait
            searching = searching[(found == 0).any(1).any(0)]
            if not len(searching):
                break
    uncounted = (directions * directions.gather(2, newest[..., None].expand_as(keys))).sum(-1)
    uncounted = uncounted.where(newest != places, 0)
    itself = directions.square().sum(-1)
    total = (directions * directions.sum(2, keepdim=True)).sum(-1) - itself
    return (total.scatter_add_(-1, newest, -uncounted) / held).softmax(-1)
