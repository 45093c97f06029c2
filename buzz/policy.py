"""The interface of an eviction method.

A method is one frozen dataclass, registered by name. *How many* entries it keeps depends on lengths
alone (:meth:`Policy.next_length`), and *which* ones on their scores (:meth:`Policy.select`). So
buffers stay rectangular, and memory is known before a single token is computed
(:meth:`Policy.lengths`). Scores are attention sums, unless the method computes others from a
layer's keys, values and queries (:meth:`Policy.score`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
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
State = Any  # what a method remembers between steps: hashable, 0 before the first step
FOREVER = 2**20  # steps after which a cache that still grows is taken to be unbounded

# Names of methods' attributes, and those of version 0.2, which are still accepted.
RENAMED = {"next_length": "survivors", "num_recent": "protected", "num_pinned": "resident"}

POLICIES: dict[str, type[Policy]] = {}
PolicyClass = TypeVar("PolicyClass", bound="type[Policy]")


def register(name: str = "") -> Callable[[PolicyClass], PolicyClass]:
    """Class decorator: registers a policy under `name`, or under its module's name."""

    def add(cls: PolicyClass) -> PolicyClass:
        cls.name = name or cls.__module__.rpartition(".")[2]
        POLICIES[cls.name] = cls
        return cls

    return add


class Footprint(NamedTuple):
    """Cache length of a method, in entries per layer and KV head.

    Attributes:
        after_prompt: after the prompt's eviction.
        peak: the maximum after any later step of an endless answer; infinite for a cache that grows
            without bound.
        mean: the average over the cycle that the length settles in.
    """

    after_prompt: int
    peak: float
    mean: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """An eviction method: a frozen dataclass whose fields are the method's parameters.

    Attributes:
        name: the registered name.
        needs_scores: whether the method reads attention sums. If not, none are computed.
        needs_projection: whether :meth:`score` reads the layers' output projections.
        needs_repetition: whether the prompt is read a second time to score it, see
            :meth:`repetitions`; the attention sums are then maxima over that second pass.
        evicts: ``always``, so that memory stays bounded; ``prompt``: once, after the prompt, so
            that the cache grows with the answer; or ``never``.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False
    needs_projection: ClassVar[bool] = False
    needs_repetition: ClassVar[bool] = False
    evicts: ClassVar[Evicts] = "always"

    @property
    @abstractmethod
    def num_recent(self) -> int:
        """Last entries that always stay. They are not moved, so they cost nothing."""

    @property
    def score_rule(self) -> ScoreRule:
        """How attention is accumulated.

        ``sum``: over all queries since the entry was appended; ``mean``: that sum, divided by the
        number of queries that could see the entry; ``step``: over the queries of the current step
        (computed only in steps that evict).
        """
        return "sum"

    @property
    def observe(self) -> int | None:
        """Last queries of a step whose attention counts; None: all of the step."""
        return None

    @property
    def decay(self) -> float:
        """Factor on earlier attention sums at every new token, for the rule ``sum``."""
        return 1.0

    @property
    def queries(self) -> int:
        """Last queries that each layer keeps for :meth:`score`."""
        return 0

    @property
    def moments_from(self) -> int | None:
        """First token whose query counts in the mean and covariance of queries.

        None: the layers compute neither.
        """
        return None

    @property
    def page(self) -> int:
        """Entries that leave together: 1, except under :class:`buzz.Constrained`."""
        return 1

    @property
    def needs_rotation(self) -> bool:
        """Whether :meth:`score` rotates vectors as the model's RoPE does."""
        return self.moments_from is not None

    @property
    def num_pinned(self) -> int:
        """Leading entries that may stay for the whole text; by default all.

        At cache positions, evictions rotate kept keys. In half precision the rounding errors of
        many rotations would add up, so the cache also stores the original keys of these entries. A
        method whose other entries leave after a few evictions saves memory by a smaller number.
        """
        return FOREVER

    @abstractmethod
    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        """Cache length after a step's eviction.

        Args:
            cache_length: entries in the cache once the step's tokens are appended.
            state: what the previous step returned. Only the method itself reads it.

        Returns:
            Entries that stay (`cache_length` if none is evicted), and the new state.
        """

    def for_layer(self, index: int, layers: int) -> Policy:
        """The policy of layer `index` of the `layers` that evict.

        Layers may have different cache lengths. Their average is then what this policy's own
        :meth:`next_length` returns, up to one entry.
        """
        return self

    def for_tokenizer(self, tokenizer: Any) -> Policy:
        """The policy for a model's tokenizer, for methods that read a text of their own."""
        return self

    def for_model(self, model: PreTrainedModel) -> Policy:
        """The policy for a model, for methods that measure it; :class:`EvictionCache` calls it."""
        return self

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """The second pass over a prompt, a chunk at a time, if `needs_repetition`.

        Args:
            prompt: token ids of one row.

        Yields:
            A chunk's bounds (first token, one past its last), and the token ids that are read after
            the prompt to score it; these end with the chunk.
        """
        raise NotImplementedError

    def score(self, entries: Entries) -> Tensor | None:
        """Scores that :meth:`select` ranks by; called only in steps that evict.

        Returns:
            float32 [rows, kv_heads, cache_length], higher for entries that should stay. By default
            the attention sums, or None if the method does not need them.
        """
        return entries.attention_sums if self.needs_scores else None

    @abstractmethod
    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        """The entries that stay, of those before the last :attr:`num_recent`.

        Called only in steps that evict.

        Args:
            cache_length, state: as for :meth:`next_length`.
            scores: what :meth:`score` returned.

        Returns:
            Indices of entries, int64, ascending, of a shape that broadcasts to
            [rows, kv_heads, next_length - num_recent].
        """

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """A copy whose parameters meet a budget; :class:`buzz.Budget` checks that they do.

        They depend on the budget alone, not on the lengths of prompt and answer.

        Args:
            budget: entries per layer and KV head.
            fixed: parameters that keep their value because the user set them.
            by: ``peak``: the budget is the maximum cache length; ``mean``: it is the average over
                an endless answer. For methods of constant length they are the same.

        Raises:
            ConfigError: the budget cannot be met.
        """
        return self

    def lengths(self, steps: Iterable[int]) -> list[int]:
        """Cache length after each of `steps` forward passes, given their numbers of new tokens."""
        length: int = 0
        state: State = 0
        lengths = []
        for new in steps:
            length, state = self.next_length(length + new, state)
            lengths.append(length)
        return lengths

    def footprint(self, prompt: int = 0) -> Footprint:
        """Cache length after a prompt of so many tokens, and during an endless answer."""
        return _footprint(self, prompt)

    # For callers that use the names of version 0.2.
    protected, resident = num_recent, num_pinned

    def survivors(self, held: int, state: State) -> tuple[int, State]:
        return self.next_length(held, state)

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives every attribute of :data:`RENAMED` that a class defines its other name, too."""
        super().__init_subclass__(**options)
        for names in RENAMED.items():
            owner = next(one for one in cls.__mro__ if vars(one).keys() & {*names})
            for name, other in (names, names[::-1]):  # a base that is no Policy has but one of them
                if name not in vars(owner):
                    setattr(cls, name, _alias(owner, other))

    def _whole(self) -> list[str]:
        """Names of the parameters whose default is a whole number."""
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


def _alias(cls: type, name: str) -> Any:
    """An attribute of a class, to be set under another name; for a plain value, a property."""
    own = vars(cls)[name]
    if name == "next_length":  # whose first parameter has another name, too

        def survivors(self: Policy, held: int, state: State) -> tuple[int, State]:
            return own(self, held, state)

        return survivors
    return own if callable(own) or isinstance(own, property) else property(attrgetter(name))


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of scores [..., n]: int64 [..., count], ascending."""
    if scores.shape[-1] == count + 1:  # decoding: one leaves, no sort is needed
        kept = torch.arange(count, device=scores.device)
        return kept + (kept >= scores.argmin(-1, keepdim=True))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def parameters(policy: Policy) -> dict[str, Any]:
    """A method's parameters by name, without measurements of a model or a tokenizer."""
    known = POLICIES.get(policy.name)
    kind = known if known and isinstance(policy, known) else type(policy)
    own = {field.name: getattr(policy, field.name) for field in dataclasses.fields(kind)}
    return {k: parameters(v) if isinstance(v, Policy) else v for k, v in own.items()}


@lru_cache(maxsize=4096)
def _footprint(policy: Policy, prompt: int) -> Footprint:
    """Repeats :meth:`Policy.next_length` until length and state recur, which closes a cycle."""
    now = policy.next_length(prompt, 0) if prompt else (0, 0)
    after_prompt = now[0]
    seen: dict[tuple[int, State], int] = {}
    lengths: list[int] = []
    while now not in seen:
        if policy.evicts != "always" or len(lengths) > FOREVER:
            return Footprint(after_prompt, math.inf, math.inf)
        seen[now] = len(lengths)
        lengths.append(now[0])
        now = policy.next_length(now[0] + 1, now[1])
    cycle = lengths[seen[now] :]
    return Footprint(after_prompt, max(lengths), sum(cycle) / len(cycle))
