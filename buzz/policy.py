"""What an eviction method is.

A method is one frozen dataclass, registered by name: it gets lengths and scores and answers with
indices. How *many* entries stay depends on lengths alone (:meth:`Policy.survivors`), *which* ones
on the scores (:meth:`Policy.select`), so that buffers stay rectangular and memory is known before a
single token is computed (:meth:`Policy.lengths`). A score is the attention received, unless the
method makes another one of what a layer holds (:meth:`Policy.score`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from buzz.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from buzz.entries import Entries

ScoreRule = Literal["sum", "mean", "step"]
BudgetBy = Literal["peak", "mean"]
Evicts = Literal["always", "prompt", "never"]
State = Any  # what a method remembers of its lengths: hashable, 0 before the first step
FOREVER = 2**20  # steps after which a cache that still grows is taken to be unbounded

POLICIES: dict[str, type[Policy]] = {}
PolicyClass = TypeVar("PolicyClass", bound="type[Policy]")


def register(name: str = "") -> Callable[[PolicyClass], PolicyClass]:
    """Class decorator: make a policy known to the runner under `name`, or its module's name."""

    def add(cls: PolicyClass) -> PolicyClass:
        cls.name = name or cls.__module__.rpartition(".")[2]
        POLICIES[cls.name] = cls
        return cls

    return add


class Footprint(NamedTuple):
    """Entries that a method holds, per layer and KV head.

    Attributes:
        after_prompt: once the prompt's eviction is over.
        peak: the most that any later step leaves, over an answer without end; infinite where the
            cache grows for ever.
        mean: of the cycle that the length settles in.
    """

    after_prompt: int
    peak: float
    mean: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """An eviction method: a frozen dataclass whose fields are the method's parameters.

    Attributes:
        name: the registered name.
        needs_scores: whether the attention received is read. If not, none is ever computed.
        needs_projection: whether :meth:`score` reads the layers' output projections.
        needs_repetition: whether the scores are those of a second pass over the prompt, see
            :meth:`repetitions`; `received` is then the highest attention given in it.
        evicts: ``always``, so that memory stays bounded; the ``prompt`` alone, so that an answer
            grows on top of what is left of it; or ``never``.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False
    needs_projection: ClassVar[bool] = False
    needs_repetition: ClassVar[bool] = False
    evicts: ClassVar[Evicts] = "always"

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
    def decay(self) -> float:
        """What of a query's attention still counts one token later, for the rule ``sum``."""
        return 1.0

    @property
    def queries(self) -> int:
        """How many of the last queries a layer keeps for :meth:`score`."""
        return 0

    @property
    def moments_from(self) -> int | None:
        """The first token whose query counts in the mean and covariance that a layer keeps.

        None: it keeps none.
        """
        return None

    @property
    def page(self) -> int:
        """How many entries leave together; 1, unless :class:`buzz.Constrained` says otherwise."""
        return 1

    @property
    def needs_rotation(self) -> bool:
        """Whether :meth:`score` turns vectors as the model does, by positions of a row's own."""
        return self.moments_from is not None

    @property
    def resident(self) -> int:
        """How many leading entries can stay, and move, for ever; all, unless a method knows better.

        In half precision the cache keeps their keys as they came, so that rounding never builds up:
        a method whose other entries leave after a few moves saves that memory.
        """
        return FOREVER

    @abstractmethod
    def survivors(self, held: int, state: State) -> tuple[int, State]:
        """The length recurrence: what one eviction leaves, from lengths alone.

        Args:
            held: entries in the cache after a step's tokens were appended.
            state: what the step before returned; a method's own, and opaque to everybody else.

        Returns:
            Entries that stay (== `held` when nothing is evicted) and the new state.
        """

    def for_layer(self, index: int, layers: int) -> Policy:
        """The policy of one of the `layers` that evict.

        Layers may hold different numbers of entries; what this policy's own :meth:`survivors` says
        is then what a layer holds on average, up to one.
        """
        return self

    def for_tokenizer(self, tokenizer: Any) -> Policy:
        """The policy for a model's tokenizer, if it reads texts of its own."""
        return self

    def for_model(self, model: PreTrainedModel) -> Policy:
        """The policy for a model, if it has to know it; :class:`EvictionCache` asks."""
        return self

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """What is read behind a prompt to judge it, a chunk at a time.

        Args:
            prompt: token ids of one row.

        Yields:
            A chunk's first token and one past its last, and the ids to read, which end with it.
        """
        raise NotImplementedError

    def score(self, entries: Entries) -> Tensor | None:
        """What :meth:`select` ranks by; called only when :meth:`survivors` evicts.

        Returns:
            float32 [rows, kv_heads, held], high for what should stay; by default the attention
            received, None unless :attr:`needs_scores`.
        """
        return entries.received if self.needs_scores else None

    @abstractmethod
    def select(self, held: int, state: State, scores: Tensor | None) -> Tensor:
        """Which of the entries before the last :attr:`protected` stay.

        Called only when :meth:`survivors` evicts.

        Args:
            held, state: as for :meth:`survivors`.
            scores: what :meth:`score` returned.

        Returns:
            Indices into the `held` entries, int64, ascending, of a shape that broadcasts to
            [rows, kv_heads, kept - protected].
        """

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """A copy whose free parameters meet a budget; :class:`buzz.Budget` checks that they do.

        Neither the prompt's length nor the answer's has a say: a method whose size moves would
        otherwise be another one for every sample.

        Args:
            budget: entries per layer and KV head.
            fixed: parameters that keep their value, because the user set them.
            by: whether the budget is the most that is ever held, or the mean of an endless answer;
                the same for methods of fixed size.

        Raises:
            ConfigError: the budget cannot be met.
        """
        return self

    def lengths(self, steps: Iterable[int]) -> list[int]:
        """Entries held after each of `steps` forward passes (their numbers of new tokens)."""
        held: int = 0
        state: State = 0
        lengths = []
        for new in steps:
            held, state = self.survivors(held + new, state)
            lengths.append(held)
        return lengths

    def footprint(self, prompt: int = 0) -> Footprint:
        """What is held beside an endless answer to a prompt of this length, from lengths alone."""
        return _footprint(self, prompt)

    def _whole(self) -> list[str]:
        """Parameters that are whole numbers, by their defaults."""
        return [field.name for field in dataclasses.fields(self) if type(field.default) is int]

    def _at_least(self, minimum: int, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(
                    f"method.{field}", value, f"give a whole number of at least {minimum}"
                )

    def _within(self, low: float, high: float, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                remedy = f"give a number from {low:g} to {high:g}"
                raise ConfigError(f"method.{field}", value, remedy)
            object.__setattr__(self, field, float(value))  # of 1, which YAML reads as an integer

    def _one_of(self, field: str, *choices: str) -> None:
        if getattr(self, field) not in choices:
            raise ConfigError(
                f"method.{field}", getattr(self, field), f"choose one of {', '.join(choices)}"
            )

    def _replace(self, budget: int, minimum: int = 1, **parameters: int) -> Self:
        """A copy with `parameters` set, refused when the budget leaves one below `minimum`."""
        self._require(budget, minimum, **parameters)
        return dataclasses.replace(self, **parameters)

    def _require(self, budget: int, minimum: int, **parameters: int) -> None:
        for field, value in parameters.items():
            if value < minimum:
                raise ConfigError(
                    "budget",
                    budget,
                    f"leaves {value} entries for method.{field}, and {self.name} would hold"
                    f" {budget + minimum - value}; give as many, or lower its other parameters",
                )


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of scores [..., n]: int64 [..., count], ascending."""
    if scores.shape[-1] == count + 1:  # decoding: one leaves, no sort is needed
        kept = torch.arange(count, device=scores.device)
        return kept + (kept >= scores.argmin(-1, keepdim=True))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def parameters(policy: Policy) -> dict[str, Any]:
    """A method's parameters by name, without what it has measured of a model or a tokenizer."""
    known = POLICIES.get(policy.name)
    kind = known if known and isinstance(policy, known) else type(policy)
    own = {field.name: getattr(policy, field.name) for field in dataclasses.fields(kind)}
    return {k: parameters(v) if isinstance(v, Policy) else v for k, v in own.items()}


@lru_cache(maxsize=4096)
def _footprint(policy: Policy, prompt: int) -> Footprint:
    """Follows the length recurrence until it comes back to a state, which closes a cycle."""
    now = policy.survivors(prompt, 0) if prompt else (0, 0)
    after_prompt = now[0]
    seen: dict[tuple[int, State], int] = {}
    lengths: list[int] = []
    while now not in seen:
        if policy.evicts != "always" or len(lengths) > FOREVER:
            return Footprint(after_prompt, math.inf, math.inf)
        seen[now] = len(lengths)
        lengths.append(now[0])
        now = policy.survivors(now[0] + 1, now[1])
    cycle = lengths[seen[now] :]
    return Footprint(after_prompt, max(lengths), sum(cycle) / len(cycle))
