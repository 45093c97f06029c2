"""MATH-500 and AIME: long answers, by lm-eval's prompts, extraction and equivalence."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal
from unittest.mock import patch

from pydantic import Field, NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task, means_by_meta
from evals.tasks.data import load_hub, read_jsonl
from evals.tasks.definitions import LmEval, render

MINERVA = "minerva_math500"

# lm-eval's tasks: folder, and the data's names for the problem and the solution or answer.
BENCHMARKS = {
    MINERVA: ("minerva_math", "problem", "solution"),
    "hendrycks_math500": ("hendrycks_math", "problem", "solution"),
    "aime24": ("aime", "Problem", "Answer"),
    "aime25": ("aime", "problem", "answer"),
    "aime": ("aime", "Question", "Answer"),
}


@dataclass(kw_only=True)
class Math(Task):
    """Score: whether the final answer is right, 0 or 1; their mean is pass@1.

    Of several answers to a problem that is the mean of theirs; intervals are over problems.

    Text after the first of lm-eval's stop strings is not scored. Generation does not stop there.

    Attributes:
        benchmark: lm-eval's task, of :data:`BENCHMARKS`. `minerva_math500` judges by math-verify,
            the others by the text in a normal form.
        fewshot: worked examples before the problem, 0 to 4; None for lm-eval's own, which are 4 of
            `minerva_math500` and else none.
        attempts: answers to each problem.
        temperature: of the distribution from which they are drawn; 0: the likeliest tokens.
        top_p: the likeliest tokens of this probability together are drawn from.
        seed: of the draws, together with the problem and the number of the attempt.
        data_file: JSON lines in the schema of lm-eval's data set; None: the hub.
        hub_revision: of that data set; None: its main branch.
    """

    headline: ClassVar[str] = "pass@1"
    scorers: ClassVar[tuple[str, ...]] = ("lm-eval", "math-verify", "sympy")

    benchmark: Literal[tuple(BENCHMARKS)] = MINERVA
    fewshot: NonNegativeInt | None = None
    attempts: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    data_file: str | None = None
    hub_revision: str | None = None
    max_new_tokens: PositiveInt = 1024
    _rows: list[dict[str, Any]] = field(init=False, repr=False, default_factory=list)

    def check(self) -> None:
        super().check()
        if self.temperature == 0 and (self.attempts > 1 or self.top_p < 1):
            remedy = "greedy answers are the same every time; give e.g. task.temperature=0.6"
            raise ConfigError("task.temperature", self.temperature, remedy)

    def prepare(self) -> None:
        most = len(self._examples())
        if self.fewshot is not None and self.fewshot > most:
            remedy = f"{self.benchmark} has {most} worked examples"
            raise ConfigError("task.fewshot", self.fewshot, remedy)
        _, *keys = BENCHMARKS[self.benchmark]
        if self.data_file is None:
            data = [definition(self.benchmark).get(f"dataset_{key}") for key in ("path", "name")]
            split = definition(self.benchmark)["test_split"]
            rows = load_hub(*data, split, "task.data_file", self.hub_revision)
        else:
            rows = read_jsonl(self.data_file, "task.data_file", keys)
        self._rows = rows[: self.samples]
        for number, row in enumerate(self._rows, start=1):
            if not isinstance(row.get(keys[0]), str) or not isinstance(row.get(keys[1]), str | int):
                remedy = f"`{keys[0]}` and `{keys[1]}` must be texts"
                raise ConfigError("task.data_file", f"sample {number}", remedy)
            if keys[1] == "solution" and "\\boxed" not in row["solution"]:
                remedy = "`solution` must have the final answer in \\boxed{}"
                raise ConfigError("task.data_file", f"sample {number}", remedy)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        samples = [self._sample(number, row) for number, row in enumerate(self._rows)]
        if self.attempts == 1:
            return samples
        return [
            replace(sample, id=f"{sample.id}-{attempt}")
            for sample in samples
            for attempt in range(self.attempts)
        ]

    def sampling(self, samples: Sequence[Sample]) -> tuple[float, float, list[int]] | None:
        if self.temperature == 0:
            return None
        # A seed for each sample, the same in every process.
        names = (f"{self.seed}/{one.id}".encode() for one in samples)
        digests = (hashlib.sha256(name).digest() for name in names)
        return self.temperature, self.top_p, [int.from_bytes(d[:7], "big") for d in digests]

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        name = f"{self.benchmark}-{number}"
        _, _, compared = BENCHMARKS[self.benchmark]
        shown = self._examples()[: self.fewshot]
        examples = [f"{self._ask(one)} {one['solution']}\n\n" for one in shown]
        return Sample(
            id=name,
            # lm-eval's prompt for a base model; with a chat template it is one message.
            prompt="".join([*examples, self._ask(row)]),
            references=(str(row[compared]),),
            unit=name,
            meta={key: row.get(key) for key in ("unique_id", "subject", "level")},
        )

    def _ask(self, row: dict[str, Any]) -> str:
        if self.benchmark == MINERVA:
            return scorer(MINERVA).doc_to_text(row)
        return render(definition(self.benchmark)["doc_to_text"], **row)

    def _examples(self) -> list[dict[str, Any]]:
        return scorer(MINERVA).list_fewshot_samples() if self.benchmark == MINERVA else []

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        return {"pass@1": score(self.benchmark, record["prediction"], sample.references[0])}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """By subject and level, if the data have them; and accuracy against tokens decoded."""
        found = means_by_meta(("subject", "level"), records, self.headline)
        return found | {"right within tokens": right_within(records, self.headline)}


def right_within(records: Sequence[Record], metric: str) -> dict[str, float]:
    """Accuracy against tokens decoded: the mean score, with longer answers counted as wrong.

    At powers of two, up to the first that is not exceeded by any answer.
    """
    longest = max((record["generated_tokens"] for record in records), default=0)
    found, tokens = {}, 64
    while records:
        right = (one["scores"][metric] * (one["generated_tokens"] <= tokens) for one in records)
        found[f"{tokens}"] = statistics.fmean(right)
        if tokens >= longest:
            break
        tokens *= 2
    return found


def score(benchmark: str, prediction: str, reference: str) -> float:
    """lm-eval's verdict on one answer: `math_verify` of Minerva's, `exact_match` of the others.

    Args:
        reference: the solution of MATH, whose final answer is boxed; the number of AIME.
    """
    stops = definition(benchmark)["generation_kwargs"]["until"]
    prediction = re.split("|".join(map(re.escape, stops)), prediction, maxsplit=1)[0]
    module = scorer(benchmark)
    if benchmark == MINERVA:
        right = module.verify(gold=module.parse(reference), target=module.parse(prediction))
        return float(right)
    doc = {"answer": reference, "solution": reference}
    return float(module.process_results(doc, [prediction])["exact_match"])


def definition(benchmark: str) -> dict[str, Any]:
    """lm-eval's definition of a task."""
    return _lm_eval(benchmark).read(f"{benchmark}.yaml")


@cache
def scorer(benchmark: str) -> ModuleType:
    """lm-eval's module beside the definition.

    Raises:
        ConfigError: a package is missing.
    """
    lm_eval = _lm_eval(benchmark)
    if benchmark != MINERVA:
        return lm_eval.module("utils")
    try:
        import math_verify  # noqa: F401  (it checks the version of its parser)
    except ImportError as error:
        raise lm_eval.missing from error
    # Minerva's module refuses every antlr but 4.11, and Hydra needs 4.9. Only its `is_equiv`, which
    # is not called here, needs that parser.
    with patch("importlib.metadata.version", lambda package: "4.11"):
        return lm_eval.module("utils")


def _lm_eval(benchmark: str) -> LmEval:
    return LmEval(BENCHMARKS[benchmark][0], task="math", extra="math")
