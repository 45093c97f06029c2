"""Timed steps of methods on one batch: what `task=throughput` runs instead of `generate`.

Between two readings of the clock the model alone runs. Several methods take their steps in turn, so
that a machine that is slower at times affects all of them. Besides this project's caches there is
transformers' own (`method=stock`), on PyTorch's attention.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, EvictionCache, Policy
from buzz.layer import EvictionLayer
from evals.results.record import Record
from evals.run.faults import LengthMismatch, NotFinite
from evals.run.generate import Measurements, synchronize
from evals.run.lengths import Lengths
from evals.run.memory import (
    free_nbytes,
    memory_in_use,
    memory_peak,
    reset_memory_peak,
    row_nbytes,
)
from evals.run.plan import StockPolicy

SETTLE = 8  # first steps do not count: buffers grow, graphs are recorded
WARM = 128  # tokens of a prompt that warms up the kernels of a CPU
MMAP_THRESHOLD = -3  # of glibc's mallopt


class Method(NamedTuple):
    """A method to be timed.

    Attributes:
        options: of its cache, see :class:`buzz.EvictionCache`.
        chunk: tokens of a step of the prompt; None: it is read as one.
        hold: evict nothing before the prompt's end.
        cache: an empty one to measure; None: a new one.
    """

    policy: Policy
    options: dict[str, Any]
    chunk: int | None = None
    hold: bool = False
    cache: EvictionCache | None = None


def measure(
    model: PreTrainedModel, prompts: Sequence[list[int]], methods: Sequence[Method], new: int
) -> list[list[Record] | Exception]:
    """Decodes `new` tokens of a batch under every method, one step of each in turn.

    Args:
        prompts: token ids, all as many.

    Returns:
        For each method the records of its rows, or the LengthMismatch of its cache.

    Raises:
        MemoryError: a cache that keeps everything does not fit.
        NotFinite: NaN or infinite logits.
    """
    ids, runs = torch.tensor(prompts, device=model.device), []
    # By default glibc keeps freed blocks of up to 32 MB, and the same peak varies by a third.
    _libc("mallopt", MMAP_THRESHOLD, 2**20)
    linear: list[float] = []
    with torch.inference_mode(), _eviction_clock(model.device) as evictions:
        for method in methods:
            # On a GPU the first prompt of each length also chooses, or compiles, kernels.
            on_gpu = model.device.type == "cuda"
            first = ids[:1] if on_gpu else ids[:1, :WARM]
            _Run(model, method._replace(cache=None), first, new, evictions).read()
            runs.append(run := _Run(model, method, ids, new, evictions))
            run.read()
        for _ in range(new - 1):
            for run in runs:
                run.step()
            if len(runs) > 1:
                linear.append(linear_seconds(model, len(prompts)))
        linear = linear or [linear_seconds(model, len(prompts)) for _ in range(5)]
    found: list[list[Record] | Exception] = []
    for run in runs:
        more: dict[str, Any] = {"linear_ms": 1e3 * statistics.median(linear)}
        if len(runs) > 1 and run.counted and methods[0].policy == FullPolicy():
            pairs = zip(runs[0].counted, run.counted, strict=True)
            more["paired_speedup"] = statistics.median(first / own for first, own in pairs)
        try:
            found.append(run.records(more, alone=len(runs) == 1))
        except LengthMismatch as error:
            found.append(error)
    return found


class _Run:
    """A method's cache, and steps of a batch [rows, tokens] through it."""

    def __init__(
        self, model: PreTrainedModel, method: Method, ids: Tensor, new: int, evictions: list[Any]
    ) -> None:
        self.model, self.method, self.ids, self._evictions = model, method, ids, evictions
        rows, prompt = ids.shape
        self.seen, self.most = 0, prompt + new
        self.decoder: Callable[..., Any] = model
        self.cache: Any
        self.lengths: Lengths | None = None
        compiled = method.options.get("compiled", False)
        if not isinstance(method.policy, StockPolicy):
            self.cache = method.cache
            if self.cache is None:
                self.cache = EvictionCache(model, method.policy, **method.options)
            self.cache.hold_until = prompt if method.hold else 0
            self.lengths = Lengths(self.cache, method.policy)
        elif compiled:
            self.cache = StaticCache(config=model.config, max_cache_len=self.most)
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self.decoder = torch.compile(model.__call__, fullgraph=True, mode=mode)
        else:
            self.cache = DynamicCache(config=model.config)
        self.clocked = self.lengths is not None and not compiled
        self.steps: list[int] = []
        self.held: list[int] = []  # bytes of a stock cache after each step
        self.latencies: list[float] = []
        self.evicting: list[list[Any]] = []  # by step: where its evictions began and ended
        self.tokens: list[Tensor] = []
        self.finite: list[Tensor] = []

    def read(self) -> None:
        """Reads the prompts; the first new token of each."""
        self._check_room()
        gc.collect()
        _libc("malloc_trim", 0)
        reset_memory_peak(self.model.device)
        self.before = memory_in_use(self.model.device)
        if self.lengths is not None:  # buffers that it kept count for the method
            self.before -= self.cache.nbytes(allocated=True)
        chunks = self.ids.split(self.method.chunk or self.ids.shape[1], dim=1)
        synchronize(self.model.device)
        start = time.perf_counter()
        for chunk in chunks:
            token = self._forward(chunk)
            if not self.method.hold:
                self._note(chunk.shape[1])
        synchronize(self.model.device)
        self.prefill = time.perf_counter() - start
        if self.method.hold:
            self._note(self.ids.shape[1])
        self.tokens.append(token)

    def step(self) -> None:
        first = len(self._evictions)
        start = time.perf_counter()
        self.tokens.append(self._forward(self.tokens[-1]))
        synchronize(self.model.device)
        self.latencies.append(time.perf_counter() - start)
        self.evicting.append(self._evictions[first:])
        self._note(1)

    def _forward(self, tokens: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        one = tokens.shape[1] == 1 and self.seen >= self.ids.shape[1]
        if one and isinstance(self.cache, StaticCache):  # as generate() does, outside of the graph
            slots = torch.arange(self.most, device=tokens.device)
            more["attention_mask"] = (slots <= self.seen).expand(len(tokens), 1, 1, -1)
            more["position_ids"] = torch.full((1, 1), self.seen, device=tokens.device)
        self.seen += tokens.shape[1]
        decoder = self.decoder if one else self.model
        logits = decoder(tokens, **{CACHE_ARGUMENT: self.cache}, logits_to_keep=1, **more).logits
        self.finite.append(logits.amax().isfinite())
        return logits[:, -1:].argmax(-1)

    def _note(self, new: int) -> None:
        self.steps.append(new)
        if self.lengths is not None:
            self.lengths.note()
        else:
            self.held.append(sum(t.nbytes for y in self.cache.layers for t in (y.keys, y.values)))

    def _check_room(self) -> None:
        """Refuses a cache that keeps everything and does not fit into memory."""
        rows, device = len(self.ids), self.model.device
        if self.method.policy.evicts == "never" and device.type == "cpu":
            dtype = self.method.options.get("dtype")
            needed = rows * row_nbytes(self.model, self.most, self.most, dtype)
            if needed > (free := free_nbytes(device)):
                free_gb = f"{free / 1e9:.1f} GB are free"
                raise MemoryError(f"can't allocate {needed} bytes of keys and values: {free_gb}")

    @property
    def counted(self) -> list[float]:
        """Seconds of the steps that count."""
        return self.latencies[min(SETTLE, len(self.latencies) // 2) :]

    def records(self, more: Record, alone: bool) -> list[Record]:
        """The record of each row."""
        rows, prompt = self.ids.shape
        if False in (finite := torch.stack(self.finite).tolist()):
            raise NotFinite("the logits were", finite.index(False), self.model.dtype)
        device = self.model.device
        if self.latencies:
            more = more | {"first_step_s": self.latencies[0]}
        if self.counted:
            more["batch_tokens_per_s"] = rows / statistics.fmean(self.counted)
        if self.counted and self.clocked:
            spent = self.evicting[-len(self.counted) :]
            clocked = sum(_seconds(*pair) for step in spent for pair in step)
            more["eviction_share"] = clocked / sum(self.counted)
        if alone:
            more["memory_before_nbytes"] = self.before
        p50, p95 = np.percentile(self.counted, [50, 95]) * 1e3 if self.counted else (None, None)
        found = []
        for row, tokens in enumerate(torch.cat(self.tokens, dim=1).tolist()):
            if self.lengths is not None:
                held = self.lengths.measured(row, self.steps)
            else:
                room = self.most if isinstance(self.cache, StaticCache) else self.seen
                held = {
                    "lengths": list(itertools.accumulate(self.steps)),
                    "evictions": 0,
                    "entry_nbytes": self.held[-1] // rows // room,
                    "window_nbytes": [0] * len(self.steps),
                    "allocated_nbytes": max(self.held) // rows,
                }
            measured = Measurements(
                prompt_tokens=prompt,
                **held,
                ttft_s=self.prefill,
                decode_tokens_per_s=1 / statistics.fmean(self.counted) if self.counted else None,
                itl_p50_ms=p50,
                itl_p95_ms=p95,
                memory_peak_nbytes=memory_peak(device) if alone else None,
            ).record()
            if not alone:  # memory peaks are those of the whole process
                del measured["memory_peak_nbytes"]
            said = {"prediction": "", "tokens": tokens, "generated_tokens": len(tokens)}
            found.append(said | {"stop_reason": "length"} | measured | more)
        return found


@contextmanager
def _eviction_clock(device: torch.device) -> Iterator[list[Any]]:
    """Yields a list; every eviction of a layer appends its beginning and end to it."""
    evict, marks = EvictionLayer.after_attention, []

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # no step waits for it
        event.record()
        return event

    def clocked(layer: EvictionLayer, received: Any) -> None:
        began = mark()
        evict(layer, received)
        marks.append((began, mark()))

    with patch.object(EvictionLayer, "after_attention", clocked):
        yield marks


def _libc(function: str, *arguments: int) -> None:
    """Calls a function of glibc; does nothing with other C libraries."""
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def _seconds(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3


def linear_seconds(model: nn.Module, rows: int) -> float:
    """Seconds of one token in the linear layers alone: the time that no cache can save."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weight = layers[0].weight
    sizes = {layer.in_features for layer in layers}
    inputs = {size: weight.new_ones(rows, 1, size) for size in sizes}
    synchronize(weight.device)
    start = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features])
    synchronize(weight.device)
    return time.perf_counter() - start
