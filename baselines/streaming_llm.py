"""StreamingLLM (arXiv 2309.17453): attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buzz.policy import BudgetBy, Policy, State, register


@register()
@dataclass(frozen=True, kw_only=True)
class StreamingLLMPolicy(Policy):
    """Keeps the first `sink` and the last `window` entries.

    Args:
        sink: first entries kept.
        window: last entries kept.
    """

    sink: int = 4
    window: int = 160

    def __post_init__(self) -> None:
        self._at_least(0, "sink")
        self._at_least(1, "window")

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def num_pinned(self) -> int:
        return self.sink

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        return min(cache_length, self.sink + self.window), 0

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        return torch.arange(self.sink).expand(1, 1, -1)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        return self if "window" in fixed else self._replace(budget, window=budget - self.sink)
