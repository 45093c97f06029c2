"""What a task is: samples with references, and scores."""

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


@dataclass(kw_only=True)
class Task(ABC):
    """Data, prompts and scores. Subclasses are dataclasses whose fields are the YAML's keys.

    Attributes:
        name: the task's name in folders and tables.
        samples: at most so many samples are run; None for all.
        shard: "0/8" runs every eighth of them from the first on; the report puts shards together.
        max_new_tokens: longest answer; None, where a task allows it: samples bring their own.
        batch_size: prompts per batch.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        headline: the metric that summaries and tables show; every score has it.
        mode: whether the model is to ``answer`` a prompt, or to ``read`` a text to its end, see
            :class:`StreamTask`.
        statistic: what becomes of the headline's mean, a key of
            :data:`evals.results.frame.STATISTICS`.
        higher_is_better: of the headline.
        grouped_by: what a sample's group is.
        version: of prompts and scores; raise it with any change to them, and runs of before, whose
            records would no longer be comparable, count no more.
        scores_version: of scores alone; raise it with a change to them that takes the same answers,
            and answers that are there are scored again.
        timed: whether speed is what it is run for: its score is no quality.
        of_rows: settings of a timed task that tell rows of one table apart, as a method does.
        scorers: packages that compute scores. Under another version of theirs, answers that are
            there are scored again.
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
        """Bytes of keys and values that a batch's rows are to fill; None: `batch_size` says."""
        return None

    def check(self) -> None:
        """Checks the settings, each against its type; in subclasses also against each other.

        Raises:
            ConfigError: one is wrong.
        """
        check_fields("task", self)
        self.of_shard([])

    def prepare(self) -> None:  # noqa: B027
        """Reads the data that :meth:`load` makes samples of, before a model is loaded.

        Raises:
            ConfigError: they are missing or malformed.
        """

    def of_shard(self, samples: list[Sample]) -> list[Sample]:
        """Those of `samples` that :attr:`shard` names.

        Raises:
            ConfigError: it names none.
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
        """Whether questions on one context follow each other on one cache."""
        return False

    def sampling(self, samples: Sequence[Sample]) -> tuple[float, float, list[int]] | None:
        """Temperature, top-p and each sample's seed; None: answers are of the likeliest tokens."""
        return None

    @property
    def scoring(self) -> str:
        """Names the version of all that turns an answer into scores."""
        known = [self.version, *(package_version(package) for package in self.scorers)]
        if self.scores_version > 1:
            known.append(f"scores {self.scores_version}")
        return " ".join(map(str, known))

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt where it is known beforehand and must not be cut, else 0."""
        return 0

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """At most :attr:`samples` samples, in a fixed order."""

    @abstractmethod
    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        """Metrics by name, :attr:`headline` among them.

        Args:
            record: what was measured of an answer, its text (`prediction`) among it; of a text that
                was read also `losses`: the negative log-likelihood in nats of each token predicted.
        """

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Means by anything but the group, as {title: {row: value}}, for summary and table."""
        return {}


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
    """Means of a metric by what `key` makes of records; those of which it makes None are out."""
    values: dict[Any, list[float]] = {}
    for record in records:
        if (name := key(record)) is not None:
            values.setdefault(name, []).append(record["scores"][metric])
    return {name: statistics.fmean(found) for name, found in values.items()}


def means_by_meta(
    keys: Iterable[str], records: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, dict[str, float]]:
    """For each key that the samples' `meta` has, means of a metric by its value, in order."""
    found = {key: means_by(lambda r, key=key: r["meta"].get(key), records, metric) for key in keys}
    return {
        key: {str(name): means[name] for name in sorted(means)}
        for key, means in found.items()
        if means
    }
