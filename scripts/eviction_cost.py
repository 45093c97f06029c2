"""What choosing survivors costs against the size of the cache: is it O(n), who is faster where?

    python scripts/eviction_cost.py  # about a minute; writes results/embedded and docs/img

Times :meth:`buzz.Policy.select` on random scores of one head: of H2O as it decodes (one entry
leaves, at every token) and at the end of a prompt of twice the size (half leave), of BUZZ (one
eviction in many tokens). Moving what stays is not in it. The exponent b of seconds ~ n^b is that of
a line through the logarithms of the last decade.
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

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, Policy
from evals.report.figures import RC, name_ends, panels, plt, save
from evals.report.methods import style_of

LEAST = 0.2  # seconds that a point is measured for, at least 5 times
DASHES = {"decode": "-", "prompt": "--"}


def evicting(policy: Policy, entries: int) -> tuple[int, int, float]:
    """A steady eviction of decoding: what it is given, and how often one comes.

    Returns:
        Entries held, the state, and evictions for each token.
    """
    held, state, since = *policy.survivors(entries, 0), 0

    def fill() -> None:
        nonlocal held, since
        since = 1
        while policy.survivors(held + 1, state)[0] > held:
            held, since = held + 1, since + 1

    fill()
    held, state = policy.survivors(held + 1, state)
    fill()  # from here on every one comes as soon
    return held + 1, state, 1 / since


def seconds(policy: Policy, held: int, state: int) -> float:
    """Of one selection among `held` entries; the median of several."""
    scores = torch.rand(1, 1, held)
    policy.select(held, state, scores)
    times: list[float] = []
    while len(times) < 5 or sum(times) < LEAST:
        start = time.perf_counter()
        policy.select(held, state, scores)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(methods: Sequence[str], sizes: Sequence[int]) -> pd.DataFrame:
    rows = []
    for method in methods:
        for entries in sizes:
            policy = POLICIES[method]().fit(entries)
            held, state, often = evicting(policy, entries)
            for when, given in (("decode", (held, state)), ("prompt", (2 * entries, 0))):
                spent = seconds(policy, *given)
                per_token = spent * often if when == "decode" else None
                rows.append(
                    {"method": method, "when": when, "entries": entries, "eviction_s": spent}
                    | {"evictions_per_token": often if when == "decode" else None}
                    | {"token_s": per_token}
                )
    return pd.DataFrame(rows)


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
    parser.add_argument("--methods", nargs="+", default=["h2o", "buzz"], choices=sorted(POLICIES))
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
