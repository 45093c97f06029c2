"""RULER (arXiv 2404.06654): its 13 subtasks at any lengths, in the model's own tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, means_by
from evals.tasks.encoding import encode
from evals.tasks.questions import QuestionsTask
from evals.tasks.ruler_data import QA, SUBTASKS, family, modules, read_data
from evals.tasks.ruler_texts import ANSWER, ASKABLE, Drawn, generate, more_questions, move_chain
from evals.tasks.types import SPREADS, Grid

# Those that need no data.
SYNTHETIC = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


@dataclass(kw_only=True)
class Ruler(QuestionsTask):
    """Score: the share of the expected answers that are in the model's, 0..100. Groups: subtasks.

    With several lengths, groups are subtasks at a length. As in the benchmark's tables the score is
    the plain mean over subtasks and lengths. For `qa_*` one of the expected answers is enough.

    Attributes:
        subtasks: which to run; None for all 13.
        lengths: in tokens, of prompt, chat template and answer together.
        samples: of each subtask and length.
        seed: of the draws.
        data_dir: folder of `PaulGrahamEssays.json`, `squad.json` and `hotpotqa.json`, as the
            benchmark's scripts fetch them; None: lm-eval's sources on the net.
        max_new_tokens: None for the benchmark's own.
        spread: of vt, how far apart the assignments of the chain stand. None: where the benchmark's
            generator puts them. Otherwise the first stays, and the others follow: ``cell``, one
            right after the other; ``neighbours``, with a sentence of filler between two;
            ``prompt``, evenly over the rest. Chain and filler of a seed are the same in each.
    """

    headline: ClassVar[str] = "score"
    grouped_by: ClassVar[str] = "subtask"
    scorers: ClassVar[tuple[str, ...]] = ("lm-eval",)

    subtasks: Grid[Literal[SUBTASKS]] | None = SYNTHETIC
    lengths: Grid[Annotated[int, Field(ge=256)]] = (4096,)
    samples: PositiveInt = 20
    seed: int = 0
    data_dir: str | None = None
    max_new_tokens: PositiveInt | None = None
    spread: Literal[SPREADS] | None = None
    _data: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ConfigError("task.data_dir", self.data_dir, "no such folder")
        if self.spread is not None and set(self._subtasks) != {"vt"}:
            remedy = "applies to vt alone; write task.subtasks=[vt]"
            raise ConfigError("task.spread", self.spread, remedy)
        for subtask in self._subtasks:
            if self.questions > 1 and subtask not in ASKABLE:
                remedy = f"{subtask} has one question; several have {', '.join(ASKABLE)}"
                raise ConfigError("task.questions", self.questions, remedy)

    def prepare(self) -> None:
        modules()
        self._data = {name: read_data(name, self.data_dir) for name in self._subtasks}

    @property
    def _subtasks(self) -> Sequence[str]:
        return SUBTASKS if self.subtasks is None else self.subtasks

    def longest_prompt(self) -> int:
        return max(self.lengths)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        chat = self.chat_template and tokenizer.chat_template is not None

        def tokens(text: str, prefix: str = "") -> int:
            return len(encode(tokenizer, text, chat, 2**62, prefix)[0])

        def count(text: str) -> int:
            return len(tokenizer(text)["input_ids"])

        found = []
        for length in self.lengths:
            room = length - (tokens("x") - count("x"))  # without the chat template
            for subtask in self._subtasks:
                data = self._data[subtask]
                texts = generate(subtask, count, length, room, self.samples, self.seed, data)
                for number, drawn in enumerate(texts):
                    name, asked = f"{subtask}-{length}-{number}", [drawn]
                    if self.spread is not None:
                        asked = [move_chain(drawn, self.spread)]
                    if self.questions > 1:
                        seed = f"{self.seed}/{length}/{number}"
                        asked = more_questions(subtask, drawn, self.questions, seed)
                    own = [
                        self._sample(name, subtask, length, one, tokens(one.text, one.prefix))
                        for one in asked
                    ]
                    found += self.together(name, own)
        return found

    def _sample(self, name: str, subtask: str, length: int, drawn: Drawn, taken: int) -> Sample:
        depths = None
        if family(subtask) in ("niah", "vt"):
            places = [drawn.text.find(answer) for answer in drawn.answers]
            depths = [round(100 * place / len(drawn.text), 1) for place in places]
        return Sample(
            id=name,
            prompt=drawn.text,
            references=drawn.answers,
            group=subtask if len(self.lengths) == 1 else f"{subtask} at {length}",
            question=drawn.question,
            answer_prefix=drawn.prefix,
            meta={"subtask": subtask, "length": length, "depths": depths},
            # The sizes do not count everything (such as the beginning of the answer). A prompt near
            # its length leaves less for the answer: together they never exceed the length.
            max_new_tokens=max(1, min(ANSWER[family(subtask)], length - taken)),
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        return {"score": score(sample.meta["subtask"], record["prediction"], sample.references)}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """With several lengths: by length, by subtask, and the benchmark's averages over lengths.

        Averages with a missing part are left out.
        """
        if len(self.lengths) == 1:
            return self.by_question(records)
        cells = means_by(lambda r: (r["meta"]["subtask"], r["meta"]["length"]), records, "score")
        lengths = {
            f"{length}": _mean(cells.get((name, length)) for name in self._subtasks)
            for length in sorted(self.lengths)
        }
        subtasks = {
            name: _mean(cells.get((name, length)) for length in self.lengths)
            for name in self._subtasks
        }
        found = {"length": lengths, "subtask": subtasks, "average": averages([*lengths.values()])}
        known = {
            title: {row: value for row, value in rows.items() if value is not None}
            for title, rows in found.items()
        }
        return known | self.by_question(records)


def score(subtask: str, prediction: str, answers: Sequence[str]) -> float:
    """The benchmark's score of one prediction, 0..100: answers found, whatever their case.

    For `qa_*` one answer is enough, as in the benchmark; lm-eval averages over the answers.
    """
    common = modules().common
    prediction = common.postprocess_pred([prediction])
    if subtask in QA:
        return 100 * max(common.string_match_all(prediction, [[answer]]) for answer in answers)
    return 100 * common.string_match_all(prediction, [answers])


def averages(by_length: Sequence[float | None]) -> dict[str, float | None]:
    """The benchmark's three: plain, and weighted linearly, growing or falling with the length.

    Args:
        by_length: from the shortest to the longest; None: unknown.
    """
    weights = range(1, len(by_length) + 1)
    return {
        "avg": _mean(by_length),
        "wAvg (inc)": _mean(by_length, weights),
        "wAvg (dec)": _mean(by_length, weights[::-1]),
    }


def _mean(values: Iterable[float | None], weights: Sequence[int] | None = None) -> float | None:
    """The weighted mean; None if a value is None."""
    known = list(values)
    if any(value is None for value in known):
        return None
    return statistics.fmean(known, weights)
