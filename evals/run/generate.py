"""One batch through stock `model.generate`, measured.

The measurements come from a stopping criterion, which `generate` calls after each new token. After
k tokens the cache has seen the prompt and k - 1 of them: the last is never fed back.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from buzz import CACHE_ARGUMENT, EvictionCache, Policy
from evals.results.records import arithmetic_runs
from evals.results.schema import Record
from evals.run.compress import read_context
from evals.run.faults import NotFinite
from evals.run.lengths import Lengths
from evals.run.memory import memory_peak, reset_memory_peak
from evals.run.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What it cost to answer a prompt, or to read a text.

    Attributes:
        prompt_tokens: without padding.
        lengths: cache entries per layer and KV head after each step of this row, of a prompt that
            is read in several from the one that ends its context on; of a method whose layers hold
            different numbers, their mean.
        evictions: steps that evicted, over the whole batch's decoding.
        entry_nbytes: bytes of K and V of one entry over all layers.
        allocated_nbytes: a row's share of the batch's buffers at the end: keys and values, with
            positions, scores, kept originals and spare slots.
        ttft_s: seconds to the first token, the batch's prefill included.
        decode_tokens_per_s: of this row alone; None for answers of one token.
        itl_p50_ms, itl_p95_ms: inter-token latency percentiles.
        memory_peak_nbytes: device memory allocated at the peak (CUDA) or resident memory of the
            process (CPU), model included.
        question_s: of a prompt whose context is compressed before its question is read: seconds
            from then to the first token.
        context_peak_nbytes, question_peak_nbytes: the memory peak, likewise, of reading the
            context, and from the question on.
    """

    prompt_tokens: int
    lengths: list[float]
    evictions: int
    entry_nbytes: int
    allocated_nbytes: int
    ttft_s: float
    decode_tokens_per_s: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    memory_peak_nbytes: int
    question_s: float | None = None
    context_peak_nbytes: int | None = None
    question_peak_nbytes: int | None = None

    def record(self) -> Record:
        """The fields of a record that were measured."""
        record = dataclasses.asdict(self)
        if self.question_s is None:
            for name in ("question_s", "context_peak_nbytes", "question_peak_nbytes"):
                del record[name]
        lengths, entry = record.pop("lengths"), record.pop("entry_nbytes")
        average, peak = statistics.fmean(lengths), max(lengths)
        return record | {
            "kv_entries_mean": average,
            "kv_entries_peak": peak,
            "kv_nbytes_mean": average * entry,
            "kv_nbytes_peak": peak * entry,
            "trace": arithmetic_runs([round(held) for held in lengths]),
        }


@dataclass(frozen=True, kw_only=True)
class Generation(Measurements):
    """An answer, and what it cost.

    Attributes:
        text: without special tokens.
        tokens: its token ids, the one that ended it included.
        generated_tokens: how many; the end-of-sequence token counts.
        stop_reason: ``eos``, ``stop`` (a stop string) or ``length``.
    """

    text: str
    tokens: list[int]
    generated_tokens: int
    stop_reason: str

    def record(self) -> Record:
        record = super().record()
        return {"prediction": record.pop("text")} | record


class Trace(StoppingCriteria):
    """Never stops; notes the time and the cache lengths of each step."""

    def __init__(self, lengths: Lengths) -> None:
        self.times: list[float] = []
        self.lengths = lengths

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.lengths.note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Changes nothing; notes, on the device, which rows' likeliest token has a finite logit.

    The maximum is NaN if any logit is; single logits of -inf are how tokens are forbidden.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.amax(-1).isfinite())
        return scores


@dataclass
class Reading:
    """A cache that has read the beginning of a prompt, or nothing yet, and what that took.

    Attributes:
        lengths: what it held after each step.
        steps: by row, tokens fed by each step.
        seconds, peak: time, and bytes of memory at the peak; None of nothing.
    """

    cache: EvictionCache
    lengths: Lengths
    steps: list[list[int]]
    seconds: float
    peak: int | None

    def copy(self) -> Reading:
        cache = self.cache.copy()
        steps = [list(row) for row in self.steps]
        return Reading(cache, self.lengths.of_copy(cache), steps, self.seconds, self.peak)

    def go_on(self, prompt: int, answer: int) -> None:
        """Count in a prompt of one row, with what was read before, and all but its answer's end."""
        (steps,) = self.steps
        steps += [prompt - sum(steps)] + [1] * (answer - 1)
        self.seconds = 0.0


def read(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    policy: Policy,
    later: Sequence[int],
    cache_options: dict[str, Any] | None = None,
) -> Reading:
    """Reads all steps of prompts but the last, with a new cache.

    Args:
        inputs: of :func:`left_padded`.
        later: tokens of the steps behind the first; if there are none, nothing is read.
    """
    device = model.device
    cache = EvictionCache(model, policy, **(cache_options or {}))
    lengths = Lengths(cache, policy)
    reset_memory_peak(device)
    synchronize(device)
    start = time.perf_counter()
    read_context(model, cache, *inputs, later, lengths.note)
    synchronize(device)
    seconds = time.perf_counter() - start
    tokens = inputs[1].sum(-1).tolist()
    steps = [[row - sum(later), *later[:-1]] if later else [] for row in tokens]
    return Reading(cache, lengths, steps, seconds, memory_peak(device) if later else None)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    policy: Policy,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    cache_options: dict[str, Any] | None = None,
    later: Sequence[int] = (),
    reading: Reading | None = None,
    sampling: Sampling | None = None,
) -> list[Generation]:
    """Answers to a batch of token ids, left-padded, through an :class:`EvictionCache`.

    Args:
        later: tokens of the steps behind the first in which every prompt is read, see
            :mod:`evals.run.compress`; none: it is read as one.
        reading: a cache that has read the prompts' beginning, instead of a new one.
        sampling: None: the likeliest tokens.

    Raises:
        LengthMismatch: the cache held another number of entries than the policy's recurrence says.
        NotFinite: an answer was made of NaN or infinite logits.
    """
    device = model.device
    finite = _Finite()
    ends_answer = eos_ids(model, tokenizer)
    # As LongBench does: a stop string acts through its last token.
    stop_ids = {tokenizer.encode(text, add_special_tokens=False)[-1] for text in stop}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=1 if stop_ids else None,
        eos_token_id=sorted(ends_answer | stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs = left_padded(prompts, tokenizer.pad_token_id).to(device)
    if reading is None:
        reading = read(model, inputs, policy, later, cache_options)
    cache, split = reading.cache, reading.peak is not None
    trace = Trace(reading.lengths)
    processors = [finite] if sampling is None else [finite, *sampling.processors(device)]
    reset_memory_peak(device)
    synchronize(device)
    asked = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs[0],
            attention_mask=inputs[1],
            **{CACHE_ARGUMENT: cache},
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([trace]),
        )
    peak = memory_peak(device)
    answers = output[:, inputs.shape[-1] :].tolist()
    sound = torch.stack(finite.steps, dim=1).tolist()

    generations = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ends = (i for i, token in enumerate(answer) if token in ends_answer | stop_ids)
        end = next(ends, None)
        count = len(answer) if end is None else end + 1
        if False in sound[row][:count]:
            raise NotFinite("the logits were", sound[row].index(False), model.dtype)
        reason = "length" if end is None else "eos" if answer[end] in ends_answer else "stop"
        before = reading.steps[row]
        steps = [*before, len(prompt) - sum(before)] + [1] * (count - 1)
        lengths = trace.lengths.verified(row, steps)
        latencies = np.diff(trace.times[:count])
        p50, p95 = np.percentile(latencies, [50, 95]) * 1e3 if count > 1 else (None, None)
        generations.append(
            Generation(
                text=tokenizer.decode(answer[:count], skip_special_tokens=True),
                tokens=answer[:count],
                prompt_tokens=len(prompt),
                generated_tokens=count,
                stop_reason=reason,
                lengths=lengths[max(0, len(before) - 1) :],
                evictions=cache.evictions[row],
                entry_nbytes=cache.entry_nbytes,
                allocated_nbytes=cache.nbytes(allocated=True) // len(prompts),
                ttft_s=(reading.seconds if split else 0) + trace.times[0] - asked,
                decode_tokens_per_s=float(1 / latencies.mean()) if count > 1 else None,
                itl_p50_ms=p50,
                itl_p95_ms=p95,
                memory_peak_nbytes=max(peak, reading.peak or 0),
                question_s=trace.times[0] - asked if split else None,
                context_peak_nbytes=reading.peak,
                question_peak_nbytes=peak if split else None,
            )
        )
    return generations


def left_padded(prompts: list[list[int]], pad: int) -> torch.Tensor:
    """Token ids and attention mask, stacked: int64 [2, rows, longest]."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor([ids, mask])


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}


def synchronize(device: torch.device) -> None:
    """Waits for what the device has been given to do, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
