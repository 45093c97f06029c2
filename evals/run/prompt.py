"""A sample as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from evals.results.folder import sha256
from evals.results.record import Record
from evals.tasks.base import Sample


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        scoring: names the version of what scores the answer.
        before: tokens of the steps that read it up to its question, see
            :mod:`evals.run.compress`; () if it is read as one.
        turn: the tokens that put its question after the answer to another one on its context.
    """

    sample: Sample
    ids: list[int]
    truncated: int
    chat: bool
    max_new_tokens: int
    scoring: str = ""
    before: tuple[int, ...] = ()
    turn: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Tokens that a fractional budget is of: those that are compressed together."""
        return sum(self.before) or len(self.ids)

    @property
    def later(self) -> tuple[int, ...]:
        """Tokens of the steps in which it is read, without the first."""
        return (*self.before, len(self.ids) - sum(self.before))[1:]

    @property
    def steps(self) -> list[list[int]]:
        """Its tokens by the step that reads them."""
        ends = list(accumulate(self.before, initial=0))
        return [self.ids[i:j] for i, j in zip(ends, [*ends[1:], len(self.ids)], strict=True)]

    @property
    def question(self) -> Record:
        """What decides the answer. A record in which it differs is of another prompt."""
        return {
            "prompt_sha256": self.sha256,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.sample.stop),
        }

    @cached_property
    def sha256(self) -> str:
        """Names the token ids."""
        return sha256(self.ids)

    @cached_property
    def sample_sha256(self) -> str:
        """Names all that decides the record: the question, the references, how it is scored."""
        own = self.sample
        references = [list(own.references), own.group, own.unit, own.meta]
        return sha256([*self.question.values(), *references, self.scoring])
