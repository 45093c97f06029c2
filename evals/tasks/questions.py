"""Tasks that can put several questions to one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import PositiveInt

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task, means_by_meta

NUMBER = "question"


@dataclass(kw_only=True)
class QuestionsTask(Task):
    """Samples that share a context differ in their question, whose number is in their `meta`.

    Attributes:
        questions: on each context; `samples` then are contexts.
        asked: ``copies``: each question is put to a copy of the compressed cache; or in one
            ``conversation`` on the same cache.
    """

    questions: PositiveInt = 1
    asked: Literal["copies", "conversation"] = "copies"

    def check(self) -> None:
        super().check()
        if self.questions > 1 and self.batch_size != 1:
            remedy = "contexts with several questions are read one by one"
            raise ConfigError("task.batch_size", self.batch_size, remedy)

    @property
    def conversation(self) -> bool:
        return self.questions > 1 and self.asked == "conversation"

    def together(self, name: str, samples: list[Sample]) -> list[Sample]:
        """Samples of one context, as the questions on it if there are several."""
        if self.questions == 1:
            return samples
        own = {"shared": name, "unit": name}
        return [
            replace(one, id=f"{name}-q{number}", meta=one.meta | {NUMBER: number}, **own)
            for number, one in enumerate(samples, start=1)
        ]

    def by_question(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """The breakdown that shows what a method forgets: score by question number."""
        if self.questions == 1:
            return {}
        return means_by_meta((NUMBER,), records, self.headline)
