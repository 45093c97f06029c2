"""Checks a GPU in ten minutes: fifteen steps, each with its figures.

    make gpu-check            # writes results/hardware/<card>-check.json

A step passes, fails, or is left out. Without a card, only the kernels are checked, in Triton's
interpreter. Exit status: 0 if nothing failed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

# cuDNN's attention makes a new plan for every length of a growing cache; step 8 measures its cost.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import baselines  # noqa: F401  (registers its policies)
from buzz import CACHE_ARGUMENT, POLICIES, EvictionCache
from buzz.kernels.reference import Leading
from evals.run.models import SHAPE, named_config

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full", "local", "streaming_llm", "h2o", "buzz", "buzz_strided", "buzz_fast", "tova")
SMALL: dict[str, dict[str, int]] = {
    "local": {"window": 48},
    "streaming_llm": {"sink": 4, "window": 44},
    "h2o": {"heavy": 24, "recent": 24},
    "tova": {"size": 48},
    **{name: {"sink": 2, "window": 24, "stride": 5, "threshold": 24}
       for name in ("buzz", "buzz_strided", "buzz_fast")},
}  # fmt: skip
LLAMA_7B = {k: v for k, v in named_config("llama2_7b_random").items() if k in SHAPE}
TINY = LLAMA_7B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


TOKENS = 200  # of answers that must be equal
STEADY = 40  # steps after which no buffer grows
CACHES = 200  # short ones, one after the other
# Estimates for one layer of Llama-2-7B, from data sheets: milliseconds of FlashAttention-2 over a
# prompt, column sums as a share of that, microseconds of a decoding step.
ESTIMATED = {
    ("A100", 4096): {"flash_ms": 0.72, "column_sums": [0.30, 0.47], "decode_us": 33},
    ("A100", 32768): {"flash_ms": 46, "column_sums": [0.30, 0.47], "decode_us": 267},
    ("H100", 4096): {"flash_ms": 0.39, "column_sums": [0.18, 0.32], "decode_us": 20},
    ("H100", 32768): {"flash_ms": 25, "column_sums": [0.18, 0.32], "decode_us": 163},
}


class Failed(Exception):
    """A step's condition does not hold."""


class LeftOut(Exception):
    """A step that this card cannot do."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


def model_of(shape: dict[str, int], dtype: torch.dtype, context: int = 40_000) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=context, initializer_range=0.05)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def cache_of(model: Any, method: str, **options: Any) -> Any:
    if method == "stock":
        return DynamicCache()
    return EvictionCache(model, POLICIES[method](**options.pop("sizes", {})), **options)


def step(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1]


def answer(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Exactly TOKENS tokens, greedily."""
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    given = {CACHE_ARGUMENT: cache, **length}
    return model.generate(ids, **given, do_sample=False, pad_token_id=0)


def read_and_decode(
    model: Any, cache: Any, prompt: int, new: int, chunk: int = 0
) -> tuple[float, float]:
    """Bytes allocated at the peak, and median seconds of a decoded token."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for part in ids.split(chunk or prompt, dim=1):
        token = step(model, cache, part).argmax(-1, keepdim=True)
    times = []
    for _ in range(new):
        start = time.perf_counter()
        token = step(model, cache, token).argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(torch.cuda.max_memory_allocated()), sorted(times)[new // 2]


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(run))


@functools.cache
def bandwidth() -> float:
    """Bytes that this card reads and writes in a millisecond, by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def free_bytes() -> int:
    """Free bytes of the device, after this process's own cached blocks are released."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def require_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        raise LeftOut(f"needs {gigabytes} GB, {free / 1e9:.0f} GB are free")


# --- the steps -------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """1. versions and capability"""
    import transformers
    import triton

    capability = torch.cuda.get_device_capability()
    expect(capability >= (8, 0), f"compute capability {capability}: the kernels need 8.0")
    return {
        "capability": list(capability),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cudnn_attention_deprioritized": os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"],
    }


def kernel_tests(interpreted: bool = False) -> dict[str, Any]:
    """2. the kernels against the full matrix, bfloat16 too"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if interpreted:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton_scores"]
    command += ["-p", "no:cacheprovider", str(ROOT / "tests/test_kernels.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    told = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    expect(done.returncode == 0 and bool(told), done.stdout[-2000:] + done.stderr[-500:])
    return {"pytest": told[-1]}


def flash_paths() -> dict[str, Any]:
    """3. PyTorch's flash attention and this project's, log-sum-exp too"""
    triton = importlib.import_module("buzz.kernels.triton_scores")
    query = torch.randn(1, 32, 300, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 8, 5000, 128, device="cuda", dtype=torch.bfloat16)
    theirs, ours = (f(query, key, value, 0.088) for f in (triton._flash, triton._attend))
    output = (theirs[0] - ours[0]).abs().max().item()
    lse = (theirs[1][:, :, :300] - ours[1]).abs().max().item()
    expect(output < 2e-2, f"outputs differ by {output}")
    expect(lse < 1e-2, f"log-sum-exps differ by {lse}")
    return {"output": output, "lse": lse}


def large_offsets() -> dict[str, Any]:
    """4. decoding over more than 2^31 elements"""
    require_memory(14)
    triton = importlib.import_module("buzz.kernels.triton_scores")
    key = torch.randn(17, 32, 32768, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(17, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    output, received = triton.scored_decode(query, key, key, 0.088)
    worst = (output - sdpa(query, key, key, scale=0.088)).abs().max().item()
    total = (received.sum(-1) - 1).abs().max().item()
    expect(worst < 2e-2 and total < 1e-2, f"output off by {worst}, sums of a softmax by {total}")
    return {"output": worst, "sum": total}


def same_tokens() -> dict[str, Any]:
    """5. float32: the tokens of the plain kernels, over 200 steps"""
    model = model_of(TINY, torch.float32, 1024)
    ids = torch.randint(3, 97, (2, 120), device="cuda")
    for method in METHODS:
        found = []
        for kernels in ("triton", "reference"):
            with patch.dict(os.environ, BUZZ_KERNELS=kernels):
                cache = cache_of(model, method, sizes=SMALL.get(method, {}))
                tokens = answer(model, ids, cache)
                found.append((tokens, cache.lengths, cache.kept_positions(2)))
        (tokens, lengths, kept), want = found
        expect(torch.equal(tokens, want[0]), f"{method}: other tokens than the plain kernels")
        expect(lengths == want[1] and torch.equal(kept, want[2]), f"{method}: other entries kept")
    return {"methods": len(METHODS)}


def half_precision() -> dict[str, Any]:
    """6. bfloat16: lengths, and the first logits"""
    model = model_of(TINY, torch.bfloat16, 1024)
    ids, worst = torch.randint(3, 97, (1, 120), device="cuda"), 0.0
    for method in METHODS:
        found = []
        for kernels in ("triton", "reference"):
            with patch.dict(os.environ, BUZZ_KERNELS=kernels):
                cache = cache_of(model, method, sizes=SMALL.get(method, {}))
                step(model, cache, ids)
                first = step(model, cache, ids[:, :1]).float()
                for _ in range(STEADY):
                    step(model, cache, ids[:, :1])
                found.append((first, cache.trace()))
        expect(found[0][1] == found[1][1], f"{method}: other lengths than the plain kernels")
        worst = max(worst, (found[0][0] - found[1][0]).abs().max().item())
    expect(worst < 5e-2, f"first logits differ by {worst}")
    return {"first_logits": worst}


def no_waiting() -> dict[str, Any]:
    """7. a steady step never waits for the device"""
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(TINY, dtype, 1024)
        ids = torch.randint(3, 97, (1, 200), device="cuda")
        for method in METHODS:
            cache = cache_of(model, method, sizes=SMALL.get(method, {}))
            step(model, cache, ids)
            for _ in range(STEADY):
                step(model, cache, ids[:, :1])
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(STEADY):
                    step(model, cache, ids[:, :1])
            except RuntimeError as error:
                told.append(f"{method} in {dtype}: {str(error).splitlines()[0]}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
    expect(not told, "; ".join(told))
    return {"methods": len(METHODS)}


def cudnn_first() -> dict[str, Any]:
    """8. the full cache at 8K with cuDNN's attention and without"""
    code = (
        "import torch, scripts.gpu_check as c\n"
        "with torch.no_grad():\n"
        "    m = c.model_of(c.LLAMA_7B | {'num_hidden_layers': 8}, torch.bfloat16)\n"
        "    print(c.read_and_decode(m, c.cache_of(m, 'full'), 8192, 64)[1] * 1e3)\n"
    )
    found = {}
    for name, value in (("cudnn_first_ms", "0"), ("cudnn_last_ms", "1")):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CUDNN_SDPA_DEPRIORITIZED": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        expect(done.returncode == 0, done.stderr[-500:])
        found[name] = float(done.stdout.split()[-1])
    apart = found["cudnn_first_ms"] / found["cudnn_last_ms"]
    # The first is measured for information only: all of this project's figures are of the second.
    return {**found, "apart": apart, "within_10_percent": abs(apart - 1) <= 0.1}


def at_8k() -> dict[str, Any]:
    """9. stock, full, streaming_llm, h2o, buzz at 8K"""
    require_memory(30)
    model, found = model_of(LLAMA_7B, torch.bfloat16), {}
    for method in ("stock", "full", "streaming_llm", "h2o", "buzz"):
        cache = cache_of(model, method)
        peak, seconds = read_and_decode(model, cache, 8192, 64)
        found[method] = {"peak_GB": peak / 1e9, "ms_a_token": seconds * 1e3}
        del cache
        gc.collect()
    return found


def at_32k() -> dict[str, Any]:
    """10. peaks at 32K: full 33, buzz 20, buzz in chunks 14 GB"""
    require_memory(36)
    model, found = model_of(LLAMA_7B, torch.bfloat16), {}
    for name, method, chunk, due in (
        ("full", "full", 0, 33.4), ("buzz", "buzz", 0, 20.3), ("in chunks", "buzz", 2048, 14.2),
    ):  # fmt: skip
        cache = cache_of(model, method)
        peak, seconds = read_and_decode(model, cache, 32768, 32, chunk)
        found[name] = {"peak_GB": peak / 1e9, "due_GB": due, "ms_a_token": seconds * 1e3}
        del cache
        gc.collect()
    for name, row in found.items():
        expect(row["peak_GB"] < 1.1 * row["due_GB"], f"{name}: {row['peak_GB']:.1f} GB at the peak")
    return found


def layer_times(tokens: int) -> dict[str, float]:
    """A layer of Llama-2-7B's shape: a prompt's attention, column sums, a decoding step."""
    triton = importlib.import_module("buzz.kernels.triton_scores")
    query, key, value = torch.randn(3, 1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16)
    flash = timed(lambda: triton._flash(query, key, value, 0.088))
    scored = timed(lambda: triton.scored_prefill(query, key, value, 0.088))
    decode = timed(lambda: triton.scored_decode(query[:, :, -1:], key, value, 0.088))
    floor = 2 * key.numel() * key.element_size() / bandwidth()
    return {
        "flash_ms": flash,
        "column_sums": (scored - flash) / flash,
        "decode_us": decode * 1e3,
        "decode_floor_us": floor * 1e3,
    }


def kernel_times() -> dict[str, Any]:
    """11. at 32K a layer's column sums take at most 0.8 of flash, its decoding 1.25 of a copy"""
    found = {**layer_times(32768), "bandwidth_GB_s": bandwidth() / 1e6}
    expect(found["column_sums"] <= 0.8, f"{found}")
    expect(found["decode_us"] <= 1.25 * found["decode_floor_us"], f"{found}")
    return found


def compiled_decoding() -> dict[str, Any]:
    """12. compiled decoding: captured, the eager tokens, sooner"""
    require_memory(24)
    model, found = model_of(LLAMA_7B, torch.bfloat16), {}
    skipped = torch._dynamo.utils.counters["inductor"]
    for method in ("full", "buzz", "streaming_llm", "h2o"):
        row = {}
        for name, on in (("eager_ms", False), ("compiled_ms", True)):
            cache = cache_of(model, method, compiled=on)
            row[name] = read_and_decode(model, cache, 2048, 128)[1] * 1e3
            del cache
            gc.collect()
        found[method] = row
    expect(not skipped["cudagraph_skips"], f"{skipped['cudagraph_skips']} graphs not captured")
    tiny = model_of(TINY, torch.float32, 1024)
    ids = torch.randint(3, 97, (2, 120), device="cuda")
    for method in METHODS:
        tokens = [
            answer(tiny, ids, cache_of(tiny, method, sizes=SMALL.get(method, {}), compiled=on))
            for on in (False, True)
        ]
        expect(torch.equal(*tokens), f"{method}: other tokens than the eager cache's")
    return found


def short_caches() -> dict[str, Any]:
    """13. 200 short compiled caches: no time and no memory for all but the first"""
    model = model_of(TINY, torch.bfloat16, 1024)

    def sample(cache: Any, number: int) -> float:
        ids = torch.randint(3, 97, (1, 60 + number % 40), device="cuda")
        start = time.perf_counter()
        for tokens in (ids, *ids[:, : STEADY // 2].split(1, dim=1)):
            step(model, cache, tokens)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def new() -> Any:
        return cache_of(model, "buzz", sizes=SMALL["buzz"], compiled=True)

    times, free = [], []
    for number in range(CACHES):
        times.append(sample(new(), number))
        if number in (CACHES // 10, CACHES - 1):
            free.append(free_bytes())
    one, kept = new(), []
    for number in range(CACHES):
        one.reset()
        kept.append(sample(one, number))
    found = {
        "first_ms": times[0],
        "median_ms": sorted(times)[len(times) // 2],
        "median_of_one_cache_ms": sorted(kept)[len(kept) // 2],
        "grown_MB": (free[0] - free[-1]) / 1e6,
    }
    expect(found["grown_MB"] < 256, f"{found}")
    return found


def eviction() -> dict[str, Any]:
    """14. an eviction of H2O: at most 10 times what a copy takes, no memory of the driver's"""
    triton = importlib.import_module("buzz.kernels.triton_scores")
    count, dim = 512, 128
    shape = 1, 32, 1200
    store = [torch.randn(*shape, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    store += [
        torch.zeros(shape, device="cuda", dtype=torch.int32),
        torch.zeros(shape, device="cuda"),
    ]
    index = torch.arange(count, device="cuda").expand(1, 32, count).contiguous()
    tables = (torch.ones(512, dim // 2, device="cuda", dtype=torch.float64),) * 2
    leading = Leading(
        store[0][:, :, :count].contiguous(), index, 30_000, torch.rand(dim // 2, device="cuda")
    )

    def evict() -> None:
        triton.move(store, store, index, 1, 1, tables, leading=leading)

    before = free_bytes()
    evict()
    taken = before - free_bytes()
    milliseconds = timed(evict)
    floor = 2 * (2 * dim * 2 + 8) * 32 * count / bandwidth()
    found = {"ms": milliseconds, "over_copy": milliseconds / floor, "driver_MB": taken / 1e6}
    expect(taken < 64e6, f"the first eviction took {taken / 1e6} MB: local memory? {found}")
    expect(milliseconds < max(0.02, 10 * floor), f"{found}")
    return found


def roofline() -> dict[str, Any]:
    """15. a layer of Llama-2-7B's shape, measured beside what was estimated"""
    return {
        str(tokens): {
            "measured": layer_times(tokens),
            **{card: row for (card, at), row in ESTIMATED.items() if at == tokens},
        }
        for tokens in (4096, 32768)
    }


STEPS: tuple[Callable[[], dict[str, Any]], ...] = (
    versions,
    kernel_tests,
    flash_paths,
    large_offsets,
    same_tokens,
    half_precision,
    no_waiting,
    cudnn_first,
    at_8k,
    at_32k,
    kernel_times,
    compiled_decoding,
    short_caches,
    eviction,
    roofline,
)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A step's verdict and figures. An exception fails this step, and no other."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            verdict = {"result": "passed", "figures": run()}
    except LeftOut as reason:
        verdict = {"result": "left out", "reason": str(reason)}
    except Exception as error:
        verdict = {"result": "failed", "reason": f"{type(error).__name__}: {error}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"step": run.__doc__, **verdict, "seconds": round(time.perf_counter() - start, 1)}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results/hardware")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("no CUDA device: only the kernels are checked, in Triton's interpreter")

        def interpreted() -> dict[str, Any]:
            """2. the kernels against the full matrix, in the interpreter"""
            return kernel_tests(interpreted=True)

        verdict = attempt(interpreted)
        print(json.dumps(verdict, indent=1))
        return int(verdict["result"] == "failed")

    card = torch.cuda.get_device_name()
    stem = "".join(c if c.isalnum() else "-" for c in card).strip("-").lower()
    file = arguments.out / f"{stem}-check.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    verdicts: list[dict[str, Any]] = []
    for run in STEPS:
        verdicts.append(attempt(run))
        print(json.dumps(verdicts[-1]), flush=True)
        file.write_text(json.dumps({"card": card, "steps": verdicts}, indent=1) + "\n")
    failed = [verdict["step"] for verdict in verdicts if verdict["result"] == "failed"]
    print(f"saved: {file}; " + (f"FAILED: {', '.join(map(str, failed))}" if failed else "passed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
