"""The state of one row of a job: a method under a setting, and its records so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buzz import EvictionCache
from buzz.errors import ConfigError
from buzz.policy import parameters
from evals.results.folder import SettingFolder, sha256
from evals.results.record import FORMAT, Record
from evals.run.plan import Plan
from evals.run.prompts import Prompt


@dataclass
class Row:
    """A method under a setting.

    Attributes:
        file: where its records are written; None: nowhere, as another process writes them.
        records: by sample id, including those of other data.
        done: ids of the samples that need no answer.
        error: why it stopped.
        warm: whether it has run alone in this process.
        new: whether a record was added.
        uncompared: comparisons with the full cache that failed.
        cache: an empty one that its next batch may use again.
    """

    plan: Plan
    folder: SettingFolder
    file: Path | None
    records: dict[str, Record]
    done: set[str] = field(default_factory=set)
    error: Exception | None = None
    warm: bool = False
    new: bool = False
    uncompared: int = 0
    cache: EvictionCache | None = None

    def begin(self, prompts: Iterable[Prompt]) -> int:
        """Finds the samples that are done. Scores answers again if references or scoring changed.

        A text that was read is read again then, as its losses are not stored.

        Returns:
            How many were scored again.

        Raises:
            ConfigError: a sample's record is of another prompt.
        """
        again = 0
        for prompt in prompts:
            name = prompt.sample.id
            record = self.records.get(name)
            if record is None or record["status"] == "failed":
                continue
            if any(record.get(key) != value for key, value in prompt.question.items()):
                remedy = "give another output, or remove the folder"
                raise ConfigError(
                    "output",
                    str(self.file or self.folder.path),
                    f"sample {name} had another prompt then; {remedy}",
                )
            self.done.add(name)
            if record["sample_sha256"] != prompt.sample_sha256:
                again += self._rescore(prompt, record)
        return again

    def _rescore(self, prompt: Prompt, record: Record) -> bool:
        if self.plan.task.mode == "read":
            self.done.remove(prompt.sample.id)
            return False
        record = record | of_sample(prompt)
        if record["status"] == "ok":
            try:
                record["scores"] = self.score(prompt, record)
            except Exception:  # the sample runs again, and that is recorded
                self.done.remove(prompt.sample.id)
                return False
        self.add(record)
        return True

    def add(self, record: Record) -> None:
        if self.file is not None:
            self.folder.append(self.file, record)
        self.records[record["id"]] = record
        self.done.add(record["id"])
        self.new = True

    def score(self, prompt: Prompt, record: Record) -> dict[str, float]:
        """The task's scores of a record, none of which may be NaN or infinite."""
        scores = self.plan.task.score(prompt.sample, record)
        for name, value in scores.items():
            if not math.isfinite(value):
                raise ArithmeticError(f"the score {name} is {value}")
        return scores

    def answer(self, prompt: Prompt) -> list[int] | None:
        """The answer's tokens, if it gave one."""
        record = self.records.get(prompt.sample.id, {})
        return record.get("tokens") if prompt.sample.id in self.done else None

    def compared(self, prompt: Prompt, full: Row) -> bool:
        """Whether the sample was compared with the full cache's answer, as far as both have one."""
        own, theirs = self.records.get(prompt.sample.id, {}), full.answer(prompt)
        if own.get("status", "ok") != "ok" or prompt.sample.id in full.done and not theirs:
            return True
        return theirs is not None and own.get("reference_sha256") == sha256(theirs)

    def of(self, prompts: Iterable[Prompt]) -> list[Record]:
        """The existing records of some prompts, in their order."""
        names = (prompt.sample.id for prompt in prompts)
        return [self.records[name] for name in names if name in self.records]

    def frame(self, prompt: Prompt, batch: Iterable[Prompt]) -> dict[str, Any]:
        """The fields of a record that name row and sample.

        The budget of a batch is that of its shortest prompt.
        """
        policy, entries = self.plan.fit(min(one.context for one in batch))
        return {
            "format": FORMAT,
            **self.plan.identity,
            **of_sample(prompt),
            "policy": parameters(policy),
            "budget_entries": entries,
            "rows": 1,
            "batch_size": 1,
        }


def of_sample(prompt: Prompt) -> Record:
    """The fields of a record that name its sample."""
    sample = prompt.sample
    return {
        "id": sample.id,
        "group": sample.group,
        "unit": sample.unit,
        "meta": sample.meta,
        "references": list(sample.references),
        **prompt.question,
        "sample_sha256": prompt.sample_sha256,
        "prompt_tokens": len(prompt.ids),
        "truncated_tokens": prompt.truncated,
        "chat_template": prompt.chat,
        **({"context_tokens": prompt.context} if prompt.before else {}),
    }
