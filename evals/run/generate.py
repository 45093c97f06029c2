"""One batch through stock `model.generate`, measured.

The measurements come from a stopping criterion, which `generate` calls after each new token. After
k tokens the cache has seen the prompt and k - 1 of them: the last is never fed back.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
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
from evals.run.faults import NotFinite
from evals.run.lengths import Lengths
from evals.run.memory import memory_peak, reset_memory_peak
from evals.run.prompts import Prompt
from evals.run.sampling import Sampling

# Fields of records whose context was read before the question.
OF_QUESTIONS = ("question_s", "context_peak_nbytes", "question_peak_nbytes")


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What it took to answer a prompt, or to read a text.

    Timings and memory peaks are None for a method that shared its pass with others.

    Attributes:
        prompt_tokens: without padding.
        lengths: cache entries per layer and KV head after each step, from the one that completes
            the context; the mean over layers where they hold different numbers.
        evictions: steps that evicted.
        entry_nbytes: bytes of K and V of one entry over the layers that evict.
        window_nbytes: after each step, bytes of layers that no method evicts from: windows, chunks,
            recurrent states.
        allocated_nbytes: the most that buffers took after any step, as a row's share of the batch:
            keys and values, with positions, scores, kept originals and spare slots.
        ttft_s: seconds to the first token, the batch's prefill included.
        decode_tokens_per_s: of this row alone; None for answers of one token.
        itl_p50_ms, itl_p95_ms: inter-token latency percentiles.
        memory_peak_nbytes: device memory allocated at the peak (CUDA) or resident memory of the
            process (CPU), model included.
        question_s: seconds from the question to the first token, if the context was compressed
            before.
        context_peak_nbytes, question_peak_nbytes: memory peaks while the context is read, and from
            the question on.
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

        Bytes are of all layers. If some layers do not evict, those of the others, to which a budget
        applies, are added.
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


# Fields of records whose method ran alone.
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
        """Of a model. A stop string acts through its last token, as in LongBench."""
        own = model.generation_config.eos_token_id
        eos = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
        last = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in stop)
        return cls(frozenset(token for token in eos if token is not None), frozenset(last))

    @property
    def all(self) -> frozenset[int]:
        return self.eos | self.stop

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to the one that ends them, inclusive."""
        end = next((i for i, token in enumerate(tokens) if token in self.all), len(tokens))
        return tokens[: end + 1]

    def reason(self, answer: Sequence[int]) -> str:
        """Why an answer ended, by its last token: ``eos``, ``stop`` or ``length``."""
        last = answer[-1]
        return "eos" if last in self.eos else "stop" if last in self.stop else "length"


class Trace(StoppingCriteria):
    """Records the time and the cache lengths of each step; never stops the generation."""

    def __init__(self, lengths: Lengths) -> None:
        self.times: list[float] = []
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.lengths.note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Records, on the device, whether each row's highest logit is finite; changes nothing.

    The maximum is NaN if any logit is NaN. Single logits of -inf are allowed: they forbid tokens.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.amax(-1).isfinite())
        return scores


@dataclass
class Reading:
    """A cache that has read the beginning of prompts, if anything, and what that took.

    Attributes:
        lengths: what it held after each step.
        steps: of each row, tokens fed by each step.
        seconds, peak: time, and memory in bytes at the peak.
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
        """Adds the steps of a question and its answer, whose last token is not fed.

        Args:
            prompt: tokens of the prompt, with all that was read before.
            answer: tokens of the answer.
        """
        (steps,) = self.steps
        steps += [prompt - sum(steps)] + [1] * (answer - 1)
        self.seconds = 0.0


def read(
    model: PreTrainedModel,
    inputs: Tensor,
    policy: Policy,
    later: Sequence[int],
    cache_options: dict[str, Any] | None = None,
    chunk: int | None = None,
    cache: EvictionCache | None = None,
) -> Reading:
    """Reads prompts up to their last step, or up to that step's last chunk.

    Args:
        inputs: of :func:`left_padded`.
        later: tokens of the steps behind the first; if there are none, that is the last.
        chunk: tokens of the chunks in which the first step is read, as if they were one; None: in
            one piece, as it is if a whole chunk would be padding.
        cache: an empty one to read them with; None: a new one.
    """
    device, (ids, mask) = model.device, inputs
    if cache is None:
        cache = EvictionCache(model, policy, **(cache_options or {}))
    lengths = Lengths(cache, policy)
    first = ids.shape[1] - sum(later)
    chunked = chunk and chunk < first and mask[:, chunk - 1].all()
    chunks = range(chunk, first, chunk) if chunked else ()
    if chunks:
        cache.hold_until = first
    reset_memory_peak(device)
    synchronize(device)
    start, done = time.perf_counter(), 0
    for end in [*chunks, *(accumulate(later[:-1], initial=first) if later else ())]:
        forward(model, cache, ids[:, done:end], mask[:, :end], 1)
        if end >= first:
            lengths.note()
        done = end
    synchronize(device)
    seconds = time.perf_counter() - start
    tokens = mask.sum(-1).tolist()
    steps = [[row - sum(later), *later[:-1]] if later else [] for row in tokens]
    return Reading(cache, lengths, steps, seconds, memory_peak(device))


def forward(
    model: PreTrainedModel, cache: EvictionCache, ids: Tensor, mask: Tensor | None, keep: int
) -> Tensor:
    """Logits [rows, keep, vocab] of a step's last tokens.

    Args:
        ids: int64 [rows, new].
        mask: int64 [rows, seen + new], 0 in padding; None if there is none.
    """
    given: dict[str, Any] = {CACHE_ARGUMENT: cache}
    if mask is not None:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.inference_mode():
        return model(ids, attention_mask=mask, **given, logits_to_keep=keep).logits


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
        later: tokens of the steps behind the first in which every prompt is read; none: it is read
            in one step.
        reading: a cache that has read the beginning of the prompts; None: a new one.
        sampling: None: the likeliest tokens.
        chunk: tokens of the chunks in which a prompt is read; None: it is read as one.
        cache: an empty one to answer with; None: a new one.

    Raises:
        LengthMismatch: the cache held another number of entries than the length recurrence says.
        NotFinite: logits behind an answer were NaN or infinite.
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
        latencies = np.diff(trace.times[:count])
        p50, p95 = np.percentile(latencies, [50, 95]) * 1e3 if count > 1 else (None, None)
        generations.append(
            Generation(
                text=tokenizer.decode(answer, skip_special_tokens=True),
                tokens=answer,
                prompt_tokens=len(prompt),
                generated_tokens=count,
                stop_reason=ends.reason(answer),
                **trace.lengths.measured(row, steps, earlier),
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


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    policy: Policy,
    cache_options: dict[str, Any],
    conversation: bool,
    chunk: int | None = None,
    cache: EvictionCache | None = None,
) -> list[Generation]:
    """Answers to the questions on one context, which is read and compressed once.

    In a `conversation` they follow each other on one cache: what an earlier question and its answer
    made a method evict is gone for the later ones. Otherwise each is put to a copy of the cache.

    `ttft_s` counts the reading of the context, once for every copy; in a conversation only with
    its first question.

    Args:
        chunk: tokens of the chunks in which the context is read; None: it is read as one.
        cache: an empty one for a conversation, or whose buffers copies use; None: new ones.

    Raises:
        LengthMismatch, NotFinite: as :func:`generate`.
    """
    ids, eos = prompts[0].ids, Ends.of(model, tokenizer).eos
    inputs = left_padded([ids], tokenizer.pad_token_id).to(model.device)
    of_all = cache if conversation else None
    reading = read(model, inputs, policy, prompts[0].later, cache_options, chunk, of_all)
    found: list[Generation] = []
    for prompt in prompts:
        if not conversation:
            ids, own = prompt.ids, reading.copy()
            if cache is not None:
                own.cache.take_buffers(cache)
        else:
            own = reading
            if found:
                said, turn = found[-1].tokens, list(prompt.turn)
                if said[-1] in eos and turn[:1] == said[-1:]:
                    turn = turn[1:]  # the template ends an answer, too
                ids = [*ids, *said, *turn]
        found += generate(
            model,
            tokenizer,
            [ids],
            policy,
            prompt.max_new_tokens,
            prompt.sample.stop,
            reading=own,
        )
        if conversation:
            reading.go_on(len(ids), found[-1].generated_tokens)
        elif cache is not None:
            cache.take_buffers(own.cache)
    return found


def left_padded(prompts: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """Token ids and attention mask, stacked: int64 [2, rows, longest]."""
    longest = max(map(len, prompts))
    ids = [[*[pad or 0] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor([ids, mask])


@contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Hides a model's own generation settings from `model.generate`.

    It would take from them whatever a call does not set: penalties, biases, beams, time limits.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def synchronize(device: torch.device) -> None:
    """Waits until the device has done its work, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
