"""Speed and memory of a method on prompts of given lengths: what is said does not matter.

The figures that count are every record's own measurements (TTFT, decode tokens per second,
inter-token latency, KV bytes, peak memory); this task only makes prompts of exact lengths.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.schema import Record
from evals.tasks.base import Sample, Task
from evals.tasks.types import Grid, Size, nbytes

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
        batch_size: prompts per batch; ``max``: as many as fit into `kv_limit`.
        kv_limit: of the keys and values of a batch, such as ``512MB``, at the most entries that the
            method ever holds between two steps.
    """

    headline: ClassVar[str] = "answer_tokens"
    grouped_by: ClassVar[str] = "prompt tokens"
    timed: ClassVar[bool] = True
    version: ClassVar[int] = 2

    lengths: Grid[PositiveInt] = (1024,)
    samples: PositiveInt = 3
    seed: int = 0
    chat_template: Literal[False] = False  # prompts are random tokens
    batch_size: PositiveInt | Literal["max"] = 1
    kv_limit: Size | None = None

    def check(self) -> None:
        super().check()
        together = "task.batch_size=max and task.kv_limit=512MB go together"
        if self.batch_size == "max" and self.kv_limit is None:
            raise ConfigError("task.kv_limit", None, together)
        if self.batch_size != "max" and self.kv_limit is not None:
            raise ConfigError("task.batch_size", self.batch_size, together)
        if self.kv_limit and len(self.lengths) > 1:
            remedy = "give one: each has its own largest batch"
            raise ConfigError("task.lengths", list(self.lengths), remedy)

    @property
    def room(self) -> int | None:
        return None if self.kv_limit is None else nbytes(self.kv_limit)

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
            for number in range(self.samples)
        ]

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
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
