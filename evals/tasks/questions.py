"""Tasks that can put several questions to one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Task, means_by_meta

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

    def by_question(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """The breakdown that shows what a method forgets: score by question number."""
        if self.questions == 1:
            return {}
        return means_by_meta((NUMBER,), records, self.headline)
