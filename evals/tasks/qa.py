"""Questions on your own texts: a JSON-lines file of context, question and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, means_by
from evals.tasks.data import are_texts, read_jsonl
from evals.tasks.questions import QuestionsTask
from evals.tasks.text import found_answer, normalized, rouge
from evals.tasks.types import template

METRICS = ("best_subspan", "exact_match", "f1", "rouge1", "rouge2", "rougeL")


@dataclass(kw_only=True)
class QA(QuestionsTask):
    """Scores of the answer, each for the best reference.

    `best_subspan` (accuracy), `exact_match` and `f1`, 0..1, of the answer's first line: see
    :func:`evals.tasks.text.found_answer`. `rouge1`, `rouge2` and `rougeL`, 0..100, of all of it:
    see :func:`evals.tasks.text.rouge`.

    Every line is a sample. With `questions` above 1, lines with the same context, anywhere in the
    file, share a reading of it, so many at a time. Every reading then has the same weight, however
    many questions it has.

    Attributes:
        headline: the score that tables show.
        prompt: the prompt, with {context} and {question} where they stand in it. The question must
            stand after the context for `compress=context`.
        data_file: JSON lines; `answers` are a text or a list of texts.
        context_field, question_field, answers_field: their names in the file.
        samples: at most so many lines, or readings if `questions` is above 1.
    """

    scorers: ClassVar[tuple[str, ...]] = ("rouge-score",)

    headline: Literal[METRICS] = "best_subspan"
    prompt: Annotated[str, template(["context", "question"])] = (
        "Answer the question at the end from this text, in a few words.\n\n"
        "{context}\n\nQuestion: {question}\nAnswer:"
    )
    data_file: str | None = None
    context_field: str = "context"
    question_field: str = "question"
    answers_field: str = "answers"
    _rows: list[dict[str, Any]] = field(init=False, repr=False, default_factory=list)

    def prepare(self) -> None:
        if self.data_file is None:
            remedy = "give a JSON-lines file of context, question and answers"
            raise ConfigError("task.data_file", None, remedy)
        self._rows = read_jsonl(self.data_file, "task.data_file", problem=self._problem)
        if self.questions > 1 and all(len(lines) == 1 for lines in self._contexts()):
            remedy = "no two lines have the same context; leave it out"
            raise ConfigError("task.questions", self.questions, remedy)

    def _contexts(self) -> list[list[int]]:
        """The lines of each reading of a context, by number from 0."""
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self._rows):
            found.setdefault(row[self.context_field], []).append(number)
        size = self.questions
        return [one[i : i + size] for one in found.values() for i in range(0, len(one), size)]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        if self.questions == 1:
            return [self._sample(number) for number in range(len(self._rows))][: self.samples]
        readings = enumerate(self._contexts()[: self.samples])
        return [
            sample
            for name, lines in readings
            for sample in self.together(str(name), [self._sample(line) for line in lines])
        ]

    def _sample(self, number: int) -> Sample:
        row = self._rows[number]
        context, question = row[self.context_field], row[self.question_field]
        # The prompt's own words after the context, whatever context and question contain.
        before, _, asks = self.prompt.format(context="\0", question="\1").rpartition("\0")
        return Sample(
            id=str(number),
            prompt=self.prompt.format(context=context, question=question),
            references=_texts(row[self.answers_field]),
            question=asks.replace("\1", question) if "\1" not in before else "",
            meta={"line": number + 1},
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        answer, references = record["prediction"], sample.references
        rouges = [rouge(reference, answer) for reference in references]
        best = {name: max(one[name] for one in rouges) for name in rouges[0]}
        # As whole words, unlike nq10's: "no" is not in "I do not know".
        line = f" {normalized(answer.strip().split(chr(10))[0])} "
        whole = any(f" {normalized(one)} " in line for one in references)
        return found_answer(answer, references) | {"best_subspan": float(whole)} | best

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """All scores, and the headline by question number."""

        def reading(record: Mapping[str, Any]) -> str:
            return record["unit"] or record["id"]

        means = {name: fmean(means_by(reading, records, name).values()) for name in METRICS}
        return {"score": means} | self.by_question(records)

    def _problem(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a line, if anything is."""
        parts = ("context", "question", "answers")
        names = {part: getattr(self, f"{part}_field") for part in parts}
        for part, name in names.items():
            if name not in row:
                return f"has no {name!r} but {', '.join(row)}: name it by task.{part}_field=NAME"
        for part in ("context", "question"):
            if not isinstance(row[names[part]], str) or not row[names[part]].strip():
                return f"{names[part]!r} must be a text"
        answers = _texts(row[names["answers"]])
        if not are_texts(list(answers)) or not all(map(str.strip, answers)):
            return f"{names['answers']!r} must be a text or a list of texts, none of them empty"
        return None


def _texts(answers: Any) -> tuple[Any, ...]:
    """One answer or several."""
    return tuple(answers) if isinstance(answers, list) else (answers,)
