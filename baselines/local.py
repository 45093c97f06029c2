"""Local window: the last entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buzz.policy import BudgetBy, Policy, State, register


@register()
@dataclass(frozen=True, kw_only=True)
class LocalPolicy(Policy):
    """Keeps the last `window` entries.

    Args:
        window: last entries kept.
    """

    window: int = 164

    def __post_init__(self) -> None:
        self._at_least(1, "window")

    @property
    def num_recent(self) -> int:
        return self.window

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        return min(cache_length, self.window), 0

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        return torch.empty(1, 1, 0, dtype=torch.int64)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        return self if "window" in fixed else self._replace(budget, window=budget)
