"""VATP (arXiv 2406.12335): attention sums, weighted by the norm of the value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.h2o import H2OPolicy
from buzz.entries import Entries
from buzz.policy import BudgetBy, Policy, register


@register()
@dataclass(frozen=True, kw_only=True)
class VATPPolicy(H2OPolicy):
    """H2O by attention sums times the L1 norm of the value; the first entries always stay.

    As guozhiyu/vatp (39ea686c) `utils_hh/modify_llama.py`, which masks entries instead of evicting
    them. It does not support grouped heads: here the attention of a group is summed.

    Args:
        heavy: entries kept by their score, including the first `sink`.
        recent: last entries kept.
        scoring: ``sum`` of attention, as in the original, or its ``mean``.
        sink: first entries kept; a budget lowers it to `heavy` where it must.
    """

    sink: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "sink")
        self._at_least(self.sink, "heavy")

    def score(self, entries: Entries) -> Tensor:
        scores = entries.attention_sums * entries.values.float().abs().sum(-1)
        scores[..., : self.sink] = torch.inf
        return scores

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        if "sink" in fixed:
            return super().fit(budget, fixed, by)
        fitted = dataclasses.replace(self, sink=0)
        sizes = H2OPolicy.fit(fitted, budget, fixed, by)
        assert isinstance(sizes, VATPPolicy)
        return dataclasses.replace(sizes, sink=min(self.sink, sizes.heavy))
