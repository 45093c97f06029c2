"""What the paper promises and what reviewers doubt, claim by claim, against the runs.

A claim is a statement about one number, a bar, and the least number of samples that may decide it.
Verdicts come from the 95% interval alone, see :func:`verdict`. Of a swept method only runs with the
paper's own parameters are judged (a budget may have changed window and threshold): picking the best
of a sweep would not be a test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from buzz import BuzzPolicy
from evals.metrics import STATISTICS, resampled
from evals.records import Record
from evals.report.runs import (
    Floats,
    Interval,
    Run,
    bootstrap,
    interval_of,
    length_bin,
    pairs,
    reference_of,
)
from evals.tasks.longbench import CATEGORIES

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided at this n", "not run"
SUMMARIES = ("cnn_dailymail", "xsum")
LONG = 30_000  # tokens of a prompt that counts as one of 32K
SHORT = 4_096
QUALITY, MEMORY = 0.99, 2.5


@dataclass(frozen=True)
class Measurement:
    """One number with its 95% interval.

    Attributes:
        n: samples behind it.
        of: the runs it compares, in words.
        condition: the verdict on something that the claim takes for granted; "holds" if nothing.
    """

    value: float | None
    interval: Interval
    n: int
    model: str
    machine: str
    of: str
    condition: str = HOLDS


@dataclass(frozen=True)
class Claim:
    """A statement that runs can confirm or refute.

    Attributes:
        unit: what the number is.
        bar: the least value (`at_least`) or the largest for which the statement is true.
        least_n: samples below which nothing is decided.
    """

    statement: str
    unit: str
    bar: float
    at_least: bool
    least_n: int
    source: str
    measure: Callable[[Sequence[Run]], Iterator[Measurement]]


def verdict(
    interval: Interval, bar: float, at_least: bool, n: int, least_n: int, condition: str = HOLDS
) -> str:
    """What an interval says about a statement.

    It holds if the whole interval is on the right side of the bar (which belongs to that side) and
    its condition holds; it does not if the whole interval is on the wrong side, or its condition
    does not hold; everything else is undecided.

    >>> verdict((0.991, 1.02), 0.99, True, 200, 30)
    'holds'
    >>> verdict((0.97, 1.02), 0.99, True, 200, 30)
    'undecided at this n'
    """
    if n < least_n or interval is None:
        return UNDECIDED
    low, high = interval if at_least else (-interval[1], -interval[0])
    limit = bar if at_least else -bar
    if high < limit or condition == FAILS:
        return FAILS
    return HOLDS if low >= limit and condition == HOLDS else UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim with one measurement, or with none if it was not run."""

    claim: Claim
    measured: Measurement | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return NOT_RUN
        m, c = self.measured, self.claim
        return verdict(m.interval, c.bar, c.at_least, m.n, c.least_n, m.condition)


def judge(runs: Sequence[Run]) -> list[Judged]:
    """Every claim with every measurement that bears on it."""
    judged = []
    for claim in CLAIMS:
        measured = list(claim.measure(runs))
        judged += [Judged(claim, m) for m in measured] or [Judged(claim, None)]
    return judged


def is_papers(run: Run) -> bool:
    """Whether a run is BUZZ with the paper's parameters, apart from what a budget sets."""
    attention = {"positions": "cache", "logn_base": None, "logn_clamp": False}
    defaults = dataclasses.asdict(BuzzPolicy()) | attention
    return run.method == "buzz" and run.scored and run.parameters == defaults


def _with_full(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """The paper's BUZZ beside the full cache, at every budget and on every task that was run."""
    for run in runs:
        full = reference_of(run, runs) if is_papers(run) else None
        if full:
            yield run, full


def _summaries(runs: Sequence[Run]) -> Iterator[tuple[Run, Run, set[str] | None]]:
    for run, full in _with_full(runs):
        if run.task in SUMMARIES:
            yield run, full, None
        elif run.task == "longbench":
            present = {record["group"] for record in run.ran}
            if groups := present.intersection(CATEGORIES["summarization"]):
                yield run, full, groups


def _quality(run: Run, full: Run, groups: set[str] | None = None) -> Measurement:
    """Score over the full cache's, of the samples that both have."""
    headline = run.summary["headline"]
    found = pairs(run, full, lambda r: r.get("blocks") or [r["scores"][headline]])
    values = [v for group, v in found.items() if groups is None or group in groups]
    finish = STATISTICS[run.summary["statistic"]]
    return _ratio(run, values, _over(finish))


def _cost(
    run: Run, full: Run, name: str, keep: Callable[..., bool] = lambda r: True
) -> Measurement:
    """A measurement's mean over the full cache's."""
    found = pairs(run, full, lambda r: [r[name] if keep(r) else None])
    return _ratio(run, [[pair for group in found.values() for pair in group]], _over())


def _over(finish: Callable[[Floats], Floats] = lambda x: x) -> Callable[[Floats], Floats]:
    def ratio(means: Floats) -> Floats:
        own, theirs = finish(means[..., 0]), finish(means[..., 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            return own / theirs

    return ratio


def _ratio(
    run: Run, groups: list[list[tuple[float, float]]], of: Callable[[Floats], Floats]
) -> Measurement:
    groups = [group for group in groups if group]
    value = None
    if groups:
        found = float(of(np.mean([np.mean(group, axis=0) for group in groups], axis=0)))
        value = found if math.isfinite(found) else None
    return Measurement(
        value, bootstrap(groups, of), sum(map(len, groups)), run.model, run.machine, _what(run)
    )


def _what(run: Run) -> str:
    budget = "its own sizes" if run.budget is None else f"budget {run.budget}"
    return f"{run.task}, {budget}"


def _judged(claim: Measurement, bar: float, at_least: bool = True, least_n: int = 30) -> str:
    return verdict(claim.interval, bar, at_least, claim.n, least_n)


def _reduction(run: Run, full: Run) -> Measurement:
    return _inverse(_cost(run, full, "kv_nbytes_mean"))


def _inverse(m: Measurement) -> Measurement:
    return dataclasses.replace(
        m,
        value=1 / m.value if m.value else None,
        interval=(1 / m.interval[1], 1 / m.interval[0]) if m.interval else None,
    )


def quality_kept(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Of runs that hold no more than the full cache's bytes over MEMORY."""
    for run, full, groups in _summaries(runs):
        reduction = _reduction(run, full).value
        if reduction is not None and reduction >= MEMORY:
            found = _quality(run, full, groups)
            yield dataclasses.replace(found, of=f"{found.of}, KV / {reduction:.1f}")


def memory_saved(runs: Sequence[Run]) -> Iterator[Measurement]:
    """On condition that quality is kept."""
    for run, full, groups in _summaries(runs):
        kept = _judged(_quality(run, full, groups), QUALITY)
        yield dataclasses.replace(_reduction(run, full), condition=kept)


def better_than_others(runs: Sequence[Run]) -> Iterator[Measurement]:
    """10-QA: points over the best other evicting method of the same budget."""
    for run in runs:
        if run.task != "nq10" or not is_papers(run) or run.budget is None:
            continue
        others = [
            other
            for other in runs
            if other.setting == run.setting
            and other.budget == run.budget
            and other.scored
            and not other.method.startswith("buzz")
            and other.method != "full"
        ]
        if not others:
            continue
        best = max(others, key=lambda other: other.score() or 0)
        headline = run.summary["headline"]
        found = pairs(run, best, lambda r, name=headline: [100 * r["scores"][name]])
        values = list(found.values())
        measured = _ratio(run, values, lambda means: means[..., 0] - means[..., 1])
        yield dataclasses.replace(measured, of=f"{measured.of}, against {best.method}")


def faster_at_32k(runs: Sequence[Run]) -> Iterator[Measurement]:
    for run, full in _with_full(runs):
        if run.machine == full.machine:
            found = _cost(run, full, "decode_tokens_per_s", lambda r: r["prompt_tokens"] >= LONG)
            if found.n:
                yield found


def latency_alone(runs: Sequence[Run]) -> Iterator[Measurement]:
    for run, full in _with_full(runs):
        if run.machine == full.machine:
            found = _cost(
                run, full, "itl_p50_ms", lambda r: _alone(r) and r["prompt_tokens"] < SHORT
            )
            if found.n:
                yield found


def _alone(record: Record) -> bool:
    """Whether a sample was answered (not read), in a batch of one."""
    return record["batch_size"] == 1 and record["generated_tokens"] > 0


def growth(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Time per token at the longest prompts over that at the shortest, relative to log n's growth.

    A budget that is a fraction of the prompt grows the cache by design and says nothing here.
    """
    series: dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]] = {}
    for run in runs:
        if is_papers(run) and not isinstance(run.budget, float):
            key = (run.model, run.machine, str(run.budget))
            for record in run.ran:
                if record["itl_p50_ms"] is not None and _alone(record):
                    bins = series.setdefault(key, {})
                    point = (record["itl_p50_ms"], math.log(record["prompt_tokens"]))
                    bins.setdefault(length_bin(record["prompt_tokens"]), []).append(point)
    for (model, machine, budget), bins in series.items():
        low, high = min(bins), max(bins)
        if high < 4 * low:
            continue
        ends = np.stack([np.mean(bins[end], axis=0) for end in (low, high)])
        boot = [resampled([bins[end]]) for end in (low, high)]
        interval = None
        if boot[0] is not None and boot[1] is not None:
            interval = interval_of(_growth(np.stack(boot)))
        n = len(bins[low]) + len(bins[high])
        what = f"prompts of about {low:,} and {high:,} tokens, budget {budget}"
        yield Measurement(float(_growth(ends)), interval, n, model, machine, what)


def _growth(ends: Floats) -> Floats:
    (short, long) = ends
    return (long[..., 0] / short[..., 0]) / (long[..., 1] / short[..., 1])


def spread_facts(runs: Sequence[Run]) -> Iterator[Measurement]:
    for run, full in _with_full(runs):
        if run.task == "needle" and run.config["task"].get("variant", "single") != "single":
            found = _quality(run, full)
            yield dataclasses.replace(found, of=f"{found.of}, {run.config['task']['variant']}")


def sensitivity(parameter: str) -> Callable[[Sequence[Run]], Iterator[Measurement]]:
    """Best less worst score over values of one parameter, all else equal, over the full score."""

    def measure(runs: Sequence[Run]) -> Iterator[Measurement]:
        for swept in families(runs, parameter):
            full = reference_of(swept[0], runs)
            if full is None:
                continue
            name = swept[0].summary["headline"]
            scores = [{r["id"]: r["scores"][name] for r in run.ran} for run in (*swept, full)]
            ids = [i for i in scores[0] if all(i in other for other in scores)]
            if not ids:
                continue
            values = [tuple(other[i] for other in scores) for i in ids]
            found = _ratio(swept[0], [values], _range)
            values_text = ", ".join(str(run.parameters[parameter]) for run in swept)
            fixed = " ".join(
                f"{key}={swept[0].parameters[key]}"
                for key in ("sink", "window", "stride", "threshold")
                if key != parameter
            )
            of = f"{found.of}, {parameter} {values_text} with {fixed}"
            yield dataclasses.replace(found, of=of)

    return measure


def _range(means: Floats) -> Floats:
    swept, full = means[..., :-1], means[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (swept.max(-1) - swept.min(-1)) / full


def families(runs: Sequence[Run], parameter: str) -> list[list[Run]]:
    """Runs of one method, setting and budget that differ in one parameter alone, by its value."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.scored and parameter in run.parameters:
            others = {k: v for k, v in run.parameters.items() if k != parameter}
            key = f"{run.setting} {run.method} {run.budget} {sorted(others.items(), key=str)}"
            found.setdefault(key, []).append(run)
    several = [family for family in found.values() if len(family) > 1]

    def value(run: Run) -> tuple[bool, bool, Any]:
        own = run.parameters[parameter]
        return own is not None, isinstance(own, str), own

    return [sorted(family, key=value) for family in several]


PAPER = "arXiv 2410.23079, abstract"
LIMIT = "a limit that reviewers name"

CLAIMS = (
    Claim(
        "At 2.5x less KV memory, long-text summaries keep 99% of the full cache's quality",
        "score / full cache's",
        QUALITY,
        True,
        30,
        PAPER,
        quality_kept,
    ),
    Claim(
        "KV memory shrinks 2.5x at 99% of the full cache's quality",
        "full cache's mean KV bytes / BUZZ's",
        MEMORY,
        True,
        30,
        PAPER,
        memory_saved,
    ),
    Claim(
        "10-QA: 7.69 points over the best other method at equal memory",
        "points",
        7.69,
        True,
        30,
        PAPER,
        better_than_others,
    ),
    Claim(
        "Decoding is 1.3x to 1.5x faster at 32K tokens",
        "tokens per second / full cache's",
        1.3,
        True,
        5,
        "an expectation of this project, not a published number",
        faster_at_32k,
    ),
    Claim(
        "Time per token grows with the prompt no faster than log n",
        "growth / growth of log n",
        1.0,
        False,
        10,
        f"{PAPER}: cache maintenance in log n; measured on whole decoding steps",
        growth,
    ),
    Claim(
        "Work that is not parallel (batch of 1, prompts below 4K) is not slowed down",
        "time per token / full cache's",
        1.0,
        False,
        5,
        LIMIT,
        latency_alone,
    ),
    Claim(
        "Important facts spread widely over the prompt are found as with the full cache",
        "score / full cache's",
        QUALITY,
        True,
        30,
        LIMIT,
        spread_facts,
    ),
    Claim(
        "The score depends little on the window: best less worst within 10% of the full cache's",
        "range of scores / full cache's score",
        0.1,
        False,
        30,
        LIMIT,
        sensitivity("window"),
    ),
    Claim(
        "The score depends little on the sink: best less worst within 10% of the full cache's",
        "range of scores / full cache's score",
        0.1,
        False,
        30,
        LIMIT,
        sensitivity("sink"),
    ),
)
