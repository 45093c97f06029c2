"""What claims on scores and memory measure: BUZZ beside the full cache, its rivals, and itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evals.report.chosen import families, is_papers, together, with_full
from evals.report.intervals import Means, least_lead, widest_gap
from evals.report.kinds import about, kind
from evals.report.marks import budget_text, held, is_papers_model, limits, mark
from evals.report.verdicts import LEAST_N, Measurement, verdict
from evals.results.compare import REFERENCE, draws
from evals.results.equal_memory import at_equal_memory, is_equal
from evals.results.runs import Run, reference_of
from evals.results.schema import Record
from evals.results.statistics import Floats, Interval, bootstrap, mean

QUALITY, MEMORY = 0.99, 2.5
BEYOND = 32_768  # tokens of a prompt


def measured(
    run: Run, value: float | None, interval: Sequence[float] | None, n: int, of: str, **more: Any
) -> Measurement:
    """A number of a run's; what is not finite counts as unknown."""
    known = value is not None and math.isfinite(value)
    ends: Interval = None
    if interval is not None and np.isfinite(interval).all():
        ends = float(interval[0]), float(interval[1])
    return Measurement(
        value if known else None,
        ends,
        n,
        run.model,
        run.machine,
        of,
        limits=limits(run),
        papers_model=is_papers_model(run),
        **more,
    )


def described(run: Run) -> str:
    """What a run is of, in words; of one that exceeds its budget with the mark and by how much."""
    budget = "its own sizes" if run.budget is None else f"budget {budget_text(run, held(run))}"
    return f"{run.task}, {budget}{_over(run)}"


def _over(run: Run) -> str:
    return f" (holds {held(run):.2f}x)" if mark(run) else ""


def quality(
    run: Run,
    full: Run,
    groups: Iterable[str] | None = None,
    keep: Callable[[Record], bool] = lambda record: True,
) -> Measurement:
    """Score over the full cache's, of the samples that both have; inverted where less is better.

    Args:
        groups: which to take; None for all.
    """
    headline = run.summary["headline"]
    found = together([run, full], lambda r: draws(r, headline) if keep(r) else [])
    values = [v for group, v in found.items() if groups is None or group in groups]
    own, theirs = np.eye(2) if run.summary["higher_is_better"] else np.eye(2)[::-1]
    value, interval = _of(values, run, lambda m: (m.value(own, theirs), m.bounds(own, theirs)))
    return measured(run, value, interval, sum(map(len, values)), described(run))


def _of(
    groups: Sequence[Sequence[Any]], run: Run, find: Callable[[Means], tuple[Any, Any]]
) -> tuple[float | None, Interval]:
    """A value and its interval, unknown without samples; the interval also with one in a group."""
    if not groups:
        return None, None
    value, interval = find(Means.of(groups, run.summary["statistic"]))
    return float(value), None if min(map(len, groups)) < 2 else interval


def reduction(run: Run, full: Run) -> Measurement:
    """The full cache's allocated bytes of keys and values over BUZZ's, a sample."""
    found = together([run, full], lambda record: [allocated(record)])
    pairs = [pair for group in found.values() for pair in group]

    def ratio(means: Floats) -> Floats:
        return means[..., 1] / means[..., 0]

    value = float(ratio(np.mean(pairs, axis=0))) if pairs else None
    return measured(run, value, bootstrap([pairs], of=ratio), len(pairs), described(run))


def allocated(record: Record) -> float | None:
    """Bytes of all buffers of a sample's cache: its share of the batch's."""
    nbytes = record.get("allocated_nbytes")
    return None if nbytes is None else nbytes / record["batch_size"]


def mean_allocated(records: Iterable[Record]) -> float | None:
    """Mean of :func:`allocated`."""
    return mean(map(allocated, records))


def _about(runs: Sequence[Run], topic: str) -> Iterator[tuple[Run, Run, set[str] | None]]:
    """Runs that have samples about a topic, the full cache's, and the groups that these are."""
    for run, full in with_full(runs):
        groups = about(run, topic)
        if groups is None or groups:
            yield run, full, groups


def quality_kept(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Of runs that allocate no more than the full cache's bytes over MEMORY."""
    for run, full, groups in _about(runs, "summaries"):
        saved = reduction(run, full).value
        if saved is not None and saved >= MEMORY:
            found = quality(run, full, groups)
            yield dataclasses.replace(found, of=f"{found.of}, allocated / {saved:.1f}")


def memory_saved(runs: Sequence[Run]) -> Iterator[Measurement]:
    """On condition that quality is kept."""
    for run, full, groups in _about(runs, "summaries"):
        kept = quality(run, full, groups)
        condition = verdict(kept.interval, QUALITY, True, kept.n, LEAST_N)
        yield dataclasses.replace(reduction(run, full), condition=condition)


def documents(runs: Sequence[Run]) -> Iterator[Measurement]:
    """Questions over several documents."""
    for run, full, groups in _about(runs, "documents"):
        found = quality(run, full, groups)
        if groups:
            found = dataclasses.replace(found, of=found.of.replace(run.task, "multi_doc_qa", 1))
        yield found


def beyond_32k(runs: Sequence[Run]) -> Iterator[Measurement]:
    for run, full in with_full(runs):
        if not kind(run).timed:
            found = quality(run, full, keep=lambda record: record["prompt_tokens"] > BEYOND)
            if found.n:
                yield found


def spread_facts(runs: Sequence[Run]) -> Iterator[Measurement]:
    for run, full, groups in _about(runs, "spread facts"):
        found = quality(run, full, groups)
        yield dataclasses.replace(found, of=f"{found.of}, {run.config['task']['variant']}")


def better_than_others(relative: bool) -> Callable[[Sequence[Run]], Iterator[Measurement]]:
    """10-QA: the lead over the best other evicting method of the same budget that held the same.

    Others of the same budget (or, like the run, of sizes of their own) that held more or less are
    shown with their ratios, undecided.

    Args:
        relative: in percent of the other's score instead of in points.
    """

    def measure(runs: Sequence[Run]) -> Iterator[Measurement]:
        for run in runs:
            if about(run, "10-QA") == set() or not is_papers(run):
                continue
            rivals = [(other, at_equal_memory(run.ran, other.ran)) for other in _rivals(run, runs)]
            equal = [other for other, ratio in rivals if is_equal(ratio)]
            if equal:
                best = max(equal, key=lambda other: other.score() or 0)
                yield _lead(run, equal, relative, _named(best))
            unequal = [(other, ratio) for other, ratio in rivals if ratio and not is_equal(ratio)]
            if unequal:
                shown = ", ".join(f"{_named(other)} at {ratio:.2f}x" for other, ratio in unequal)
                others = [other for other, _ in unequal]
                lead = _lead(run, others, relative, f"{shown} of its bytes")
                yield dataclasses.replace(lead, memory=tuple(ratio for _, ratio in unequal))

    return measure


def _rivals(run: Run, runs: Sequence[Run]) -> list[Run]:
    return [
        other
        for other in runs
        if other.scored
        and other.setting == run.setting
        and other.budget == run.budget
        and other.config.get("budget_by") == run.config.get("budget_by")
        and other.method != REFERENCE
        and not other.method.startswith("buzz")
    ]


def _named(run: Run) -> str:
    return f"{run.method}{mark(run)}{_over(run)}"


def _lead(run: Run, others: Sequence[Run], relative: bool, best: str) -> Measurement:
    headline = run.summary["headline"]
    values = list(together([run, *others], lambda r: [100 * r["scores"][headline]]).values())
    value, interval = _of(values, run, lambda means: least_lead(means, relative))
    if relative:
        value = None if value is None else 100 * value
        interval = interval and (100 * interval[0], 100 * interval[1])
    of = f"{described(run)}, against {best}"
    return measured(run, value, interval, sum(map(len, values)), of)


def sensitivity(parameter: str) -> Callable[[Sequence[Run]], Iterator[Measurement]]:
    """BUZZ's best less worst score over values of one parameter, all else equal, over full's."""

    def measure(runs: Sequence[Run]) -> Iterator[Measurement]:
        for swept in families([run for run in runs if run.method == "buzz"], parameter):
            full = reference_of(swept[0], runs)
            if full is None:
                continue
            headline = swept[0].summary["headline"]
            values = list(together([*swept, full], lambda r, h=headline: draws(r, h)).values())
            if values:
                yield _gap(swept, values, parameter)

    return measure


def _gap(swept: Sequence[Run], values: Sequence[Any], parameter: str) -> Measurement:
    count, run = len(swept), swept[0]

    def gap(means: Means) -> tuple[float, tuple[Floats, Floats]]:
        runs = np.eye(count + 1)
        scores = [float(means.value(runs[i], runs[-1])) for i in range(count)]
        return max(scores) - min(scores), widest_gap(means, count)

    value, interval = _of(values, run, gap)
    ratios = [at_equal_memory(a.ran, b.ran) for a, b in combinations(swept, 2)]
    apart = max((max(r, 1 / r) for r in ratios if r), default=None)
    shown = ", ".join(f"{one.parameters[parameter]}{mark(one)}" for one in swept)
    others = ("sink", "window", "stride", "threshold")
    fixed = " ".join(f"{key}={run.parameters[key]}" for key in others if key != parameter)
    return measured(
        run,
        value,
        interval,
        sum(map(len, values)),
        f"{described(run)}, {parameter} {shown} with {fixed}",
        memory=() if is_equal(apart) or apart is None else (apart,),
    )
