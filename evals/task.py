"""What a task is: samples with references, and a score for a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        id: unique within the task.
        prompt: the user's text, without chat template.
        references: acceptable answers.
        group: what the score is broken down by (a depth, a data set); empty for none.
        meta: anything else worth recording.
        max_new_tokens, chat_template: override the task's, where data sets differ.
        stop: strings whose last token ends the generation (never as its first token).
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    group: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    chat_template: bool | None = None
    stop: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Task(ABC):
    """Data, prompts and scores. Subclasses are dataclasses whose fields are the YAML's keys.

    Attributes:
        name: the task's name in run folders and tables.
        samples: at most so many samples are run; None for all.
        max_new_tokens: longest answer.
        batch_size: prompts per batch.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        headline: the metric that summaries and tables show; every score has it.
        own_lengths: whether `max_new_tokens` may be None, as samples bring their own.
    """

    headline: ClassVar[str]
    own_lengths: ClassVar[bool] = False

    name: str
    samples: int | None = None
    max_new_tokens: int | None = 64
    batch_size: int = 1
    chat_template: bool = True

    def check(self) -> None:
        """What can be checked before a model is loaded.

        Raises:
            ConfigError: a size below 1; in subclasses also missing or malformed data.
        """
        if self.samples is not None:
            at_least(1, "task.samples", self.samples)
        if self.max_new_tokens is not None or not self.own_lengths:
            at_least(1, "task.max_new_tokens", self.max_new_tokens)
        at_least(1, "task.batch_size", self.batch_size)

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt where it is known beforehand and must not be cut, else 0."""
        return 0

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """At most :attr:`samples` samples, in a fixed order."""

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Metrics of one prediction by name, :attr:`headline` among them."""


def at_least(minimum: int, name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(name, value, f"give a whole number of at least {minimum}")
