"""H2O (arXiv 2306.14048): heavy hitters and recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from buzz.policy import BudgetBy, Policy, ScoreRule, State, highest, register


@register()
@dataclass(frozen=True, kw_only=True)
class H2OPolicy(Policy):
    """Keeps the `heavy` entries of the highest attention sums and the last `recent`.

    No sink is protected: attention sums keep the first tokens by themselves.

    Args:
        heavy: heavy hitters kept.
        recent: last entries kept.
        scoring: ``sum`` of attention, as in the original, or its ``mean`` over the queries that
            could see the entry.
    """

    needs_scores: ClassVar[bool] = True

    heavy: int = 280
    recent: int = 280
    scoring: str = "sum"

    def __post_init__(self) -> None:
        self._at_least(0, "heavy")
        self._at_least(1, "recent")
        self._one_of("scoring", "sum", "mean")

    @property
    def num_recent(self) -> int:
        return self.recent

    @property
    def score_rule(self) -> ScoreRule:
        return "mean" if self.scoring == "mean" else "sum"

    @property
    def num_pinned(self) -> int:
        return self.heavy

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        return min(cache_length, self.heavy + self.recent), 0

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return highest(scores[..., : cache_length - self.recent], self.heavy)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        if {"heavy", "recent"} <= fixed:
            return self
        if "recent" in fixed:
            return self._replace(budget, minimum=0, heavy=budget - self.recent)
        heavy = self.heavy if "heavy" in fixed else budget // 2
        return self._replace(budget, heavy=heavy, recent=budget - heavy)
