"""One row of `scripts/bench.py`: a method on one prompt, in a process of its own.

    python scripts/measure.py '{"method": "buzz", "prompt": 2048, ...}'

Takes a job as JSON (:class:`Job`), prints what was measured as JSON; with `paired`, a list of
methods, rows of all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import baselines  # noqa: F401  (registers its policies)
from buzz import CACHE_ARGUMENT, POLICIES, EvictionCache, Policy, kernels
from buzz.layer import EvictionLayer
from evals.run.generate import synchronize
from evals.run.memory import entry_nbytes, memory_peak, reset_memory_peak
from evals.run.models import load_model, named_config

CHUNK = 2048  # of a method that evicts while it reads
SETTLE = 8  # steps before the clock runs: buffers find their size, graphs are made
WARM = 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        method: ``stock`` or a policy; ``-chunked``: evicting while it reads; ``-compiled``.
        prompt, batch, new: tokens, rows, decoded tokens.
        shape: of a random Llama.
        model: a model of this project instead, by name.
        dtype: of weights and cache.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        chunk: read the prompt in chunks of so many tokens and evict at its end; 0: in one piece.
        kv_limit: bytes of KV; `batch` is then the most rows that fit, copies of one prompt.
        settle: see :data:`SETTLE`.
    """

    method: str
    prompt: int
    batch: int = 1
    new: int = 320
    shape: dict[str, int] = dataclasses.field(default_factory=dict)
    model: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    chunk: int = 0
    kv_limit: int = 0
    settle: int = SETTLE

    @property
    def policy(self) -> Policy | None:
        name = self.method.removesuffix("-compiled").removesuffix("-chunked")
        return None if name == "stock" else POLICIES[name]()

    @property
    def compiled(self) -> bool:
        return self.method.endswith("-compiled")

    @property
    def tokens(self) -> int:
        """That the longest run feeds: to settle, timed, and with a clock at evictions."""
        return self.prompt + self.settle + 2 * self.new + 2


def measure(job: Job) -> dict[str, Any]:
    """A row's raw figures: seconds, bytes."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    device = torch.device(job.device)
    model = make_model(job)
    batch = rows_within(job, model) if job.kv_limit else job.batch
    if not batch:
        raise MemoryError(f"one row does not fit in {job.kv_limit:,} bytes of KV")
    copies = job.kv_limit > 0
    ids = torch.randint(0, model.config.vocab_size, (1 if copies else batch, job.prompt))
    ids = ids.to(device)
    with torch.inference_mode():
        # On a GPU the first prompt of a length also chooses, or compiles, its kernels.
        run = Run(job, model, 1)
        token = run.prefill(ids[:1] if device.type == "cuda" else ids[:1, :WARM])
        first_step = run.decode(token, 4)[0]  # in which a graph is compiled
        del run
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        reset_memory_peak(device)
        before = memory_peak(device)
        run = Run(job, model, batch)
        start = time.perf_counter()
        token = run.prefill(ids)
        synchronize(device)
        prefill = time.perf_counter() - start
        if copies:
            run.cache.batch_repeat_interleave(batch)
            token = token.expand(batch, -1).contiguous()
        run.decode(token, job.settle)
        latencies = run.decode(token, job.new)
        entries, entry, allocated = run.held()
        evicting = run.eviction_share(token)
        peak = memory_peak(device)
        del run
        linear = linear_seconds(model, batch)
    del model
    figures = {
        "batch": batch,
        "prefill_s": prefill * (batch if copies else 1),
        "peak_bytes": peak,
        "peak_beyond_start_bytes": peak - before,
        "decode_ms": 1e3 * statistics.fmean(latencies),
        "decode_p50_ms": 1e3 * statistics.median(latencies),
        "linear_ms": 1e3 * linear,
        "first_step_s": first_step,
        "eviction_share": evicting,
        "tokens_per_s": batch / statistics.fmean(latencies),
        "entries": entries,
        "read_bytes": weights + batch * entries * entry,
        "kv_bytes": batch * entries * entry,
        "kv_allocated_bytes": allocated,
    }
    return figures | {"copy_bytes_per_s": copy_bandwidth(device)}


def paired(job: Job, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of several methods on one model, one step of each in turn.

    Whatever else the machine does meanwhile, it does to all of them. Peaks of memory are the
    process's own and not measured.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    model = make_model(job)
    ids = torch.randint(0, model.config.vocab_size, (job.batch, job.prompt)).to(job.device)
    runs: dict[str, Run] = {}
    prefill: dict[str, float] = {}
    latencies: dict[str, list[float]] = {method: [] for method in methods}
    linear: list[float] = []
    with torch.inference_mode():
        for method in methods:
            runs[method] = run = Run(dataclasses.replace(job, method=method), model, job.batch)
            start = time.perf_counter()
            token = run.prefill(ids)
            synchronize(token.device)
            prefill[method] = time.perf_counter() - start
            run.decode(token, job.settle)
        for _ in range(job.new):
            for method, run in runs.items():
                latencies[method] += run.decode(token, 1)
            linear.append(linear_seconds(model, job.batch, 1))
    rows = []
    for method, run in runs.items():
        entries, entry, allocated = run.held()
        steps = latencies[method]
        rows.append(
            {
                "method": method,
                "batch": job.batch,
                "prefill_s": prefill[method],
                "decode_ms": 1e3 * statistics.fmean(steps),
                "decode_p50_ms": 1e3 * statistics.median(steps),
                "linear_ms": 1e3 * statistics.median(linear),
                "tokens_per_s": job.batch / statistics.fmean(steps),
                "entries": entries,
                "kv_bytes": job.batch * entries * entry,
                "kv_allocated_bytes": allocated,
                "first_over_it": statistics.median(
                    a / b for a, b in zip(latencies[methods[0]], steps, strict=True)
                ),
            }
        )
    return rows


def make_model(job: Job) -> nn.Module:
    """Weights are drawn in the dtype that they stay in."""
    if job.model:
        config = named_config(job.model) | {"dtype": job.dtype}
        return load_model(config, job.device)[0]
    config = LlamaConfig(**job.shape, max_position_embeddings=max(job.tokens, WARM + 64))
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype))
    return model.eval().requires_grad_(False)


def rows_within(job: Job, model: nn.Module) -> int:
    """The most rows whose KV never exceeds the limit, once the prompts are read."""
    steps = [job.prompt] + [1] * (job.tokens - job.prompt)
    most = job.tokens if job.policy is None else max(job.policy.lengths(steps))
    return job.kv_limit // (most * entry_nbytes(model.config, model.dtype))


class Run:
    """A cache of the job's method, and steps through it.

    Args:
        job: whose method it is.
        model: in its place.
        batch: rows that will be decoded.
    """

    def __init__(self, job: Job, model: nn.Module, batch: int) -> None:
        self.job = job
        self.model = model
        self.seen = 0
        self.mask: Tensor | None = None
        self.step: Callable[..., Any] = model
        self.cache: Any
        if job.policy is not None:
            hold = job.prompt if job.chunk and not job.method.count("-chunked") else 0
            self.cache = EvictionCache(model, job.policy, compiled=job.compiled, hold_until=hold)
        elif job.compiled:
            self.cache = StaticCache(config=model.config, max_cache_len=job.tokens)
            mode = "reduce-overhead" if job.device == "cuda" else None
            self.step = torch.compile(model.__call__, fullgraph=True, mode=mode)
            self.slots = torch.arange(job.tokens, device=job.device)
        else:
            self.cache = DynamicCache()

    def forward(self, tokens: Tensor) -> Tensor:
        one = tokens.shape[1] == 1
        extra: dict[str, Any] = {}
        if one and isinstance(self.cache, StaticCache):  # as generate() does, outside of the graph
            extra["attention_mask"] = (self.slots <= self.seen).expand(len(tokens), 1, 1, -1)
            extra["position_ids"] = torch.full((1, 1), self.seen, device=tokens.device)
        self.seen += tokens.shape[1]
        model = self.step if one else self.model
        output = model(tokens, **{CACHE_ARGUMENT: self.cache}, logits_to_keep=1, **extra)
        return output.logits[:, -1:].argmax(-1)

    def prefill(self, ids: Tensor) -> Tensor:
        """Read a prompt [rows, tokens]; the first new token [rows, 1]."""
        size = CHUNK if "-chunked" in self.job.method else self.job.chunk or ids.shape[1]
        if self.job.policy is not None and self.cache.hold_until:
            self.cache.hold_until = ids.shape[1]
        for chunk in ids.split(size, dim=1):
            token = self.forward(chunk)
        return token

    def decode(self, token: Tensor, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        latencies = []
        for _ in range(steps):
            start = time.perf_counter()
            token = self.forward(token)
            synchronize(token.device)
            latencies.append(time.perf_counter() - start)
        return latencies

    def held(self) -> tuple[int, int, int]:
        """Entries of a row, bytes of an entry, bytes of all buffers."""
        if isinstance(self.cache, EvictionCache):
            cache = self.cache
            return cache.lengths[0], cache.entry_nbytes, cache.nbytes(allocated=True)
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        entry = sum(t[0, :, 0].numel() * t.element_size() for t in tensors)
        return self.seen, entry, sum(t.numel() * t.element_size() for t in tensors)

    def eviction_share(self, token: Tensor) -> float:
        """What evictions take of decoding; the clock waits for the device on both sides.

        NaN where nothing evicts, and in a graph, where no clock is.
        """
        if self.job.policy is None or self.job.compiled:
            return math.nan
        evict, spent = EvictionLayer.after_attention, 0.0

        def timed(layer: EvictionLayer, received: Any) -> None:
            nonlocal spent
            synchronize(token.device)
            start = time.perf_counter()
            evict(layer, received)
            synchronize(token.device)
            spent += time.perf_counter() - start

        EvictionLayer.after_attention = timed
        try:
            seconds = sum(self.decode(token, self.job.new))
            return spent / seconds
        finally:
            EvictionLayer.after_attention = evict


def linear_seconds(model: nn.Module, batch: int, times: int = 10) -> float:
    """A token's way through the linear layers and nothing else: what no cache can save."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    device, dtype = layers[0].weight.device, layers[0].weight.dtype
    inputs = {m.in_features: torch.ones(batch, 1, m.in_features, device=device, dtype=dtype)
              for m in layers}  # fmt: skip
    seconds = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read per second when a buffer larger than every cache level is read once (summed)."""
    buffer = torch.ones(2**27 if device.type == "cpu" else 2**29, device=device)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * buffer.element_size() / best


# --- operations ----------------------------------------------------------------------------------

# Launches that a kernel of this project takes on CUDA; on the CPU they are calls that PyTorch does
# not see.
LAUNCHES = {
    "scored_decode": 2,
    "scored_prefill": 2,
    "move": 1,
    "step": 3,
    "append": 1,
    "originals": 1,
}
# What only describes memory, or makes a place for results.
FREE = (
    "view", "reshape", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze",
    "squeeze", "alias", "detach", "split", "unbind", "as_strided", "empty", "new_empty",
    "empty_strided", "empty_like", "_unsafe_view", "unfold", "movedim", "new_empty_strided",
)  # fmt: skip
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")
SENDS = ("lift_fresh", "_to_copy")


class Operations(TorchDispatchMode):
    """Counts what a step asks a device to do.

    Attributes:
        launches: by operation, views and empty tensors left out.
        waits: reads of a number from a tensor, and tensors made of the host's data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._made = torch.tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        if name in READS:
            self.waits[name] += 1
        elif name not in FREE and name != "lift_fresh":
            self.launches[name] += 1
        return result

    def __enter__(self) -> Operations:
        def tensor(*args: Any, **kwargs: Any) -> Tensor:
            self.waits["torch.tensor"] += 1
            return self._made(*args, **kwargs)

        self._kernels = {
            name: getattr(kernels, name) for name in LAUNCHES if hasattr(kernels, name)
        }
        for name, kernel in self._kernels.items():
            setattr(kernels, name, self._counted(name, kernel))
        torch.tensor = tensor
        self._outruns = kernels.outruns_stock
        kernels.outruns_stock = lambda query: False  # as on CUDA
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.tensor = self._made
        kernels.outruns_stock = self._outruns
        for name, kernel in self._kernels.items():
            setattr(kernels, name, kernel)

    def _counted(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.launches[f"buzz.{name}"] += LAUNCHES[name]
            with torch.utils._python_dispatch._disable_current_modes():
                return kernel(*args, **kwargs)

        return counted


def operations(model: nn.Module, cache: Any, token: Tensor, **inputs: Any) -> Operations:
    """What the next step does."""
    with torch.no_grad(), Operations() as counted:
        model(token, **{CACHE_ARGUMENT: cache}, **inputs)
    return counted


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    together = asked.pop("paired", None)
    print(json.dumps(paired(Job(**asked), together) if together else measure(Job(**asked))))
