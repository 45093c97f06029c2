"""Questions over ten documents, one of which holds the answer: 10-QA of Lost in the Middle.

Data, layout and metric are those of Liu et al. (arXiv 2307.03172,
https://github.com/nelson-liu/lost-in-the-middle). The instruction is in other words: to compare
with their numbers, give theirs as `task.instruction`. `protocol=original` has the BUZZ paper's
layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal

from pydantic import NonNegativeInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, after, means_by_meta
from evals.tasks.data import are_texts, load_hub, read_jsonl
from evals.tasks.questions import QuestionsTask
from evals.tasks.text import as_buzz_writes, found_answer
from evals.tasks.types import Grid, template

INSTRUCTION = (
    "Answer the question at the end from the documents below. Some of them have nothing to do with"
    " it. Give the answer alone, in a few words."
)
METRICS = ("best_subspan", "exact_match", "f1", "strict_match")


@dataclass(kw_only=True)
class NQ10(QuestionsTask):
    """Scores, 0 or 1 (F1: 0..1), of the answer's first line, as the owners do. Groups: `gold_at`.

    `best_subspan`: any reference stands in the answer (the owners' metric); `exact_match`: the
    answer is a reference; `f1`: of their words, for the best reference; all three in SQuAD's normal
    form. `strict_match` (of the BUZZ paper's code): the whole answer, as that code writes it
    (:func:`evals.tasks.text.as_buzz_writes`), is the first reference but for case and white space
    around them. A question asked for several places counts once in intervals.

    Several questions on one context are those of neighbouring lines. The context has as many
    documents as the first line: those that answer the questions, then others of these lines in
    turn. They are shuffled.

    Attributes:
        headline: the score that tables show.
        prompt: the prompt, with {documents}, {question} and {instruction} where they stand in it.
        document: one of the documents, with its {title}, {text} and {number} (from 1). They follow
            each other without anything between.
        instruction: the {instruction} of the prompt; None: :data:`INSTRUCTION`.
        gold_at: places, from 0, to which the gold document is moved; each question is asked once
            per place. None: it stays where the data have it.
        samples: at most so many questions.
        data_file: JSON lines of question, answers, ctxs (title, text) and gold_index. Instead of
            gold_index, one of ctxs may be marked by isgold, as in the owners' files. None: `hub`.
        hub, hub_config, hub_revision, split: a data set of that schema on the hub.
    """

    grouped_by: ClassVar[str] = "place of the gold document"
    version: ClassVar[int] = 3
    scores_version: ClassVar[int] = 2

    headline: Literal[METRICS] = "best_subspan"
    prompt: Annotated[str, template(["documents", "question"], ["instruction"])] = (
        "{instruction}\n\n{documents}\nQuestion: {question}\nAnswer:"
    )
    document: Annotated[str, template(["text"], ["title", "number"])] = (
        "Document [{number}](Title: {title}) {text}\n"
    )
    instruction: str | None = None
    gold_at: Grid[NonNegativeInt] | None = None
    data_file: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    split: str = "test"
    _rows: list[dict[str, Any]] = field(init=False, repr=False, default_factory=list)

    def check(self) -> None:
        super().check()
        if self.instruction is not None and "{instruction}" not in self.prompt:
            remedy = "task.prompt has no {instruction} in which to put it; leave it out"
            raise ConfigError("task.instruction", self.instruction, remedy)
        if self.questions > 1 and self.gold_at:
            remedy = "with several questions the documents are shuffled; leave it out"
            raise ConfigError("task.gold_at", self.gold_at, remedy)

    def prepare(self) -> None:
        needed = ("question", "answers", "ctxs")
        if self.data_file is not None:
            rows = read_jsonl(self.data_file, "task.data_file", needed)
        elif self.hub is not None:
            source = (self.hub, self.hub_config, self.split)
            rows = load_hub(*source, "task.data_file", self.hub_revision)
        else:
            raise ConfigError(
                "task.data_file", None, "give a JSON-lines file, or a hub name as task.hub"
            )
        for number, row in enumerate(rows, start=1):
            if problem := _problem(row, needed):
                raise ConfigError("task.data_file", f"sample {number}", problem)
        fewest = min(len(row["ctxs"]) for row in rows)
        for place in self.gold_at or ():
            if place >= fewest:
                raise ConfigError("task.gold_at", place, f"give places from 0 to {fewest - 1}")
        if self.questions > min(fewest, len(rows)):
            remedy = f"a context has {fewest} documents, and there are {len(rows)} questions"
            raise ConfigError("task.questions", self.questions, remedy)
        self._rows = [row | {"gold_index": _gold_index(row)} for row in rows]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        if self.questions > 1:
            return self._together()
        return [
            self._sample(number, row, place)
            for number, row in enumerate(self._rows[: self.samples])
            for place in self.gold_at or [row["gold_index"]]
        ]

    def _together(self) -> list[Sample]:
        """All questions on every context. Lines that make no full context are left out."""
        size, found = self.questions, []
        for number in range(len(self._rows) // size)[: self.samples]:
            rows = self._rows[number * size : (number + 1) * size]
            gold = [row["ctxs"][row["gold_index"]] for row in rows]
            others = zip_longest(*(row["ctxs"] for row in rows))
            flat = [one for several in others for one in several if one is not None]
            rest = [one for i, one in enumerate(flat) if one not in gold and one not in flat[:i]]
            documents = gold + rest[: max(0, len(rows[0]["ctxs"]) - size)]
            random.Random(number).shuffle(documents)
            samples = []
            for row, own in zip(rows, gold, strict=True):
                place = documents.index(own)
                row = row | {"ctxs": documents, "gold_index": place}
                samples.append(self._sample(number, row, place))
            found += self.together(f"{number}", samples)
        return found

    def _sample(self, number: int, row: dict[str, Any], place: int) -> Sample:
        documents = list(row["ctxs"])
        documents.insert(place, documents.pop(row["gold_index"]))
        texts = [
            self.document.format(number=number, title=document["title"], text=document["text"])
            for number, document in enumerate(documents, start=1)
        ]
        prompt = self.prompt.format(
            instruction=self.instruction or INSTRUCTION,
            documents="".join(texts),
            question=row["question"],
        )
        asks_last = self.prompt.find("{question}") > self.prompt.rfind("{documents}")
        return Sample(
            id=f"{number}-{place}",
            prompt=prompt,
            references=tuple(row["answers"]),
            group=str(place) if self.gold_at else "",
            unit=str(number),
            question=after("".join(texts), prompt) if asks_last else "",
            meta={"gold_at": place},
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        first, written = sample.references[0], as_buzz_writes(record["prediction"])
        strict = float(written.strip().lower() == first.strip().lower())
        return found_answer(record["prediction"], sample.references) | {"strict_match": strict}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """By the gold document's place, unless the groups are these places."""
        if self.gold_at:
            return self.by_question(records)
        means = means_by_meta(("gold_at",), records, self.headline)["gold_at"]
        return {self.grouped_by: means} | self.by_question(records)


def _problem(row: dict[str, Any], needed: Sequence[str]) -> str | None:
    """What is wrong with a sample, if anything is."""
    if missing := [key for key in needed if key not in row]:
        return f"lacks {', '.join(missing)}"
    if not isinstance(row["question"], str):
        return "`question` must be a text"
    if not are_texts(row["answers"]) or not all(map(str.strip, row["answers"])):
        return "`answers` must be a list of texts, none of them empty"
    documents = row["ctxs"]
    texts = (
        documents
        and isinstance(documents, list)
        and all(
            isinstance(one, dict) and are_texts([one.get("title"), one.get("text")])
            for one in documents
        )
    )
    if not texts:
        return "`ctxs` must be a list of documents with title and text"
    gold = _gold_index(row)
    if gold is None:
        return "lacks `gold_index`, and none of `ctxs` is marked by `isgold`"
    if type(gold) is not int or gold not in range(len(documents)):
        return "`gold_index` is no place in `ctxs`"
    return None


def _gold_index(row: dict[str, Any]) -> Any:
    """The gold document's place, given or marked; None if neither."""
    if row.get("gold_index") is not None:
        return row["gold_index"]
    marks = [document.get("isgold") for document in row["ctxs"]]
    return marks.index(True) if True in marks else None
