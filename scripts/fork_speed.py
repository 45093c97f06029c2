"""What reading a prompt once for all methods saves.

    python scripts/fork_speed.py    # ten methods, 1,700 tokens, an answer of 64: some minutes

Beside comparing each method with the full cache by itself, as `kl=true` does, and beside the
methods' own passes, which compare nothing: in turn in one process, in seconds of its CPU, which
others on the machine change little. Prints them, their ratios, and how far divergences differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

import baselines  # noqa: F401  (registers its methods)
from buzz import CACHE_ARGUMENT, POLICIES, Budget, EvictionCache
from evals.run.forced import compare_with_full
from evals.run.forked import compare
from evals.run.models import load_model, named_config

METHODS = (
    "random", "local", "streaming_llm", "h2o", "tova", "snapkv", "buzz", "buzz_strided",
    "keydiff", "vatp",
)  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=sorted(POLICIES))
    parser.add_argument("--model", default="smollm2", help="one of configs/model")
    parser.add_argument("--prompt", type=int, default=1700, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(named_config(arguments.model), "cpu")
    ids = torch.randint(0, len(tokenizer), (arguments.prompt,)).tolist()
    policies = [Budget(0.25).policy(POLICIES[name](), len(ids))[0] for name in arguments.methods]
    answer, found, _ = compare(model, ids, policies, arguments.answer, set(), {})

    def together() -> list[float]:
        return [one["kl"] for one in compare(model, ids, policies, arguments.answer, set(), {})[1]]

    def compared() -> list[float]:
        alone = (compare_with_full(model, [ids], [answer], policy, 0, {}) for policy in policies)
        return [rows[0].kl_to_full for rows in alone]

    def passes() -> list[float]:
        steps = torch.tensor([ids + answer[:-1]]).split([len(ids)] + [1] * (len(answer) - 1), dim=1)
        with torch.inference_mode():
            for policy in policies:
                cache = EvictionCache(model, policy)
                for step in steps:
                    model(step, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        return []

    ways: dict[str, Callable[[], list[float]]] = {
        "forked": together,
        "each compared": compared,
        "each alone, nothing compared": passes,
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    kls = {}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            start = time.process_time()
            kls[name] = way()
            spent[name].append(time.process_time() - start)
    fork = statistics.median(spent["forked"])
    print(f"{len(policies)} methods, {len(ids):,} + {len(answer)} tokens, {arguments.model}")
    for name, seconds in spent.items():
        middle = statistics.median(seconds)
        print(f"{name}: {middle:.1f} s of CPU, {middle / fork:.2f} x forked")
    pairs = zip(kls["forked"], kls["each compared"], strict=True)
    print(f"largest difference of a divergence: {max(abs(a - b) for a, b in pairs):.1e} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
