"""Summaries of pages of Python's manual: real documents that every machine has.

The pages are those of `help()` (module ``pydoc_data.topics``), which differ a little between Python
versions. There are no reference summaries. The score is how much of the summary's wording comes
from the page: if the page was evicted, the model writes about other things.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import ClassVar

from pydantic import PositiveInt
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task
from evals.tasks.text import Words

QUESTION = "Summarize the text above in one or two sentences."


@dataclass(kw_only=True)
class Pydoc(Task):
    """Score: ROUGE-1 and ROUGE-2 precision of the summary against the page, 0..1.

    That is the share of its words and word pairs that are in the page. It says whether the summary
    keeps to the page, not whether it is a good one.

    Attributes:
        shortest, longest: bounds of a page in tokens.
        seed: the order in which pages are drawn.
    """

    headline: ClassVar[str] = "rouge2"
    scores_version: ClassVar[int] = 2
    scorers: ClassVar[tuple[str, ...]] = ("rouge-score",)

    shortest: PositiveInt = 400
    longest: PositiveInt = 1100
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.longest < self.shortest:
            raise ConfigError("task.longest", self.longest, f"give at least {self.shortest}")

    def longest_prompt(self) -> int:
        return self.longest

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        names = sorted(
            name
            for name, page in topics.items()
            if self.shortest <= len(tokenizer(page)["input_ids"]) <= self.longest
        )
        if not names:
            raise ConfigError(
                "task.longest", self.longest, f"no page has {self.shortest} tokens to that many"
            )
        random.Random(self.seed).shuffle(names)
        return [
            Sample(
                id=name,
                prompt=f"{topics[name].strip()}\n\n{QUESTION}",
                references=(topics[name],),
                question=QUESTION,
            )
            for name in names[: self.samples]
        ]

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        page, summary = sample.references[0], record["prediction"]
        scores = _scorer().score(page, summary)
        return {name: score.precision for name, score in scores.items()}


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2"], tokenizer=Words(use_stemmer=False))
