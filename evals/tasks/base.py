"""What a task is: samples with references, and scores."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.environment import package_version
from evals.results.schema import Record


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        id: unique within the task.
        prompt: the user's text, without chat template.
        references: acceptable answers.
        group: what the score is broken down by (a depth, a data set); empty for none.
        unit: what the sample is about, where several are about the same (a question asked in
            several ways); the bootstrap draws them together.
        question: the end of the prompt that asks, where all before it could be read without
            knowing it; empty where the two are not apart.
        answer_prefix: how the answer begins; the model goes on from there.
        meta: anything else worth recording.
        max_new_tokens, chat_template: override the task's, where data sets differ.
        stop: strings whose last token ends the generation (never as its first token).
        ids: the prompt's token ids, where the task tokenized it; they are used as they are.
        shared: names the context, where several samples have the same one, and differ in their
            question: they follow each other.
        starts: places in `ids` where a text of its own begins, of a :class:`StreamTask`: nothing
            predicts its first token, and its last is not fed.
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


Averages = Callable[[dict[str, float]], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Section:
    """A table of reports: one for all tasks that name it.

    Attributes:
        name: the files' stem.
        columns: metrics that are shown beside the headline.
        note: what a reader must know.
        averages: of a benchmark whose groups are data sets, which are shown in rows: its own
            averages, {kind: {name: value}}, of their scores.
    """

    name: str
    title: str
    columns: tuple[str, ...] = ()
    note: str = ""
    averages: Averages | None = None


@dataclass(frozen=True)
class Picture:
    """A heat map of reports, a panel a run.

    Attributes:
        cells: value by (column, row), from records.
        x, y, value: what columns, rows and values are.
        column, row: formats of their names.
    """

    title: str
    cells: Callable[[Sequence[Record]], dict[tuple[float, float], float]]
    x: str
    y: str
    value: str
    column: str = "{:,}"
    row: str = "{:g}"


OTHERS = Section(
    "other_tasks",
    "Passkeys and other tasks",
    note="An interval of no width means that every sample scored the same, not certainty. KL to"
    " full: divergence, in nats a token, of the next-token distribution from the full cache's,"
    " on the full cache's own answers.",
)


@dataclass(kw_only=True)
class Task(ABC):
    """Data, prompts and scores. Subclasses are dataclasses whose fields are the YAML's keys.

    Attributes:
        name: the task's name in run folders and tables.
        samples: at most so many samples are run; None for all.
        shard: "0/8" runs every eighth of them from the first on; the report puts shards together.
        max_new_tokens: longest answer.
        batch_size: prompts per batch.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        headline: the metric that summaries and tables show; every score has it.
        own_lengths: whether `max_new_tokens` may be None, as samples bring their own.
        statistic: what becomes of the headline's mean, a key of
            :data:`evals.tasks.text.STATISTICS`.
        higher_is_better: of the headline.
        grouped_by: what a sample's group is.
        version: of prompts and scores; raise it with any change to them, and runs of before, whose
            records would no longer be comparable, count no more.
        section, picture: where and how reports show it.
        timed: whether speed is what it is run for: its score is no quality.
        scorers: packages that compute scores. Under another version of theirs, answers that are
            there are scored again.
    """

    headline: ClassVar[str]  # or a field, where there is a choice
    own_lengths: ClassVar[bool] = False
    statistic: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = True
    grouped_by: ClassVar[str] = "group"
    section: ClassVar[Section] = OTHERS
    picture: ClassVar[Picture | None] = None
    timed: ClassVar[bool] = False
    version: ClassVar[int] = 1
    scorers: ClassVar[tuple[str, ...]] = ()

    name: str
    samples: int | None = None
    shard: str | None = None
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
        self.of_shard([])

    def of_shard(self, samples: list[Sample]) -> list[Sample]:
        """Those of `samples` that :attr:`shard` names.

        Raises:
            ConfigError: it names none.
        """
        if self.shard is None:
            return samples
        match = re.fullmatch(r"(\d+)/(\d+)", str(self.shard))
        if not match or int(match[1]) >= int(match[2]):
            raise ConfigError("task.shard", self.shard, "give e.g. 0/8, up to 7/8")
        contexts = list(dict.fromkeys(sample.shared or sample.id for sample in samples))
        own = set(contexts[int(match[1]) :: int(match[2])])
        return [sample for sample in samples if (sample.shared or sample.id) in own]

    @property
    def conversation(self) -> bool:
        """Whether questions on one context follow each other on one cache."""
        return False

    def sampling(self, samples: Sequence[Sample]) -> tuple[float, float, list[int]] | None:
        """Temperature, top-p and each sample's seed; None: answers are of the likeliest tokens."""
        return None

    @property
    def scoring(self) -> str:
        """Names the version of all that turns an answer into scores."""
        known = [self.version, *(package_version(package) for package in self.scorers)]
        return " ".join(map(str, known))

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt where it is known beforehand and must not be cut, else 0."""
        return 0

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """At most :attr:`samples` samples, in a fixed order."""

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Metrics of one prediction by name, :attr:`headline` among them."""

    def score_record(self, sample: Sample, record: Record) -> dict[str, float]:
        """As :meth:`score`, from all that was measured of an answer, its text among it."""
        return self.score(sample, record["prediction"])

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Means by anything but the group, as {title: {row: value}}, for summary and table."""
        return {}

    @classmethod
    def topics(cls, settings: Mapping[str, Any]) -> dict[str, set[str] | None]:
        """What claims about a topic may read of its runs: groups, None for all of them.

        Args:
            settings: those of the task in a run's configuration.
        """
        return {}

    def draw(self, records: Sequence[Record], folder: Path) -> None:  # noqa: B027
        """Puts the task's picture, if it has one, into the run's folder."""


@dataclass(kw_only=True)
class StreamTask(Task):
    """Long texts to be predicted, not answered: each goes through one cache in small steps.

    A token is scored before it is fed, so before it can influence any eviction.

    Attributes:
        tokens: tokens of a text; None for all there are.
        chunk: tokens per step.
        blocks: pieces of equal size that a text's losses are averaged over, for the curve over
            position and as what the bootstrap resamples.
    """

    own_lengths: ClassVar[bool] = True

    tokens: int | None = None
    chunk: int = 1
    blocks: int = 16
    max_new_tokens: int | None = None
    chat_template: bool = False

    def check(self) -> None:
        super().check()
        at_least(1, "task.chunk", self.chunk)
        at_least(2, "task.blocks", self.blocks)
        if self.tokens is not None:
            at_least(self.blocks + 1, "task.tokens", self.tokens)
        if self.batch_size != 1:
            raise ConfigError("task.batch_size", self.batch_size, "texts are read one by one")
        for name, none in (("max_new_tokens", None), ("chat_template", False)):
            if (value := getattr(self, name)) != none:
                raise ConfigError(f"task.{name}", value, "there is no answer; leave it out")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        raise TypeError(f"{self.name} scores losses and not predictions")

    @abstractmethod
    def score_losses(self, sample: Sample, losses: Sequence[float]) -> dict[str, float]:
        """Metrics by name, from the negative log-likelihood in nats of each token but the first."""


def after(body: str, prompt: str) -> str:
    """What follows the last `body` in a prompt."""
    return prompt[prompt.rindex(body) + len(body) :]


def at_least(minimum: int, name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(name, value, f"give a whole number of at least {minimum}")


def distinct(name: str, values: Iterable[object]) -> None:
    """Raises ConfigError if one of `values` is there twice: their samples would share an id."""
    for value, count in Counter(values).items():
        if count > 1:
            raise ConfigError(name, value, "is there twice; give each once")


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    known = list(choices)
    if value not in known:
        raise ConfigError(name, value, f"choose one of {', '.join(known)}")


def template(name: str, value: str, must: Sequence[str], may: Sequence[str] = ()) -> None:
    """Raises ConfigError unless `value` has all of `must` in braces, and nothing else but `may`.

    Other braces are written twice, as in :meth:`str.format`.
    """
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError as error:
        raise ConfigError(name, value, f"{error}; write {{{{ or }}}} for a brace") from error
    found = {field for _, field, _, _ in parts if field is not None}
    plain = not any(spec or conversion for _, _, spec, conversion in parts)
    if not plain or not set(must) <= found <= {*must, *may}:
        needed, optional = (", ".join(f"{{{one}}}" for one in names) for names in (must, may))
        remedy = f"must have {needed}, may have {optional} and nothing else in braces"
        raise ConfigError(name, value, remedy)
