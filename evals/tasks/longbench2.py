"""LongBench v2 (arXiv 2412.15204): questions with four choices on very long contexts.

Data, domains and prompt are lm-eval's. lm-eval compares the probabilities of the four letters after
the prompt; here the model answers, and the letter is read from the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task, means_by_meta
from evals.tasks.data import are_texts, load_hub, read_json, read_jsonl
from evals.tasks.definitions import LmEval, render

LM_EVAL = LmEval("longbench2", task="longbench2", extra="longbench")
COMMON = "_longbench_common_yaml"
LETTERS = "ABCD"
QUESTION = "What is the correct answer to this question:"
CODE = "Code Repository Understanding"  # in no group of lm-eval's

# How the prompt ends, and where in the answer the letter stands.
LETTER = "Answer:"
SENTENCE = 'Format your response as follows: "The correct answer is (insert answer here)".'
FORMS = {
    # As in the benchmark's code: a letter in brackets anywhere, or else the first one without.
    "sentence": (
        SENTENCE,
        (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"),
    ),
    "letter": (LETTER, (r"\A\W*([A-D])\b",)),
}


@dataclass(kw_only=True)
class LongBench2(Task):
    """Scores: the share of questions answered correctly, and of those answered at all, 0..1.

    Attributes:
        data_file: the benchmark's `data.json`, or JSON lines; None: lm-eval's mirror on the hub.
        hub_revision: of the mirror; None: its main branch.
        answer: ``sentence`` asks for the sentence that the benchmark's own code asks for;
            ``letter`` is lm-eval's prompt, which ends in "Answer:".
    """

    headline: ClassVar[str] = "accuracy"
    scores_version: ClassVar[int] = 2

    data_file: str | None = None
    hub_revision: str | None = None
    answer: Literal["sentence", "letter"] = "sentence"
    max_new_tokens: PositiveInt = 128
    _rows: list[dict[str, Any]] = field(init=False, repr=False, default_factory=list)

    def prepare(self) -> None:
        self._rows = [
            _row(number, row) for number, row in enumerate(self._read()[: self.samples], start=1)
        ]

    def _read(self) -> list[dict[str, Any]]:
        if self.data_file is not None:
            path = Path(self.data_file)
            if path.suffix != ".json" or not path.is_file():
                return read_jsonl(path, "task.data_file")
            found = read_json(path, "task.data_file")
            if not (isinstance(found, list) and found and all(isinstance(r, dict) for r in found)):
                raise ConfigError("task.data_file", str(path), "must be a list of objects")
            return found
        rows: list[dict[str, Any]] = []
        path, split = (LM_EVAL.read(COMMON)[key] for key in ("dataset_path", "test_split"))
        for subset, domain in subsets().items():
            found = load_hub(path, subset, split, "task.data_file", self.hub_revision)
            rows += [{"domain": domain, "sub_domain": subset} | row for row in found]
            if self.samples is not None and len(rows) >= self.samples:
                break
        return rows

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(number, row) for number, row in enumerate(self._rows)]

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        prompt = render(LM_EVAL.read(COMMON)["doc_to_text"], **row)
        if self.answer == "sentence":
            prompt = prompt.removesuffix(LETTER) + SENTENCE
        known = ("_id", "domain", "sub_domain", "difficulty", "length")
        return Sample(
            id=f"{number}",
            prompt=prompt,
            references=(LETTERS[row["answer"]],),
            question=prompt[prompt.rindex(QUESTION) :],
            meta={key: row.get(key) for key in known},
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        said = record["prediction"].replace("*", "")  # as the benchmark's code does first
        tried = (re.search(form, said) for form in FORMS[self.answer][1])
        found = next(filter(None, tried), None)
        right = found is not None and found[1] in sample.references
        return {"accuracy": float(right), "answered": float(found is not None)}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """By domain, difficulty and length, if the data have them."""
        return means_by_meta(("domain", "difficulty", "length"), records, self.headline)


@cache
def subsets() -> dict[str, str]:
    """Configurations of lm-eval's mirror, with the domain of each."""
    groups = [LM_EVAL.read(path.name) for path in LM_EVAL.path.glob("_longbench2_*.yaml")]
    domains = {f"{group['group']}_tasks": group["group_alias"] for group in groups}
    tasks = [LM_EVAL.read(path.name) for path in sorted(LM_EVAL.path.glob("[!_]*.yaml"))]
    return {
        task["dataset_name"]: next((domains[tag] for tag in task["tag"] if tag in domains), CODE)
        for task in tasks
    }


def _row(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A question in either schema, with `choices` and the number of the right one.

    Raises:
        ConfigError: it is in neither schema.
    """
    choices = row.get("choices", [row.get(f"choice_{letter}") for letter in LETTERS])
    answer = row.get("answer")
    if isinstance(answer, str) and len(answer) == 1:
        answer = LETTERS.find(answer)
    problem = None
    if not are_texts([row.get("context"), row.get("question")]):
        problem = "`context` and `question` must be texts"
    elif not are_texts(choices) or len(choices) != len(LETTERS):
        problem = "`choices`, or `choice_A` to `choice_D`, must be four texts"
    elif type(answer) is not int or not 0 <= answer < len(LETTERS):
        problem = "`answer` must be a letter from A to D, or a number from 0 to 3"
    if problem:
        raise ConfigError("task.data_file", f"sample {number}", problem)
    return row | {"choices": choices, "answer": answer}
