"""KeyDiff (arXiv 2504.15364): keeps keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baselines.ranking import RankingPolicy
from buzz.entries import Entries, key_difference
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class KeyDiffPolicy(RankingPolicy):
    """Keeps the entries whose keys are the least similar to the mean direction of all.

    No window is protected. As NVIDIA/kvpress (8bb29b9c) `keydiff_press`, with its `decoding_press`
    for `every`; the authors published no code. Keys are compared after RoPE. At cache positions,
    unlike there, these are their positions in the cache.

    Args:
        size: entries kept by an eviction.
        every: tokens between two evictions.
    """

    def score(self, entries: Entries) -> Tensor:
        return key_difference(entries)
