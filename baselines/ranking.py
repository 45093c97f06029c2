"""What methods share that keep the best entries: of the prompt alone, or once in so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from buzz.entries import Entries
from buzz.policy import BudgetBy, Evicts, Policy, State, highest


@dataclass(frozen=True, kw_only=True)
class PromptPolicy(Policy):
    """Evicts once, after the first step; every later token stays.

    A prompt in chunks needs `EvictionCache(hold_until=...)`.

    Args:
        capacity: entries left of the prompt.
    """

    evicts: ClassVar[Evicts] = "prompt"

    capacity: int = 1024

    def __post_init__(self) -> None:
        self._at_least(0, *self._whole())
        self._at_least(1 + self.protected, "capacity")

    @property
    def protected(self) -> int:
        return 0

    @property
    def resident(self) -> int:
        return 0  # what stays moves once

    def left(self, prompt: int) -> int:
        """Entries left of a prompt."""
        return min(prompt, self.capacity)

    def survivors(self, held: int, state: State) -> tuple[int, State]:
        """The state is 0 until the prompt is judged."""
        return (held, state) if state else (self.left(held), 1)

    def score(self, entries: Entries) -> Tensor:
        """Without a score of its own, a method ranks by the attention received."""
        return entries.received

    def select(self, held: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return highest(scores[..., : held - self.protected], self.left(held) - self.protected)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """The budget is what the prompt's end leaves; every token of the answer comes on top."""
        return self if "capacity" in fixed else self._replace(budget, capacity=budget)


@dataclass(frozen=True, kw_only=True)
class RankingPolicy(Policy):
    """Keeps the `size` entries of the highest score: of the prompt, then once in `every` tokens.

    Args:
        size: entries kept by an eviction.
        every: tokens that come between two evictions; the cache then holds up to
            `size + every - 1`.
    """

    size: int = 512
    every: int = 1

    def __post_init__(self) -> None:
        self._at_least(0, *self._whole())
        self._at_least(1, "every")
        self._at_least(1 + self.protected, "size")

    @property
    def protected(self) -> int:
        return 0

    def survivors(self, held: int, state: State) -> tuple[int, State]:
        """The state is 0 until the prompt is judged."""
        if held >= self.size + (self.every if state else 1):
            return self.size, self.size
        return held, state or held

    def score(self, entries: Entries) -> Tensor:
        """Without a score of its own, a method ranks by the attention received."""
        return entries.received

    def select(self, held: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return highest(scores[..., : held - self.protected], self.size - self.protected)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """By peak, what comes between two evictions is within the budget; by mean, half of it is.

        `every` and `window` take half of the budget at most, unless they are fixed.
        """
        if "size" in fixed:
            return self
        half = max(1, budget // 2)
        every = self.every if "every" in fixed else min(self.every, half)
        size = budget - (every - 1) // (1 if by == "peak" else 2)
        own = {"every": every}
        if (window := getattr(self, "window", None)) is not None:
            own["window"] = window if "window" in fixed else min(window, max(1, size // 2))
        self._require(budget, 1 + own.get("window", 0), size=size)
        return self._replace(budget, **own, size=size)
