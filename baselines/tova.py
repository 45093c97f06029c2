"""TOVA (arXiv 2401.06104): keeps what the newest token attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from buzz.policy import BudgetBy, Policy, ScoreRule, State, highest, register


@register()
@dataclass(frozen=True, kw_only=True)
class TOVAPolicy(Policy):
    """Keeps the `size` entries that the last query attends most; no window is protected.

    As in the original, attention is averaged over all heads of the layer, so that its KV heads keep
    the same tokens, and even the newest token may be evicted.

    Args:
        size: entries kept.
    """

    needs_scores: ClassVar[bool] = True
    score_rule: ClassVar[ScoreRule] = "step"
    observe: ClassVar[int] = 1
    num_recent: ClassVar[int] = 0

    size: int = 512

    def __post_init__(self) -> None:
        self._at_least(1, "size")

    @property
    def num_pinned(self) -> int:
        return self.size

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        return min(cache_length, self.size), 0

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return highest(scores.mean(1, keepdim=True), self.size)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        return self if "size" in fixed else self._replace(budget, size=budget)
