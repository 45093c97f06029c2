"""Tasks: samples with references, and scores."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, StringConstraints
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.environment import package_version
from evals.results.record import Record
from evals.tasks.build import check_fields

Shard = Annotated[str, StringConstraints(pattern=r"^\d+/[1-9]\d*$")]


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        id: unique within the task.
        prompt: the user's text, without chat template.
        references: acceptable answers.
        group: by which scores are broken down (a depth, a data set); empty for none.
        unit: names what several samples are about (a question asked in several ways); the bootstrap
            draws them together. Empty: the sample alone.
        question: the end of the prompt, if all before it is a context that can be read without it;
            else empty.
        answer_prefix: how the answer begins; the model continues it.
        meta: anything else worth recording.
        max_new_tokens, chat_template: override the task's, where data sets differ.
        stop: strings whose last token ends the generation (never as its first token).
        ids: the prompt's token ids, if the task tokenizes it itself.
        shared: names the context of several samples that differ in their question alone; they
            follow each other.
        starts: of a :class:`StreamTask`, the places in `ids` where a text begins: its first token
            is not predicted, and its last is not fed.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    group: str = ""
    unit: str = ""
    question: str = ""
    answer_prefix: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    chat_template: bool | None = None
    stop: tuple[str, ...] = ()
    shared: str = ""
    ids: tuple[int, ...] | None = None
    starts: tuple[int, ...] = (0,)


@dataclass(kw_only=True)
class Task(ABC):
    """Data, prompts and scores. Subclasses are dataclasses whose fields are the YAML's keys.

    Attributes:
        name: the task's name in folders and tables.
        samples: at most so many samples are run; None for all.
        shard: "0/8" runs every eighth of them from the first on; the report puts shards together.
        max_new_tokens: tokens of the longest answer; None, where a task allows it: each sample's.
        batch_size: prompts per batch.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        headline: the metric that summaries and tables show; every score has it.
        mode: whether the model is to ``answer`` a prompt, or to ``read`` a text to its end, see
            :class:`StreamTask`.
        statistic: the function of the headline's mean that is shown, a key of
            :data:`evals.results.frame.STATISTICS`.
        higher_is_better: of the headline.
        grouped_by: what a sample's group is.
        version: of prompts and scores. Raise it with any change to them: records of before are then
            no longer comparable, and do not count.
        scores_version: of scores alone. Raise it with a change that applies to existing answers,
            too: they are then scored again.
        timed: whether the task measures speed: its score says nothing of quality.
        of_rows: settings of a timed task that tell rows of one table apart, as a method does.
        scorers: packages that compute scores. With another version of one, existing answers are
            scored again.
    """

    headline: ClassVar[str]  # or a field, where there is a choice
    mode: ClassVar[Literal["answer", "read"]] = "answer"
    statistic: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True
    grouped_by: ClassVar[str] = "group"
    timed: ClassVar[bool] = False
    of_rows: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1
    scores_version: ClassVar[int] = 1
    scorers: ClassVar[tuple[str, ...]] = ()

    name: str
    samples: PositiveInt | None = None
    shard: Shard | None = None
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 1
    chat_template: bool = True

    @property
    def room(self) -> int | None:
        """Bytes of keys and values that a batch may take; None: it has `batch_size` prompts."""
        return None

    def check(self) -> None:
        """Checks the settings: each against its type, and in subclasses against each other.

        Raises:
            ConfigError: one is wrong.
        """
        check_fields("task", self)
        self.of_shard([])

    def prepare(self) -> None:  # noqa: B027
        """Reads the data from which :meth:`load` makes samples, before a model is loaded.

        Raises:
            ConfigError: they are missing or malformed.
        """

    def of_shard(self, samples: list[Sample]) -> list[Sample]:
        """The samples of :attr:`shard`.

        Raises:
            ConfigError: there is no such shard.
        """
        if self.shard is None:
            return samples
        number, count = map(int, self.shard.split("/"))
        if number >= count:
            raise ConfigError("task.shard", self.shard, "give e.g. 0/8, up to 7/8")
        contexts = list(dict.fromkeys(sample.shared or sample.id for sample in samples))
        own = set(contexts[number::count])
        return [sample for sample in samples if (sample.shared or sample.id) in own]

    @property
    def conversation(self) -> bool:
        """Whether the questions on a context are asked one after another on one cache."""
        return False

    def sampling(self, samples: Sequence[Sample]) -> tuple[float, float, list[int]] | None:
        """Temperature, top-p and the seed of each sample; None: answers are greedy."""
        return None

    @property
    def scoring(self) -> str:
        """Names the version of the code and packages that turn an answer into scores."""
        known = [self.version, *(package_version(package) for package in self.scorers)]
        if self.scores_version > 1:
            known.append(f"scores {self.scores_version}")
        return " ".join(map(str, known))

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, if it is known in advance and must not be cut, else 0."""
        return 0

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """At most :attr:`samples` samples, in a fixed order."""

    @abstractmethod
    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        """Metrics by name, :attr:`headline` among them.

        Args:
            record: has the answer (`prediction`) and its measurements; for a text that was read
                also `losses`, the negative log-likelihood in nats of each predicted token.
        """

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Means by other things than the group, as {title: {row: value}}, for the table."""
        return {}


@dataclass(kw_only=True)
class StreamTask(Task):
    """Long texts that are predicted, not answered: each goes through one cache in small steps.

    A token is scored before it is fed, so it cannot influence any eviction before.

    Attributes:
        tokens: tokens of a text; None for all.
        chunk: tokens per step.
        blocks: pieces of equal size over which a text's losses are averaged: the points of the
            curve over position, and the units of the bootstrap.
    """

    mode: ClassVar[Literal["answer", "read"]] = "read"

    tokens: PositiveInt | None = None
    chunk: PositiveInt = 1
    blocks: Annotated[int, Field(ge=2)] = 16
    max_new_tokens: None = None
    batch_size: Literal[1] = 1
    chat_template: Literal[False] = False

    def check(self) -> None:
        super().check()
        if self.tokens is not None and self.tokens <= self.blocks:
            remedy = f"give more than its {self.blocks} blocks"
            raise ConfigError("task.tokens", self.tokens, remedy)


def after(body: str, prompt: str) -> str:
    """What follows the last `body` in a prompt."""
    return prompt[prompt.rindex(body) + len(body) :]


def means_by(
    key: Callable[[Mapping[str, Any]], Any], records: Iterable[Mapping[str, Any]], metric: str
) -> dict[Any, float]:
    """Means of a metric by the `key` of records; records with the key None are left out."""
    values: dict[Any, list[float]] = {}
    for record in records:
        if (name := key(record)) is not None:
            values.setdefault(name, []).append(record["scores"][metric])
    return {name: statistics.fmean(found) for name, found in values.items()}


def means_by_meta(
    keys: Iterable[str], records: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, dict[str, float]]:
    """For each key of the samples' `meta`, means of a metric by its sorted values."""
    found = {key: means_by(lambda r, key=key: r["meta"].get(key), records, metric) for key in keys}
    return {
        key: {str(name): means[name] for name in sorted(means)}
        for key, means in found.items()
        if means
    }
