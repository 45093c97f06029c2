"""Speed and memory of every method beside two full caches, as ratios measured in one run.

    make bench                                   # 2K, 8K and 32K tokens, under an hour on 2 cores
    python scripts/bench.py --lengths 2048 --methods stock full buzz buzz-compiled
    python scripts/bench.py --ops                # operations of a step, counted
    python scripts/bench.py --kv-limit 512MB --lengths 2048 --model smollm2
    python scripts/bench.py --llama-7b --device cpu --lengths 4096 8192 12288 --paired
    make gpu-bench                               # Llama-2-7B's shape on one GPU, 4K to 32K tokens

Rows are measured in turn, each in a process of its own (`scripts/measure.py`), so that one's peak
of memory is not another's: `stock` is transformers' DynamicCache with SDPA, `full` this project's
full cache (buffers written in place, the same SDPA): the strong baseline. `buzz-chunked` evicts
while it reads the prompt, in chunks of 2,048. `-compiled` decodes by a graph; of `stock` it is
transformers' StaticCache. A row's figures are medians over the repeats, with the spread (largest
over smallest). `--batch max` searches for the largest batch, `--kv-limit` computes it; ratios of
times are printed only beside rows of equal batch. Nothing is asserted here: the table says what was
measured, and what ran out of memory. `--paired` takes one step of each method in turn, in one
process: where the machine itself is unsteady, ratios are of one moment. What a CSV of the same
setting already has is not measured again with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.tasks.types import nbytes

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
PAPER = ("stock", "full", "streaming_llm", "h2o", "buzz")  # of --llama-7b
CONFIGS = Path(__file__).resolve().parents[1] / "configs/method"
MORE = tuple(sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {*METHODS}))  # when asked
KNOWN = METHODS + MORE
KNOWN += tuple(f"{name}-compiled" for name in KNOWN)
MEASURE = Path(__file__).with_name("measure.py")
LONG = 16384  # tokens, beyond which rows are repeated a third as often
# Without it, glibc keeps freed blocks of up to 32 MB, and the peak of one and the same run varies
# by a third. It is the same for all rows. cuDNN's attention plans anew for every length of a cache
# that grows, which would slow down the methods that do not evict.
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}

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


def job(arguments: argparse.Namespace, method: str, prompt: int, batch: int) -> dict[str, Any]:
    """What `scripts/measure.py` is asked."""
    return {
        "method": method,
        "prompt": prompt,
        "batch": batch,
        "new": arguments.new,
        "shape": shape_of(arguments),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": arguments.threads,
        "chunk": arguments.chunk,
        "kv_limit": arguments.kv_limit,
    }


def child(arguments: argparse.Namespace, method: str, prompt: int, batch: str) -> dict[str, Any]:
    """Measures a row in a new process."""
    if batch == "max":
        return largest(arguments, method, prompt)
    asked = job(arguments, method, prompt, int(batch))
    if reason := does_not_fit(asked):
        return {"failed": reason}
    return process(arguments, asked)


def process(arguments: argparse.Namespace, asked: dict[str, Any]) -> Any:
    """What `scripts/measure.py` prints; a failure is a result."""
    env = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, str(MEASURE), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    told = [line for line in done.stderr.splitlines() if line.strip()]
    out = done.returncode == -9 or re.search("out of memory|allocate|MemoryError", done.stderr)
    return {"failed": "OOM" if out else told[-1] if told else f"exit status {done.returncode}"}


def in_turn(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all methods at each length, a process for each length."""
    rows = []
    for prompt in arguments.lengths:
        asked = job(arguments, arguments.methods[0], prompt, 1)
        holds_all = [name for name in arguments.methods if name.startswith(("stock", "full"))]
        reason = does_not_fit(asked | {"method": [*holds_all, asked["method"]][0]})
        found = {"failed": reason} if reason else None
        found = found or process(arguments, asked | {"paired": arguments.methods})
        if isinstance(found, dict):
            found = [found | {"method": ", ".join(arguments.methods)}]
        rows += [{"prompt": prompt} | row for row in found]
    return rows


def largest(arguments: argparse.Namespace, method: str, prompt: int) -> dict[str, Any]:
    """The row of the largest batch: doubled until memory ends, then once more half-way.

    What fails otherwise is tried a second time: memory alone ends the search.
    """

    def attempt(rows: int) -> dict[str, Any]:
        row = child(arguments, method, prompt, str(rows))
        if row.get("failed", "OOM") != "OOM":
            row = child(arguments, method, prompt, str(rows))
        return row

    best, rows = attempt(1), 1
    while "failed" not in best and "failed" not in (larger := attempt(2 * rows)):
        best, rows = larger, 2 * rows
    if rows > 1 and "failed" not in (between := attempt(rows + rows // 2)):
        best = between
    return best


def available() -> int:
    """Bytes that a process may still take; 0 where nobody says."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    found = re.search(r"MemAvailable:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def needs(asked: dict[str, Any]) -> int:
    """Bytes of weights, of the KV of a prompt that is held until its end, and of one layer's work.

    A chunk's work is that of an MLP and of keys and values widened to float32.
    """
    shape, size = asked["shape"], 4 if asked["dtype"] == "float32" else 2
    hidden, inner, layers = (
        shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    kv = 2 * hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block = 2 * hidden * hidden + hidden * kv + 3 * hidden * inner
    weights = size * (layers * block + 2 * shape["vocab_size"] * hidden)
    tokens = asked["prompt"] + 2 * asked["new"]
    held = tokens if asked["chunk"] or asked["method"].startswith(("stock", "full")) else 0
    copied = tokens + tokens // 8 if asked["chunk"] else 0  # a layer's buffer grows by copying
    work = (asked["chunk"] or asked["prompt"]) * (4 * inner + 4 * hidden) * size
    work += tokens * kv * 4 + copied * kv * size
    return weights + asked["batch"] * (held * kv * layers * size + work)


def does_not_fit(asked: dict[str, Any]) -> str | None:
    """Why a row on the CPU need not be started."""
    free = available()
    if asked["device"] != "cpu" or asked["model"] or asked["kv_limit"] or not free:
        return None
    needed = needs(asked)
    if needed <= free:
        return None
    return f"does not fit: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"


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
    """`row` over `other`; rows of another batch are not to be compared."""
    if other is None or "failed" in other or row["batch"] != other["batch"]:
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
        "alloc.\nMB",
        "decode\nms/step",
        "tokens\n/s",
        "spread",
        "/stock",
        "/full",
        "linear\nms",
        "bytes/\nbandwidth\nms",
        "eviction\n% of decode",
        "first\nstep s",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    stock, full = rows.get("stock"), rows.get("full")
    for method, row in rows.items():
        if "failed" in row:
            out.add_row(method, row["failed"])
            continue
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
            f"{row['kv_allocated_bytes'] / 1e6:.1f}",
            f"{row['decode_ms']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['decode_ms_spread']:.2f}",
            ratio(row, stock, "decode_ms"),
            ratio(row, full, "decode_ms"),
            f"{row['linear_ms']:.2f}",
            f"{row['read_bytes'] / row['copy_bytes_per_s'] * 1e3:.2f}",
            f"{100 * row['eviction_share']:.1f}" if row.get("eviction_share", 0) > 0 else "-",
            f"{row['first_step_s']:.2f}",
        )
    return out


def count_operations(methods: Sequence[str]) -> Any:
    """A table of what a decoding step launches, per layer: of eight layers less that of four."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    sys.path.insert(0, str(MEASURE.parent))
    import measure
    import torch

    out = Table(title="operations of a decoding step", box=SIMPLE_HEAD, title_justify="left")
    for heading in ("method", "dtype", "per layer", "/ stock", "the whole step", "waits"):
        out.add_column(heading, no_wrap=True)
    for dtype in ("float32", "bfloat16"):
        stock = 0.0
        for method in methods:
            counted = []
            for layers in (8, 4):
                shape = SHAPE | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
                asked = measure.Job(
                    method, prompt=640, shape=shape | {"num_hidden_layers": layers}, dtype=dtype
                )
                model = measure.make_model(asked)
                run = measure.Run(asked, model, 1)
                with torch.no_grad():
                    token = run.prefill(torch.zeros(1, asked.prompt, dtype=torch.int64))
                    run.decode(token, 6)
                counted.append(measure.operations(model, run.cache, token))
            whole, less = (counts.launches.total() for counts in counted)
            per_layer = (whole - less) / 4
            stock = per_layer if method == "stock" else stock
            waits = ", ".join(counted[0].waits) or "none"
            more = f"{per_layer - stock:+.1f}" if stock else "-"
            out.add_row(method, dtype, f"{per_layer:.1f}", more, str(whole), waits)
    return out


def size(text: str) -> int:
    try:
        return nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--methods", nargs="+", choices=KNOWN, metavar="METHOD")
    parser.add_argument("--batch", nargs="+", default=["1"], help="rows, or max")
    parser.add_argument("--kv-limit", type=size, default=0, help="KV of all rows: 512MB")
    parser.add_argument("--llama-7b", action="store_true", help="the shape of Llama-2-7B")
    parser.add_argument("--model", help="one of configs/model instead of random weights")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--chunk", type=int, help="read prompts in chunks, evict at their end")
    parser.add_argument("--new", type=int, help="decoded tokens per row")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/hardware"))
    parser.add_argument("--paired", action="store_true", help="one step of each method in turn")
    parser.add_argument("--ops", action="store_true", help="count the operations of a step")
    parser.add_argument("--resume", action="store_true", help="go on where a run was ended")
    for name, value in SHAPE.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, metavar="N", help=f"default: {value}")
    arguments = parser.parse_args(given)
    for name in SHAPE if arguments.llama_7b else ():
        if getattr(arguments, name) is not None:
            parser.error(f"argument --llama-7b: not allowed with --{name.replace('_', '-')}")
    if arguments.kv_limit and arguments.batch != ["1"]:
        parser.error("argument --kv-limit: not allowed with --batch")
    alone = arguments.kv_limit or arguments.batch != ["1"] or arguments.resume or arguments.repeats
    if arguments.paired and alone:
        parser.error("argument --paired: not allowed with --kv-limit, --batch, --resume, --repeats")
    if arguments.device is None:
        arguments.device = "cuda" if cuda() else "cpu"
    on_cpu, large = arguments.device == "cpu", arguments.llama_7b
    once = large or arguments.kv_limit or arguments.paired
    defaults = {
        "methods": PAPER if large and on_cpu else METHODS,
        "dtype": "bfloat16" if large or not on_cpu else "float32",
        "chunk": 1024 if large and on_cpu else 0,
        "new": 32 if large and on_cpu else 320,
        "repeats": 1 if once else 3,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides the figures, beside method, prompt and batch."""
    import torch
    import transformers

    from evals.results.environment import cpu_name

    on_cpu = arguments.device == "cpu"
    return {
        "device": f"{cpu_name()} {os.cpu_count()} cores"
        if on_cpu
        else torch.cuda.get_device_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cudnn": None if on_cpu else torch.backends.cudnn.version(),
        "model": arguments.model,
        "shape": None if arguments.model else shape_of(arguments),
        "dtype": arguments.dtype,
        "chunk": arguments.chunk,
        "kv_limit": arguments.kv_limit,
        "new_tokens": arguments.new,
        "repeats": arguments.repeats,
        "policies": "defaults: sink 4, window 160, stride 5, threshold 400; h2o 280 + 280;"
        " tova 512; snapkv 1,024",
        "environment": SETTINGS,
    }


def stem_of(arguments: argparse.Namespace, device: str) -> str:
    """A file name for the run: the device, and what the defaults are not."""
    name = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
    name += "-llama-7b" if arguments.llama_7b else ""
    name += f"-{arguments.model}" if arguments.model else ""
    return name + (f"-kv-{arguments.kv_limit // 10**6}mb" if arguments.kv_limit else "")


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 190)
    if arguments.ops:
        console.print(count_operations(arguments.methods))
        return 0

    import pandas
    from rich.progress import Progress

    setting = setting_of(arguments)
    console.print_json(json.dumps(setting))
    stem = stem_of(arguments, setting["device"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.paired:
        frame = pandas.DataFrame(in_turn(arguments))
        file = arguments.out / f"{stem}-paired.csv"
        frame.to_csv(file, index=False)
        file.with_suffix(".json").write_text(json.dumps(setting, indent=1) + "\n")
        console.print(frame.round(3).to_string(index=False))
        console.print(f"saved: {file}")
        return 0
    file, about = arguments.out / f"{stem}.csv", arguments.out / f"{stem}.json"
    results: list[dict[str, Any]] = []
    if arguments.resume and file.exists() and json.loads(about.read_text()) == setting:
        found = pandas.read_csv(file).astype(object)
        results = [row.dropna().to_dict() for _, row in found.iterrows()]
    about.write_text(json.dumps(setting, indent=1) + "\n")
    for prompt in arguments.lengths:
        for batch in arguments.batch:
            asked = {"prompt": prompt, "asked_batch": batch}
            ready = {
                row["method"]: row
                for row in results
                if row["prompt"] == prompt and str(row.get("asked_batch")) == batch
            }
            rounds: dict[str, list[dict[str, Any]]] = {
                method: [] for method in arguments.methods if method not in ready
            }
            # Prefill grows with the square of the prompt, its spread does not.
            repeats = arguments.repeats if prompt <= LONG else max(1, arguments.repeats // 3)
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task(f"{prompt:,}", total=repeats * len(rounds))
                for number in range(repeats):
                    for method, measured in rounds.items():
                        measured.append(child(arguments, method, prompt, batch))
                        progress.advance(bar)
                        if number + 1 == repeats:  # what is measured is kept, whatever comes
                            row = {**asked, "method": method, **summarize(measured)}
                            results.append(row)
                            ready[method] = row
                            pandas.DataFrame(results).to_csv(file, index=False)
            console.print(table({m: ready[m] for m in arguments.methods}, prompt, batch))
    console.print(f"saved: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
