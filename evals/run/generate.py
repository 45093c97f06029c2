"""One batch through stock `model.generate`, measured.

The measurements come from a stopping criterion, which `generate` calls after each new token. After
k tokens the cache has seen the prompt and k - 1 of them: the last is never fed back.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from evals.results.folder import arithmetic_runs
from evals.results.record import Record
from evals.run.compress import read_context
from evals.run.faults import NotFinite
from evals.run.lengths import Lengths
from evals.run.memory import memory_peak, reset_memory_peak
from evals.run.sampling import Sampling

# Of a record whose context was read before its question.
OF_QUESTIONS = ("question_s", "context_peak_nbytes", "question_peak_nbytes")


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What it cost to answer a prompt, or to read a text.

    Attributes:
        prompt_tokens: without padding.
        lengths: cache entries per layer and KV head after each step of this row, of a prompt that
            is read in several from the one that ends its context on; of a method whose layers hold
            different numbers, their mean.
        evictions: steps that evicted, over the whole batch's decoding.
        entry_nbytes: bytes of K and V of one entry over the layers that evict.
        window_nbytes: bytes after each step of what no eviction thins: windows, chunks, recurrent
            states.
        allocated_nbytes: a row's share of the most that the batch's buffers took after any step:
            keys and values, with positions, scores, kept originals and spare slots.
        ttft_s: seconds to the first token, the batch's prefill included; None, as are all timings
            and memory peaks, of a method that shared its pass with others.
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
    window_nbytes: list[int]
    allocated_nbytes: int
    ttft_s: float | None = None
    decode_tokens_per_s: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    memory_peak_nbytes: int | None = None
    question_s: float | None = None
    context_peak_nbytes: int | None = None
    question_peak_nbytes: int | None = None

    def record(self) -> Record:
        """The fields of a record that were measured.

        Bytes are those of all layers; those of the layers that evict, which a budget is of, are
        there too if not all do.
        """
        record = dataclasses.asdict(self)
        missing = OF_QUESTIONS if self.question_s is None else ()
        for name in TIMINGS if self.ttft_s is None else missing:
            del record[name]
        record["timed"] = self.ttft_s is not None
        lengths, entry = record.pop("lengths"), record.pop("entry_nbytes")
        windows = record.pop("window_nbytes")
        average, peak = statistics.fmean(lengths), max(lengths)
        held = [entry * own + beside for own, beside in zip(lengths, windows, strict=True)]
        if any(windows):
            record["kv_evicting_nbytes_mean"] = average * entry
            record["kv_evicting_nbytes_peak"] = peak * entry
        return record | {
            "kv_entries_mean": average,
            "kv_entries_peak": peak,
            "kv_nbytes_mean": average * entry + statistics.fmean(windows),
            "kv_nbytes_peak": max(held),
            "trace": arithmetic_runs([round(held) for held in lengths]),
        }


# Of a record whose method ran alone.
TIMINGS = tuple(one.name for one in dataclasses.fields(Measurements) if one.default is None)


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


@dataclass(frozen=True)
class Ends:
    """The tokens that end an answer.

    Attributes:
        eos: end-of-sequence tokens.
        stop: the last tokens of stop strings, which do not end an answer as its first token.
    """

    eos: frozenset[int]
    stop: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
    ) -> Ends:
        """As LongBench does: a stop string acts through its last token."""
        last = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in stop)
        return cls(frozenset(eos_ids(model, tokenizer)), frozenset(last))

    @property
    def all(self) -> frozenset[int]:
        return self.eos | self.stop

    def cut(self, tokens: list[int]) -> list[int]:
        """Up to the token that ends them, that one included."""
        end = next((i for i, token in enumerate(tokens) if token in self.all), len(tokens))
        return tokens[: end + 1]

    def reason(self, answer: Sequence[int]) -> str:
        """Why an answer ended, by its last token: ``eos``, ``stop`` or ``length``."""
        last = answer[-1]
        return "eos" if last in self.eos else "stop" if last in self.stop else "length"


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
        seconds, peak: time, and bytes of memory at the peak.
    """

    cache: EvictionCache
    lengths: Lengths
    steps: list[list[int]]
    seconds: float
    peak: int

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
    chunk: int | None = None,
    cache: EvictionCache | None = None,
) -> Reading:
    """Reads prompts up to their last step, or its last chunk.

    Args:
        inputs: of :func:`left_padded`.
        later, chunk: as of :func:`evals.run.compress.read_context`.
        cache: an empty one to read them with; None: a new one.
    """
    device = model.device
    if cache is None:
        cache = EvictionCache(model, policy, **(cache_options or {}))
    lengths = Lengths(cache, policy)
    reset_memory_peak(device)
    synchronize(device)
    start = time.perf_counter()
    read_context(model, cache, *inputs, later, lengths.note, chunk)
    synchronize(device)
    seconds = time.perf_counter() - start
    tokens = inputs[1].sum(-1).tolist()
    steps = [[row - sum(later), *later[:-1]] if later else [] for row in tokens]
    return Reading(cache, lengths, steps, seconds, memory_peak(device))


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
    chunk: int | None = None,
    cache: EvictionCache | None = None,
) -> list[Generation]:
    """Answers to a batch of token ids, left-padded, through an :class:`EvictionCache`.

    Args:
        later: tokens of the steps behind the first in which every prompt is read, see
            :mod:`evals.run.compress`; none: it is read as one.
        reading: a cache that has read the prompts' beginning, instead of a new one.
        sampling: None: the likeliest tokens.
        chunk: tokens of the chunks in which a prompt is read; None: it is read as one.
        cache: an empty one to answer with; None: a new one.

    Raises:
        LengthMismatch: the cache held another number of entries than the policy's recurrence says.
        NotFinite: an answer was made of NaN or infinite logits.
    """
    device = model.device
    finite = _Finite()
    ends = Ends.of(model, tokenizer, stop)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=1 if ends.stop else None,
        eos_token_id=sorted(ends.all) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs = left_padded(prompts, tokenizer.pad_token_id).to(device)
    if reading is None:
        reading = read(model, inputs, policy, later, cache_options, chunk, cache)
    cache, split = reading.cache, bool(reading.steps[0])
    trace = Trace(reading.lengths)
    processors = [finite] if sampling is None else [finite, *sampling.processors(device)]
    reset_memory_peak(device)
    synchronize(device)
    asked = time.perf_counter()
    with torch.inference_mode(), without_settings(model):
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
        answer = ends.cut(answer)
        count = len(answer)
        if False in sound[row][:count]:
            raise NotFinite("the logits were", sound[row].index(False), model.dtype)
        before = reading.steps[row]
        steps = [*before, len(prompt) - sum(before)] + [1] * (count - 1)
        earlier = max(0, len(before) - 1)  # steps before the one that ends the context
        lengths = trace.lengths.verified(row, steps)[earlier:]
        seen = list(itertools.accumulate(steps))[earlier:]
        latencies = np.diff(trace.times[:count])
        p50, p95 = np.percentile(latencies, [50, 95]) * 1e3 if count > 1 else (None, None)
        generations.append(
            Generation(
                text=tokenizer.decode(answer, skip_special_tokens=True),
                tokens=answer,
                prompt_tokens=len(prompt),
                generated_tokens=count,
                stop_reason=ends.reason(answer),
                lengths=lengths,
                evictions=cache.evictions[row],
                entry_nbytes=cache.entry_nbytes,
                window_nbytes=[cache.window_nbytes(tokens) for tokens in seen],
                allocated_nbytes=trace.lengths.allocated() // len(prompts),
                ttft_s=reading.seconds + trace.times[0] - asked,
                decode_tokens_per_s=float(1 / latencies.mean()) if count > 1 else None,
                itl_p50_ms=p50,
                itl_p95_ms=p95,
                memory_peak_nbytes=max(peak, reading.peak),
                question_s=trace.times[0] - asked if split else None,
                context_peak_nbytes=reading.peak if split else None,
                question_peak_nbytes=peak if split else None,
            )
        )
    return generations


def left_padded(prompts: Sequence[Sequence[int]], pad: int | None) -> torch.Tensor:
    """Token ids and attention mask, stacked: int64 [2, rows, longest]."""
    longest = max(map(len, prompts))
    ids = [[*[pad or 0] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor([ids, mask])


@contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """`model.generate` does what it is told, whatever the model's own generation settings are.

    They fill in all that a call leaves unsaid: penalties, biases, beams, time limits.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}


def synchronize(device: torch.device) -> None:
    """Waits for what the device has been given to do, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
