"""Tasks that can put several questions to one context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from buzz.errors import ConfigError
from evals.results.schema import Record
from evals.results.statistics import means_by
from evals.tasks.base import Task, at_least, one_of

NUMBER = "question"


@dataclass(kw_only=True)
class QuestionsTask(Task):
    """Samples that share a context differ in their question, whose number is in their `meta`.

    Attributes:
        questions: on each context; `samples` then are contexts.
        asked: ``copies``: each question is put to a copy of the compressed cache; or in one
            ``conversation`` on the same cache.
    """

    questions: int = 1
    asked: str = "copies"

    def check(self) -> None:
        super().check()
        at_least(1, "task.questions", self.questions)
        one_of("task.asked", self.asked, ("copies", "conversation"))
        if self.questions > 1 and self.batch_size != 1:
            remedy = "contexts with several questions are read one by one"
            raise ConfigError("task.batch_size", self.batch_size, remedy)

    @property
    def conversation(self) -> bool:
        return self.questions > 1 and self.asked == "conversation"

    def by_question(self, records: Iterable[Record]) -> dict[str, dict[str, float]]:
        """The breakdown that shows what a method forgets: score by question number."""
        if self.questions == 1:
            return {}
        return {NUMBER: means_by(NUMBER, records, self.headline)}
