"""Summaries of news: XSUM and CNN/DailyMail, or any JSON lines of articles with summaries."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task, after
from evals.tasks.data import load_hub, read_jsonl
from evals.tasks.text import WORDS, as_buzz_writes, package_rouge, rouge, self_bleu
from evals.tasks.types import template

ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE, *(f"pkg_{name}" for name in ROUGE), "self_bleu")

ARTICLE_FIELDS = ("document", "article")
SUMMARY_FIELDS = ("summary", "highlights", "summary_gt")
# Files made for H2O's evaluation have a whole prompt in place of the article; few-shot files have
# several articles in it, all but the last with their summaries.
READY = "###\nArticle: "
READY_PROMPT = re.compile(f"{READY}(.*)\n\nSummarize the above article in [^\n]*\n*", re.DOTALL)


@dataclass(kw_only=True)
class Summarization(Task):
    """Scores: ROUGE-1, -2 and -L F-measure, 0..100, by two packages that differ by some points.

    `rouge1`, `rouge2`, `rougeL` are by rouge-score with stemming, on the words of any script
    (:class:`evals.tasks.text.Words`, which each record names); `pkg_rouge1`, ... are those of
    the BUZZ paper's code: by the package `rouge` (:func:`package_rouge`), of the
    answer as that code writes it (:func:`as_buzz_writes`). `self_bleu`, 0..1: how far
    the summary repeats itself (:func:`self_bleu`); lower is better.

    Attributes:
        headline: the score that tables show.
        prompt: the prompt, with {article} and {words} where they stand in it.
        words: how many words the prompt asks for.
        data_file: JSON lines with one of ARTICLE_FIELDS and one of SUMMARY_FIELDS; None: the hub.
        hub, hub_config, hub_revision, split: the data set on the hub.
    """

    version: ClassVar[int] = 2
    scores_version: ClassVar[int] = 2
    scorers: ClassVar[tuple[str, ...]] = ("rouge", "rouge-score", "nltk")

    headline: Literal[METRICS] = "rougeL"
    prompt: Annotated[str, template(["article"], ["words"])] = (
        "{article}\n\nSummarize the above article in {words} words."
    )
    words: PositiveInt = 50
    data_file: str | None = None
    hub: str
    hub_config: str | None = None
    hub_revision: str | None = None
    split: str = "test"
    _rows: list[dict[str, Any]] = field(init=False, repr=False, default_factory=list)

    @property
    def higher_is_better(self) -> bool:
        return self.headline != "self_bleu"

    def prepare(self) -> None:
        if self.data_file is None:
            source = (self.hub, self.hub_config, self.split)
            self._rows = load_hub(*source, "task.data_file", self.hub_revision)
        else:
            self._rows = read_jsonl(self.data_file, "task.data_file")
        for number, row in enumerate(self._rows):
            _article(number, row)
            _first(row, SUMMARY_FIELDS)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(i, row) for i, row in enumerate(self._rows[: self.samples])]

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        article = _article(number, row)
        prompt = self.prompt.format(article=article, words=self.words)
        return Sample(
            id=str(number),
            prompt=prompt,
            references=(_first(row, SUMMARY_FIELDS),),
            question=after(article, prompt),
            meta={"id": row.get("id"), "rouge_tokens": WORDS},
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        reference, written = sample.references[0], as_buzz_writes(record["prediction"])
        scores = rouge(reference, record["prediction"]) | package_rouge(reference, written)
        return scores | {"self_bleu": self_bleu(written)}


def _article(number: int, row: dict[str, Any]) -> str:
    """The article of a sample, taken out of a ready prompt if it is one.

    Args:
        number: of the sample in its file, from 0.
    """
    text = _first(row, ARTICLE_FIELDS)
    if READY not in text:
        return text
    ready = READY_PROMPT.fullmatch(text)
    if ready is None or READY in ready[1]:
        raise ConfigError(
            "task.data_file",
            f"sample {number + 1}",
            "a ready prompt must hold one article and end in its instruction;"
            " of few-shot files take the zero-shot one",
        )
    return ready[1]


def _first(row: dict[str, Any], fields: tuple[str, ...]) -> str:
    for name in fields:
        if isinstance(row.get(name), str):
            return row[name]
    raise ConfigError(
        "task.data_file", sorted(row), f"a sample needs a text named {' or '.join(fields)}"
    )
