"""What claims on speed measure: timings of independent processes.

Whatever a process happens upon (clocks, memory layout, a neighbour) stays with it, so that samples
of one process say little about the next. Runs that differ in the seed alone are repeats; each
process gives one number, and the interval is over these. Samples timed under load do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from evals.report.chosen import is_papers, with_full
from evals.report.intervals import over_processes
from evals.report.quality import described, measured
from evals.report.verdicts import Measurement
from evals.results.records import digest
from evals.results.runs import Run, length_bin
from evals.results.schema import Record

LONG = 30_000  # tokens of a prompt that counts as one of 32K
SHORT = 4_096
BIN = 4  # times the shortest prompts that the longest must be, for growth to be seen

Row = tuple[float, float]


def faster_at_32k(runs: Sequence[Run]) -> Iterator[Measurement]:
    for pool in _repeats(runs):
        yield from _against_full(
            pool, "decode_tokens_per_s", lambda r: alone(r) and r["prompt_tokens"] >= LONG
        )


def latency_alone(runs: Sequence[Run]) -> Iterator[Measurement]:
    for pool in _repeats(runs):
        yield from _against_full(
            pool, "itl_p50_ms", lambda r: alone(r) and r["prompt_tokens"] < SHORT
        )


def throughput_in_batches(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Of rows that were decoded beside as many others as the full cache's."""
    for pool in _repeats(runs):
        sizes = {r["batch_size"] for run, _ in pool for r in run.ran if r["batch_size"] > 1}
        for size in sorted(sizes):
            yield from _against_full(
                pool,
                "decode_tokens_per_s",
                lambda r, size=size: r["batch_size"] == size,
                f", batches of {size}",
            )


def alone(record: Record) -> bool:
    """Whether a sample was answered (not read), in a batch of one."""
    return record["batch_size"] == 1 and record["generated_tokens"] > 0


def _repeats(runs: Sequence[Run]) -> list[list[tuple[Run, Run]]]:
    """The paper's BUZZ beside the full cache on one machine, repeats together."""
    found: dict[str, list[tuple[Run, Run]]] = {}
    for run, full in with_full(runs):
        if run.machine == full.machine:
            what = {key: run.config.get(key) for key in ("task", "task_version", "model")}
            what["task"] = {key: value for key, value in what["task"].items() if key != "seed"}
            what |= {"budget": [run.budget, run.config.get("budget_by")], "machine": run.machine}
            found.setdefault(digest(what), []).append((run, full))
    return list(found.values())


def _against_full(
    pool: Sequence[tuple[Run, Run]], name: str, keep: Callable[[Record], bool], more: str = ""
) -> Iterator[Measurement]:
    """A timing over the full cache's on the same prompts, if any sample has both."""
    rows = []
    for run, full in pool:
        theirs = {record["id"]: record for record in full.ran}
        for own in run.ran:
            other = theirs.get(own["id"])
            if other and other["prompt_sha256"] == own["prompt_sha256"]:
                both = (own, other)
                if all(keep(r) and not r.get("loaded") and r[name] for r in both):
                    rows.append(({r.get("process") for r in both}, (own[name], other[name])))
    if rows:
        means = [np.mean(unit, axis=0) for unit in by_process(rows)]
        yield _measured(pool[0][0], [own / full for own, full in means], len(rows), more)


def _measured(run: Run, ratios: Sequence[float], n: int, more: str) -> Measurement:
    value, interval = over_processes(ratios)
    of = f"{described(run)}{more}"
    return measured(run, value, interval, n, of, processes=len(ratios))


def by_process(rows: Iterable[tuple[set[Any], Row]]) -> list[list[Row]]:
    """Rows, each with the processes behind it, put together so that no two units share a process.

    Processes that are not known (records of earlier versions) count as one.
    """
    found: list[tuple[set[Any], list[Row]]] = []
    for processes, row in rows:
        joined = [unit for unit in found if unit[0] & processes]
        found = [unit for unit in found if not unit[0] & processes]
        names = processes.union(*(unit[0] for unit in joined))
        found.append((names, [row for unit in joined for row in unit[1]] + [row]))
    return [unit for _, unit in found]


def growth(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Time per token at the longest prompts over that at the shortest, relative to log n's growth.

    In each process that measured both. A budget that is a fraction of the prompt grows the cache by
    design and says nothing here.
    """
    series: dict[str, tuple[Run, list[Record]]] = {}
    for run in runs:
        if is_papers(run) and not isinstance(run.budget, float):
            what = [run.config["model"], run.machine, run.budget, run.config.get("budget_by")]
            _, records = series.setdefault(digest(what), (run, []))
            records += [r for r in run.ran if alone(r) and r["itl_p50_ms"] and not r.get("loaded")]
    for run, records in series.values():
        lengths = {length_bin(record["prompt_tokens"]) for record in records}
        if not lengths or max(lengths) < BIN * min(lengths):
            continue
        ends = min(lengths), max(lengths)
        processes: dict[Any, dict[int, list[Row]]] = {}
        n = 0
        for record in records:
            length = length_bin(record["prompt_tokens"])
            if length in ends:
                point = record["itl_p50_ms"], math.log(record["prompt_tokens"])
                bins = processes.setdefault(record.get("process"), {end: [] for end in ends})
                bins[length].append(point)
                n += 1
        ratios = [_growth(*bins.values()) for bins in processes.values() if all(bins.values())]
        what = f"prompts of about {ends[0]:,} and {ends[1]:,} tokens"
        yield _measured(run, ratios, n, f", {what}")


def _growth(short: Sequence[Row], long: Sequence[Row]) -> float:
    (time, log), (long_time, long_log) = np.mean(short, axis=0), np.mean(long, axis=0)
    return float((long_time / time) / (long_log / log))
