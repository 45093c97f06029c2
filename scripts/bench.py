"""Speed and memory of every method beside two full caches, as ratios measured in one run.

    make bench                                   # 2K, 8K and 32K tokens, under an hour on 2 cores
    python scripts/bench.py --lengths 2048 --methods stock full buzz
    python scripts/bench.py --llama-7b --lengths 4096 8192 16384 32768 --batch 1 max  # one GPU

Rows are measured in turn, each in a process of its own, so that one's peak of memory is not
another's: `stock` is transformers' DynamicCache with SDPA, `full` this project's full cache
(buffers written in place, the same SDPA): the strong baseline. `buzz-chunked` evicts while it
reads the prompt, in chunks of 2,048. A row's figures are medians over the repeats, with the spread
(largest over smallest). `--batch max` doubles the batch until memory ends. Nothing is asserted
here: the table says what was measured, and what ran out of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = (
    "stock",
    "full",
    "local",
    "streaming_llm",
    "buzz_strided",
    "buzz_fast",
    "buzz",
    "h2o",
    "buzz-chunked",
)
MORE = ("tova", "snapkv")  # measured when asked for
CHUNK = 2048
LONG = 16384  # tokens, beyond which rows are repeated a third as often
# Without it, glibc keeps freed blocks of up to 32 MB, and the peak of one and the same run varies
# by a third. It is the same for all rows.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def measure(
    method: str, prompt: int, batch: int, new: int, shape: dict[str, int], threads: int
) -> dict[str, Any]:
    """One row's raw figures: seconds, bytes. Runs in a process of its own."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    import baselines  # noqa: F401  (registers its policies)
    from buzz import CACHE_ARGUMENT, POLICIES, EvictionCache
    from buzz.layer import EvictionLayer
    from evals.generate import synchronize
    from evals.memory import memory_peak, reset_memory_peak

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**shape, max_position_embeddings=2 * prompt + new)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(0, shape["vocab_size"], (batch, prompt), device=device)
    evicting = 0.0

    def cache() -> Any:
        if method == "stock":
            return DynamicCache()
        return EvictionCache(model, POLICIES[method.removesuffix("-chunked")]())

    def forward(tokens: Any, cache: Any) -> Any:
        return model(tokens, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def timed_eviction(self: EvictionLayer, received: Any) -> None:
        nonlocal evicting
        start = time.perf_counter()
        evict(self, received)
        synchronize(device)
        evicting += time.perf_counter() - start

    def decode(held: Any, token: Any, steps: int) -> list[float]:
        latencies = []
        for _ in range(steps):
            start = time.perf_counter()
            token = forward(token, held)
            synchronize(device)
            latencies.append(time.perf_counter() - start)
        return latencies

    with torch.inference_mode():
        warm = cache()
        decode(warm, forward(ids[:, :1024], warm), 20)
        del warm
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        reset_memory_peak(device)
        before = memory_peak(device)
        held = cache()
        start = time.perf_counter()
        for chunk in ids.split(CHUNK if method.endswith("-chunked") else prompt, dim=1):
            token = forward(chunk, held)
        synchronize(device)
        prefill = time.perf_counter() - start
        peak = memory_peak(device)
        decode(held, token, 8)  # the first steps settle buffers
        latencies = decode(held, token, new)
        evict = EvictionLayer.after_attention
        EvictionLayer.after_attention = timed_eviction
        with_timer = 0.0 if method == "stock" else sum(decode(held, token, new))
        if method == "stock":
            entries = held.get_seq_length()
            entry = sum(2 * x.keys[0, :, 0].numel() * x.keys.element_size() for x in held.layers)
        else:
            entries, entry = held.lengths[0], held.entry_nbytes
    return {
        "prefill_s": prefill,
        "peak_bytes": peak,
        "peak_beyond_start_bytes": peak - before,
        "decode_ms": 1e3 * statistics.fmean(latencies),
        "decode_p50_ms": 1e3 * statistics.median(latencies),
        "eviction_share": evicting / with_timer if with_timer else 0.0,
        "tokens_per_s": batch / statistics.fmean(latencies),
        "read_bytes": weights + batch * entries * entry,
        "kv_bytes": batch * entries * entry,
        "copy_bytes_per_s": copy_bandwidth(device),
    }


def copy_bandwidth(device: Any) -> float:
    """Bytes read per second when a buffer larger than every cache level is read once (summed)."""
    import torch

    buffer = torch.ones(2**27 if device.type == "cpu" else 2**29, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * buffer.element_size() / best


def child(arguments: argparse.Namespace, method: str, prompt: int, batch: str) -> dict[str, Any]:
    """Measures a row in a new process; a failure is a result."""
    if batch == "max":
        row, rows = child(arguments, method, prompt, "1"), 1
        while "failed" not in (larger := child(arguments, method, prompt, str(2 * rows))):
            row, rows = larger, 2 * rows
        return {**row, "batch": rows}
    command = [sys.executable, __file__, "--child", method, "--lengths", str(prompt)]
    command += ["--batch", batch]
    command += ["--new", str(arguments.new), "--threads", str(arguments.threads)]
    for name, value in shape_of(arguments).items():
        command += ["--" + name.replace("_", "-"), str(value)]
    env = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return {"batch": int(batch), **json.loads(done.stdout.splitlines()[-1])}
    told = [line for line in done.stderr.splitlines() if line.strip()]
    out = done.returncode == -9 or "out of memory" in done.stderr or "allocate" in done.stderr
    return {"failed": "OOM" if out else told[-1]}


SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}


LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def shape_of(arguments: argparse.Namespace) -> dict[str, int]:
    given = {name: getattr(arguments, name) for name in SHAPE}
    given = {name: value for name, value in given.items() if value is not None}
    return LLAMA_7B if arguments.llama_7b else SHAPE | given


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and how far they spread."""
    if any("failed" in row for row in rounds):
        return next(row for row in rounds if "failed" in row)
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    for key in ("prefill_s", "decode_ms"):
        values = [row[key] for row in rounds]
        medians[f"{key}_spread"] = max(values) / min(values)
    return medians


def ratio(row: dict[str, Any], other: dict[str, Any] | None, key: str) -> str:
    if other is None or "failed" in other:
        return "-"
    return f"{row[key] / other[key]:.2f}"


def table(rows: dict[str, dict[str, Any]], prompt: int, batch: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(
        title=f"prompt of {prompt:,} tokens, batch {batch}", box=SIMPLE_HEAD, title_justify="left"
    )
    out.add_column("method", no_wrap=True)
    for heading in (
        "batch",
        "prefill\ns",
        "spread",
        "/stock",
        "peak\nMB",
        "/stock",
        "beyond\nstart MB",
        "KV\nMB",
        "decode\nms/step",
        "tokens\n/s",
        "spread",
        "stock/\nit",
        "full/\nit",
        "eviction\n% of decode",
        "% of\nbandwidth",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    stock, full = rows.get("stock"), rows.get("full")
    for method, row in rows.items():
        if "failed" in row:
            out.add_row(method, row["failed"])
            continue
        faster = [
            "-" if o is None or "failed" in o else f"{o['decode_ms'] / row['decode_ms']:.2f}"
            for o in (stock, full)
        ]
        bound = row["read_bytes"] / row["copy_bytes_per_s"] * 1e3
        out.add_row(
            method,
            f"{row['batch']:.0f}",
            f"{row['prefill_s']:.2f}",
            f"{row['prefill_s_spread']:.2f}",
            ratio(row, stock, "prefill_s"),
            f"{row['peak_bytes'] / 1e6:.0f}",
            ratio(row, stock, "peak_bytes"),
            f"{row['peak_beyond_start_bytes'] / 1e6:.0f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['decode_ms']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['decode_ms_spread']:.2f}",
            *faster,
            "-" if method == "stock" else f"{100 * row['eviction_share']:.1f}",
            f"{100 * bound / row['decode_ms']:.0f}",
        )
    return out


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS + MORE)
    parser.add_argument("--batch", nargs="+", default=["1"], help="rows, or max")
    parser.add_argument("--llama-7b", action="store_true", help="the shape of Llama-2-7B")
    parser.add_argument("--new", type=int, default=320, help="decoded tokens per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/hardware"))
    parser.add_argument("--child", choices=METHODS + MORE, help=argparse.SUPPRESS)
    for name, value in SHAPE.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, metavar="N", help=f"default: {value}")
    arguments = parser.parse_args(given)
    for name in SHAPE if arguments.llama_7b else ():
        if getattr(arguments, name) is not None:
            parser.error(f"argument --llama-7b: not allowed with --{name.replace('_', '-')}")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.child:
        prompt = arguments.lengths[0]
        row = measure(
            arguments.child,
            prompt,
            int(arguments.batch[0]),
            arguments.new,
            shape_of(arguments),
            arguments.threads,
        )
        print(json.dumps(row))
        return 0

    import pandas
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import Progress

    from evals.environment import cpu_name

    cpu = f"{cpu_name()} {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    setting = {
        "device": device,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": shape_of(arguments),
        "new_tokens": arguments.new,
        "repeats": arguments.repeats,
        "policies": "defaults: sink 4, window 160, stride 5, threshold 400; h2o 280 + 280;"
        " tova 512; snapkv 1,024",
        "allocator": ALLOCATOR if not torch.cuda.is_available() else {},
    }
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print_json(json.dumps(setting))
    name = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
    name += "-llama-7b" if arguments.llama_7b else ""
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(setting, indent=1) + "\n")
    results: list[dict[str, Any]] = []
    for prompt in arguments.lengths:
        for batch in arguments.batch:
            rounds: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
            # Prefill grows with the square of the prompt, its spread does not.
            repeats = arguments.repeats if prompt <= LONG else max(1, arguments.repeats // 3)
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task(f"{prompt:,}", total=repeats * len(rounds))
                for _ in range(repeats):
                    for method, measured in rounds.items():
                        measured.append(child(arguments, method, prompt, batch))
                        progress.advance(bar)
            rows = {method: summarize(measured) for method, measured in rounds.items()}
            console.print(table(rows, prompt, batch))
            results += [{"prompt": prompt, "method": name, **row} for name, row in rows.items()]
            pandas.DataFrame(results).to_csv(arguments.out / f"{name}.csv", index=False)
    console.print(f"saved: {arguments.out / name}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
