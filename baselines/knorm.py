"""Knorm (arXiv 2406.11430): keeps keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baselines.ranking import RankingPolicy
from buzz.entries import Entries
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class KnormPolicy(RankingPolicy):
    """Keeps the entries whose keys have the smallest L2 norm; nothing is protected.

    As NVIDIA/kvpress (8bb29b9c) `knorm_press`, with its `decoding_press` for `every`. The authors'
    code leaves out the first two layers; here all evict.

    Args:
        size: entries kept by an eviction.
        every: tokens between two evictions.
    """

    def score(self, entries: Entries) -> Tensor:
        """Minus the norm; of equal norms, which equal tokens have in the first layer, the newest.

        Norms are rounded to 2^-14, so that rounding errors do not decide between equal ones.
        """
        norms = entries.keys.float().norm(dim=-1).double()
        return entries.positions / 2**31 - (norms * 2**14).round()
