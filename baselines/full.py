"""Full cache: keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from buzz.policy import Evicts, Policy, State, register


@register()
@dataclass(frozen=True, kw_only=True)
class FullPolicy(Policy):
    """Evicts nothing, and ignores budgets. Buffers are written in place."""

    evicts: ClassVar[Evicts] = "never"

    @property
    def num_recent(self) -> int:
        return 0

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        return cache_length, state

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        raise AssertionError("the full cache never evicts")
