"""Bases of methods that keep the entries of the highest scores."""

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
        self._at_least(1 + self.num_recent, "capacity")

    @property
    def num_recent(self) -> int:
        return 0

    @property
    def num_pinned(self) -> int:
        return 0  # entries are moved only once

    def left(self, prompt: int) -> int:
        """Entries left of a prompt."""
        return min(prompt, self.capacity)

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        """The state is 0 until the prompt's eviction."""
        return (cache_length, state) if state else (self.left(cache_length), 1)

    def score(self, entries: Entries) -> Tensor:
        """Attention sums; methods override it."""
        return entries.attention_sums

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        recent = self.num_recent
        return highest(scores[..., : cache_length - recent], self.left(cache_length) - recent)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """The budget is the cache length after the prompt; the answer's tokens add to it."""
        return self if "capacity" in fixed else self._replace(budget, capacity=budget)


@dataclass(frozen=True, kw_only=True)
class RankingPolicy(Policy):
    """Evicts to `size` entries after the prompt, and then once in `every` tokens.

    Args:
        size: entries kept by an eviction.
        every: tokens between two evictions; the maximum cache length is `size + every - 1`.
    """

    size: int = 512
    every: int = 1

    def __post_init__(self) -> None:
        self._at_least(0, *self._whole())
        self._at_least(1, "every")
        self._at_least(1 + self.num_recent, "size")

    @property
    def num_recent(self) -> int:
        return 0

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        """The state is 0 until the prompt's eviction."""
        if cache_length >= self.size + (self.every if state else 1):
            return self.size, self.size
        return cache_length, state or cache_length

    def score(self, entries: Entries) -> Tensor:
        """Attention sums; methods override it."""
        return entries.attention_sums

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return highest(scores[..., : cache_length - self.num_recent], self.size - self.num_recent)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """``peak``: size + every - 1 = budget; ``mean``: half of `every` - 1 counts.

        `every` and `window` take at most half of the budget, unless they are fixed.
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
