"""Speed and memory of a method on prompts of given lengths: what is said does not matter.

The figures that count are every record's own measurements (TTFT, decode tokens per second,
inter-token latency, KV bytes, peak memory); this task only makes prompts of exact lengths.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.schema import Record
from evals.tasks.base import Sample, Task, at_least, distinct

MEASURES = {
    "decode tokens/s": "decode_tokens_per_s",
    "TTFT s": "ttft_s",
    "inter-token p95 ms": "itl_p95_ms",
    "peak memory MB": "memory_peak_nbytes",
}


@dataclass(kw_only=True)
class Throughput(Task):
    """Score: tokens answered (fewer than `max_new_tokens` where the model ended by itself).

    Attributes:
        lengths: prompt tokens; `samples` prompts of each.
        seed: of the random tokens.
    """

    headline: ClassVar[str] = "answer_tokens"
    grouped_by: ClassVar[str] = "prompt tokens"
    timed: ClassVar[bool] = True
    version: ClassVar[int] = 2

    lengths: list[int] = field(default_factory=lambda: [1024])
    samples: int | None = 3
    seed: int = 0
    chat_template: bool = False

    def check(self) -> None:
        super().check()
        if self.samples is None:
            raise ConfigError("task.samples", None, "give the number of prompts of each length")
        if not self.lengths:
            raise ConfigError("task.lengths", self.lengths, "give at least one number of tokens")
        for length in self.lengths:
            at_least(1, "task.lengths", length)
        distinct("task.lengths", self.lengths)
        if self.chat_template:
            raise ConfigError("task.chat_template", True, "prompts are random tokens; leave it out")

    def longest_prompt(self) -> int:
        return max(self.lengths)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        draw = random.Random(self.seed)
        special = set(tokenizer.all_special_ids)
        plain = [token for token in range(len(tokenizer)) if token not in special]
        return [
            Sample(
                id=f"{length}-{number}",
                prompt="",
                references=(),
                group=str(length),
                ids=tuple(draw.choices(plain, k=length)),
            )
            for length in self.lengths
            for number in range(self.samples or 0)
        ]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        raise TypeError(f"{self.name} scores numbers of tokens and not predictions")

    def score_record(self, sample: Sample, record: Record) -> dict[str, float]:
        return {"answer_tokens": float(record["generated_tokens"])}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        by_length: dict[str, list[Record]] = {}
        for record in records:
            by_length.setdefault(record["group"], []).append(record)
        return {
            title: {
                length: statistics.median(values) * (1e-6 if name == "memory_peak_nbytes" else 1)
                for length, rows in by_length.items()
                if (values := [row[name] for row in rows if row.get(name) is not None])
            }
            for title, name in MEASURES.items()
        }
