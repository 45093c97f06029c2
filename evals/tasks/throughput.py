"""Speed and memory of methods on random prompts of given lengths.

This task only makes the prompts. What it is run for are the measurements in each record
(:mod:`evals.run.speed`): TTFT, time per token, share of evictions, KV bytes, peak memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task
from evals.tasks.types import Grid, Size, nbytes


@dataclass(kw_only=True)
class Throughput(Task):
    """Score: tokens of the answer, which are always `max_new_tokens`.

    Attributes:
        lengths: prompt tokens; `samples` prompts of each.
        seed: of the random tokens.
        batch_size: prompts per batch; ``max``: as many as fit into `kv_limit`.
        kv_limit: the most that keys and values of a batch may take between two steps, such as
            ``512MB``.
        prefill_chunk: tokens of a step in which a prompt is read, with an eviction after each;
            None: all at once.
        hold: with `prefill_chunk`: evict nothing before the prompt's end.
        paired: methods take turns, one step each, for machines that are slower at times.
    """

    headline: ClassVar[str] = "answer_tokens"
    grouped_by: ClassVar[str] = "prompt tokens"
    timed: ClassVar[bool] = True
    version: ClassVar[int] = 3
    of_rows: ClassVar[tuple[str, ...]] = ("prefill_chunk", "hold")

    lengths: Grid[PositiveInt] = (1024,)
    samples: PositiveInt = 3
    seed: int = 0
    chat_template: Literal[False] = False  # prompts are random tokens
    batch_size: PositiveInt | Literal["max"] = 1
    kv_limit: Size | None = None
    prefill_chunk: PositiveInt | None = None
    hold: bool = False
    paired: bool = False

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

        if self.hold and self.prefill_chunk is None:
            remedy = "applies to prompts in chunks; write task.prefill_chunk=1024, too"
            raise ConfigError("task.hold", True, remedy)
        if self.paired and self.batch_size != 1:
            remedy = "methods take their steps in turn on one prompt; write 1"
            raise ConfigError("task.batch_size", self.batch_size, remedy)

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
