"""A run under way: what is asked for, and what of it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.records import RunFolder
from evals.results.schema import FORMAT, Record
from evals.results.summary import summarize
from evals.run.plan import Plan
from evals.run.prompt import Prompt


@dataclass
class Work:
    """What the steps of a run (prompts, answers, comparison, summary) hand on.

    Attributes:
        records: by sample id, those that are not of this run's data among them.
        done: ids of the samples that need not run again.
        batch_size: prompts per batch.
    """

    plan: Plan
    folder: RunFolder
    prompts: list[Prompt]
    records: dict[str, Record]
    done: set[str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 1

    @property
    def ordered(self) -> list[Record]:
        """The records that are there, in the order of their prompts."""
        names = (prompt.sample.id for prompt in self.prompts)
        return [self.records[name] for name in names if name in self.records]

    @property
    def stale(self) -> int:
        """Records of other data."""
        return len(self.records.keys() - {prompt.sample.id for prompt in self.prompts})

    def summary(self) -> dict[str, Any]:
        return summarize(self.plan.config, self.plan.task, self.ordered, self.stale)

    def add(self, record: Record) -> None:
        self.folder.append(record)
        self.records[record["id"]] = record

    def score(self, prompt: Prompt, record: Record) -> dict[str, float]:
        """The task's scores of a record, none of which may be NaN or infinite."""
        scores = self.plan.task.score(prompt.sample, record)
        for name, value in scores.items():
            if not math.isfinite(value):
                raise ArithmeticError(f"the score {name} is {value}")
        return scores

    def rescore(self) -> int:
        """Scores answers again whose references, or the version of what scores them, were changed.

        Losses of a text that was read are not on file: it is read again.

        Returns:
            How many it scored.
        """
        count = 0
        for prompt in self.prompts:
            name = prompt.sample.id
            record = self.records.get(name, {})
            if name not in self.done or record.get("sample_sha256") == prompt.sample_sha256:
                continue
            if self.plan.task.mode == "read":
                self.done.remove(name)
                continue
            record = record | identity(prompt)
            if record["status"] == "ok":
                try:
                    record["scores"] = self.score(prompt, record)
                except Exception:  # it is run again, and recorded as what it then is
                    self.done.remove(name)
                    continue
            self.add(record)
            count += 1
        return count


def finished(folder: RunFolder, records: dict[str, Record], prompts: list[Prompt]) -> set[str]:
    """Ids of the samples that need not run again.

    Raises:
        ConfigError: one was asked another prompt.
    """
    done = set()
    for prompt in prompts:
        record = records.get(prompt.sample.id)
        if record is None or record["status"] == "failed":
            continue
        if any(record.get(key) != value for key, value in prompt.question.items()):
            raise ConfigError(
                "output",
                str(folder.path),
                f"sample {prompt.sample.id} had another prompt then; give another output, or"
                " remove the folder",
            )
        done.add(prompt.sample.id)
    return done


def identity(prompt: Prompt) -> Record:
    """The fields of a record that say what it is of."""
    sample = prompt.sample
    return {
        "format": FORMAT,
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
