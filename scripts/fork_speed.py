"""What one pass of many methods takes, beside the full cache alone on the same prompt.

    python scripts/fork_speed.py    # ten methods at three budgets, 1,700 tokens, an answer of 60

The full cache reads the prompt and decodes a row; then a forked cache reads it and decodes a row
for each method and budget; then a copy of that one is fed the full cache's answer, as a comparison
of distributions does. In turn in one process, some times; medians of time and of CPU time, and what
they are to the full cache's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

import baselines  # noqa: F401  (registers its methods)
from buzz import CACHE_ARGUMENT, POLICIES, Budget, EvictionCache, ForkedCache
from evals.run.models import load_model, named_config

METHODS = (
    "full", "random", "local", "streaming_llm", "h2o", "tova", "snapkv", "buzz", "keydiff", "vatp",
)  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=sorted(POLICIES))
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.1, 0.25, 0.5))
    parser.add_argument("--model", default="smollm2", help="one of configs/model")
    parser.add_argument("--prompt", type=int, default=1700, help="tokens")
    parser.add_argument("--answer", type=int, default=60, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(named_config(arguments.model), "cpu")
    ids = torch.randint(0, len(tokenizer), (1, arguments.prompt))
    policies = [
        Budget(budget).policy(POLICIES[name](), arguments.prompt)[0]
        for budget in arguments.budgets
        for name in arguments.methods
    ]
    full, forked = EvictionCache(model, POLICIES["full"]()), ForkedCache(model, policies)

    def step(cache: EvictionCache, tokens: Tensor) -> Tensor:
        given = {CACHE_ARGUMENT: cache}
        return model(tokens, **given, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    def decode(cache: EvictionCache, token: Tensor, rows: int) -> Tensor:
        tokens = [token.expand(rows, 1)]
        for _ in range(arguments.answer):
            tokens.append(step(cache, tokens[-1]))
        return torch.cat(tokens, dim=1)

    spent: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, start: tuple[float, float]) -> None:
        now = time.perf_counter(), time.process_time()
        spent.setdefault(name, []).append((now[0] - start[0], now[1] - start[1]))

    with torch.inference_mode():
        for _ in range(arguments.repeats + 1):
            start = time.perf_counter(), time.process_time()
            full.reset()
            answer = decode(full, step(full, ids), 1)
            timed("full cache alone", start)
            start = time.perf_counter(), time.process_time()
            forked.reset()
            first = step(forked, ids)
            timed("all rows: the prompt", start)
            copied = forked.copy()
            decode(forked, first, len(policies))
            timed("all rows", start)
            for token in answer[:, :-1].T:
                step(copied, token[:, None].expand(len(policies), 1))
            timed("all rows, and a copy on the full cache's answer", start)
    print(f"{len(policies)} rows, {arguments.prompt:,} + {arguments.answer} tokens,", end=" ")
    print(f"{arguments.model}, {arguments.threads} threads, {arguments.repeats} times")
    alone = [statistics.median(way) for way in zip(*spent["full cache alone"][1:], strict=True)]
    for name, pairs in spent.items():
        wall, cpu = (statistics.median(way) for way in zip(*pairs[1:], strict=True))
        ratios = f"{wall / alone[0]:.2f} and {cpu / alone[1]:.2f} x the full cache alone"
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU; {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
