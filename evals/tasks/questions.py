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
    """Samples with one context differ in their question; its number is in their `meta`.

    Attributes:
        questions: on each context. If above 1, `samples` are contexts.
        asked: ``copies``: each question is put to a copy of the compressed cache;
            ``conversation``: one after another to the same cache.
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
        """Samples of one context; if there are several, as the questions on it."""
        if self.questions == 1:
            return samples
        own = {"shared": name, "unit": name}
        return [
            replace(one, id=f"{name}-q{number}", meta=one.meta | {NUMBER: number}, **own)
            for number, one in enumerate(samples, start=1)
        ]

    def by_question(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Score by question number, which shows what a method has evicted."""
        if self.questions == 1:
            return {}
        return means_by_meta((NUMBER,), records, self.headline)
