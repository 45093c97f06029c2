"""What an eviction method is.

A method is one frozen dataclass, registered by name. It never sees keys or values: it gets lengths
and scores and answers with indices. How *many* entries stay depends on lengths alone
(:meth:`Policy.survivors`), *which* ones on the scores (:meth:`Policy.select`), so that buffers stay
rectangular and memory is known before a single token is computed (:meth:`Policy.lengths`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from torch import Tensor

from buzz.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

ScoreRule = Literal["sum", "mean", "step"]

POLICIES: dict[str, type[Policy]] = {}
PolicyClass = TypeVar("PolicyClass", bound="type[Policy]")


def register(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """Class decorator: make a policy known to the runner under `name`."""

    def add(cls: PolicyClass) -> PolicyClass:
        cls.name = name
        POLICIES[name] = cls
        return cls

    return add


def check_budget(budget: object) -> None:
    """Raises ConfigError unless `budget` is None, entries (a whole number) or a fraction."""
    whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    if budget is None or whole or (isinstance(budget, float) and 0 < budget < 1):
        return
    remedy = "give a fraction of the prompt between 0 and 1, or entries >= 1"
    raise ConfigError("budget", budget, remedy)


def budget_entries(budget: float | int, prompt_tokens: int) -> int:
    """The entries that a budget allows beside a prompt of this length."""
    return budget if isinstance(budget, int) else max(1, round(budget * prompt_tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """An eviction method: a frozen dataclass whose fields are the method's parameters.

    Attributes:
        name: the registered name.
        needs_scores: whether :meth:`select` reads scores. If not, none are ever computed.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False

    @property
    @abstractmethod
    def protected(self) -> int:
        """How many of the last entries always stay. They never move, so they cost nothing."""

    @property
    def score_rule(self) -> ScoreRule:
        """What a score is.

        ``sum``: the attention received since arrival; ``mean``: that, divided by the number of
        queries that could see the entry; ``step``: what was received in the current step alone
        (computed only in steps that evict).
        """
        return "sum"

    @property
    def observe(self) -> int | None:
        """How many of a step's last queries count in the scores; None: all."""
        return None

    @property
    def resident(self) -> int:
        """How many leading entries can stay, and move, for ever.

        The cache keeps their keys as they came, so that rounding never builds up; the others leave
        after a few moves.
        """
        return 0

    @abstractmethod
    def survivors(self, held: int, sampled: int) -> tuple[int, int]:
        """The length recurrence: what one eviction leaves, from lengths alone.

        Args:
            held: entries in the cache after a step's tokens were appended.
            sampled: how many of them are history that an earlier eviction sampled.

        Returns:
            Entries that stay (== `held` when nothing is evicted) and the new `sampled`.
        """

    @abstractmethod
    def select(self, held: int, sampled: int, scores: Tensor | None) -> Tensor:
        """Which of the entries before the last :attr:`protected` stay.

        Called only when :meth:`survivors` evicts.

        Args:
            held, sampled: as for :meth:`survivors`.
            scores: float32 [rows, kv_heads, held]; None unless :attr:`needs_scores`.

        Returns:
            Indices into the `held` entries, int64, ascending, of a shape that broadcasts to
            [rows, kv_heads, kept - protected].
        """

    def fit(
        self,
        budget: int,
        fixed: frozenset[str] = frozenset(),
        horizon: tuple[int, int] | None = None,
    ) -> Policy:
        """A copy that holds `budget` entries: exactly, or, where the size moves, on average.

        Args:
            budget: entries per layer and KV head.
            fixed: parameters that keep their value, because the user set them.
            horizon: prompt tokens and new tokens to average over, where the size moves; None for
                the steady state of an endless text.

        Raises:
            ConfigError: the budget cannot be met.
        """
        return self

    def lengths(self, steps: Iterable[int]) -> list[int]:
        """Entries held after each of `steps` forward passes (their numbers of new tokens)."""
        held = sampled = 0
        lengths = []
        for new in steps:
            held, sampled = self.survivors(held + new, sampled)
            lengths.append(held)
        return lengths

    def _at_least(self, minimum: int, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(
                    f"method.{field}", value, f"give a whole number of at least {minimum}"
                )

    def _one_of(self, field: str, *choices: str) -> None:
        if getattr(self, field) not in choices:
            raise ConfigError(
                f"method.{field}", getattr(self, field), f"choose one of {', '.join(choices)}"
            )

    def _replace(self, budget: int, minimum: int = 1, **parameters: int) -> Self:
        """A copy with `parameters` set, refused when the budget leaves one below `minimum`."""
        for field, value in parameters.items():
            if value < minimum:
                raise ConfigError(
                    "budget",
                    budget,
                    f"leaves {value} entries for method.{field}; give {minimum - value} more"
                    f" or lower the other parameters of {self.name}",
                )
        return dataclasses.replace(self, **parameters)
