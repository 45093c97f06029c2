"""Summaries of pages of Python's own manual: real documents that every machine has.

The pages are those of `help()` (module ``pydoc_data.topics``), so they differ a little from one
Python version to the next. There is no reference summary; what is scored is how much of the
summary's wording comes from the page: a model whose cache lost the page writes about other things.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import ClassVar

from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.tasks.base import Sample, Task, at_least

QUESTION = "Summarize the text above in one or two sentences."


@dataclass(kw_only=True)
class Pydoc(Task):
    """Score: ROUGE-1 and ROUGE-2 precision of the summary against the page, 0..1.

    That is the share of its words and word pairs that stand in the page: whether it keeps to the
    page, not whether it is a good summary.

    Attributes:
        shortest, longest: bounds of a page in tokens.
        seed: the order in which pages are drawn.
    """

    headline: ClassVar[str] = "rouge2"
    scorers: ClassVar[tuple[str, ...]] = ("rouge-score",)

    shortest: int = 400
    longest: int = 1100
    seed: int = 0

    def check(self) -> None:
        super().check()
        at_least(1, "task.shortest", self.shortest)
        at_least(self.shortest, "task.longest", self.longest)

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

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        scores = RougeScorer(["rouge1", "rouge2"]).score(sample.references[0], prediction)
        return {name: score.precision for name, score in scores.items()}
