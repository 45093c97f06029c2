"""The time of choosing survivors against the size of the cache: is it O(n)? Which is faster?

    python scripts/eviction_cost.py  # a few minutes; writes results/embedded and docs/img
    python scripts/eviction_cost.py --methods lag_kv compactor --out FILE --picture FILE

Times :meth:`buzz.Policy.score` and :meth:`buzz.Policy.select` on one KV head of 64 dimensions, with
random keys, values, queries and attention. Two evictions are timed: one of steady decoding (of H2O
at every token, of BUZZ and Honeycomb once in many), and the one at the end of a prompt of twice the
size, after which half of the entries are left. Methods that evict the prompt alone have the latter.
Moving what stays is not timed. The exponent b of seconds ~ n^b is the slope of a line through the
logarithms of the last decade.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, Policy
from buzz.entries import Entries
from buzz.queries import QueryLog
from buzz.rope import Rope
from buzz.store import Store
from evals.report.figures import RC, name_ends, panels, plt, save
from evals.report.methods import style_of

LEAST = 0.2  # seconds that a point is measured for, at least 5 times
DASHES = {"decode": "-", "prompt": "--"}
DIMENSIONS = 64  # of a head
COLUMNS = ("method", "when", "entries", "eviction_s", "evictions_per_token", "token_s")
TIMED = [  # the others read what a model makes as it decodes, or evict nothing
    name
    for name, kind in POLICIES.items()
    if kind.evicts != "never"
    and not (kind.needs_projection or kind.needs_repetition)
    and kind().moments_from is None
]


def evicting(policy: Policy, entries: int) -> tuple[int, int, float]:
    """A steady eviction of decoding: its arguments, and how often one comes.

    Returns:
        Entries held, the state, and evictions for each token.
    """
    held, state, since = *policy.next_length(entries, 0), 0

    def fill() -> None:
        nonlocal held, since
        since = 1
        while policy.next_length(held + 1, state)[0] > held:
            held, since = held + 1, since + 1

    fill()
    held, state = policy.next_length(held + 1, state)
    fill()  # from here on evictions are equally far apart
    return held + 1, state, 1 / since


def seconds(policy: Policy, held: int, state: int, rope: Rope) -> float:
    """Of one choice among `held` entries; the median of several."""
    keys, values = torch.randn(2, 1, 1, held, DIMENSIONS)
    store = Store(keys, values, torch.arange(held).int().expand(1, 1, held), None, held)
    log = QueryLog()
    if count := min(policy.queries, held):
        log.keep_latest(torch.randn(1, 1, count, DIMENSIONS), 1.0, count)
    entries = Entries(
        store,
        slice(None),
        held,
        held,
        received=torch.rand(1, 1, held),
        log=log,
        uncut=held,
        rotation=rope,
        position=held,
    )
    times: list[float] = []
    policy.select(held, state, policy.score(entries))
    while len(times) < 5 or sum(times) < LEAST:
        start = time.perf_counter()
        policy.select(held, state, policy.score(entries))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure(methods: Sequence[str], sizes: Sequence[int]) -> pd.DataFrame:
    # For methods that are calibrated on a model, and for the rotation of its keys.
    shape = {"hidden_size": DIMENSIONS, "intermediate_size": 8, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    rope = Rope(model.get_decoder().rotary_emb)
    rows = []
    for method in methods:
        for entries in sizes:
            policy = POLICIES[method]().for_model(model).fit(entries)
            if policy.evicts == "always":
                held, state, often = evicting(policy, entries)
                spent = seconds(policy, held, state, rope)
                rows.append((method, "decode", entries, spent, often, spent * often))
            spent = seconds(policy, 2 * entries, 0, rope)
            rows.append((method, "prompt", entries, spent, None, None))
    return pd.DataFrame(rows, columns=COLUMNS)


def exponent(line: pd.DataFrame) -> float:
    last = line[line.entries >= line.entries.max() / 10]
    return float(np.polyfit(np.log(last.entries), np.log(last.eviction_s), 1)[0])


def draw(frame: pd.DataFrame, path: Path) -> None:
    with plt.rc_context(RC):
        figure, axes = panels(2, 4.6, 3.4)
        names: tuple[list[Any], list[Any]] = ([], [])
        for (method, when), line in frame.groupby(["method", "when"], sort=False):
            label, color, marker = style_of(str(method))
            style = {"color": color, "marker": marker, "ms": 4, "ls": DASHES[str(when)]}
            drawn = [(f"{label}, {when}: n^{exponent(line):.2f}", line.eviction_s)]
            drawn += [(label, line.token_s)] if when == "decode" else []
            for axis, ends, (name, values) in zip(axes, names, drawn, strict=False):
                axis.plot(line.entries, 1e3 * values, lw=1, **style)
                ends.append((line.entries.iloc[-1], 1e3 * values.iloc[-1], name, color))
        for axis, ends, what in zip(axes, names, ("an eviction", "a decoded token"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="entries", ylabel=f"ms for {what}")
            name_ends(axis, ends)
        save(figure, path)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = ["h2o", "buzz", "honeycomb"]
    parser.add_argument("--methods", nargs="+", default=usual, choices=sorted(TIMED))
    parser.add_argument("--largest", type=int, default=2**20, help="entries")
    parser.add_argument("--out", type=Path, default=Path("results/embedded/eviction_cost.csv"))
    parser.add_argument("--picture", type=Path, default=Path("docs/img/eviction_cost.png"))
    parser.add_argument("--draw", action="store_true", help="the picture alone, of OUT")
    arguments = parser.parse_args(given)
    if not arguments.draw:
        torch.set_num_threads(1)
        sizes = [2**power for power in range(10, int(math.log2(arguments.largest)) + 1)]
        frame = measure(arguments.methods, sizes)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(arguments.out, index=False, float_format="%.4g")
    frame = pd.read_csv(arguments.out)
    for (method, when), line in frame.groupby(["method", "when"], sort=False):
        ends = line.iloc[[0, -1]]
        cost = ", ".join(
            f"{1e3 * s:.3f} ms of {n:,}" for n, s in zip(ends.entries, ends.eviction_s, strict=True)
        )
        print(f"{method} {when}: n^{exponent(line):.2f}; {cost}")
    draw(frame, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
