"""Verdicts on the statements of claims.yaml, from a frame of samples.

The 95 % interval alone decides, see :func:`verdict`. Only BUZZ with the paper's parameters is
judged, because the best row of a sweep was chosen for its score; a budget may have set window and
threshold. Times are judged over processes, because clocks, memory layout and other load differ
between processes and hardly within one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from buzz import BuzzPolicy
from evals.report.table import Table
from evals.report.views import (
    budget_text,
    families,
    flat,
    held,
    lengths,
    mark,
    of_budget,
    parameters_of,
    settings,
    unknown,
)
from evals.results.frame import (
    INVERSES,
    MARK,
    NOT_RUN,
    NOTHING,
    REFERENCE,
    SAME,
    TOLERANCE,
    Estimate,
    Weights,
    ends,
    estimate,
    interval,
    means,
    partner,
    quotient,
    strata,
)

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this n"
UNEQUAL = "not at equal memory"
PAPERS_MODEL = "Llama-2-7B"
ELSEWHERE = f"not run on {PAPERS_MODEL}"
PROCESSES = 5  # the least number for a verdict on speed
SMALL = 1_000_000_000  # verdicts on a model with fewer parameters are about that model alone
LONGER = 4  # growth needs prompts so many times longer than the shortest
OWN, INVERSE = ((1, 0), (0, 1)), ((0, 1), (1, 0))  # weights for method / full and full / method


@dataclass(frozen=True)
class Claim:
    """A statement that runs can confirm or refute. claims.yaml explains the fields."""

    statement: str
    unit: str
    bar: float
    source: str
    measure: str
    metric: str = "score"
    against: str = REFERENCE
    inverse: bool = False
    topic: str | None = None
    where: str | None = None
    per: str | None = None
    by: str | None = None
    needs: Mapping[str, Any] | None = None
    condition: Mapping[str, Any] | None = None
    relative: bool = False
    parameter: str = ""
    more: str = ""
    at_least: bool = True
    least_n: int = 30
    of_papers_model: bool = False
    top: float | None = None

    @property
    def bar_text(self) -> str:
        if self.top is not None:
            return f"{self.bar:g} to {self.top:g}"
        return f"{'≥' if self.at_least else '≤'} {self.bar:g}"

    @property
    def origin(self) -> str:
        return "; ".join(filter(None, [SPEC["sources"][self.source], self.more]))


SPEC = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
CLAIMS = tuple(Claim(**one) for one in SPEC["claims"])


@dataclass(frozen=True)
class Measurement:
    """One number with its 95 % interval.

    Attributes:
        of: the compared rows, in words.
        condition: the verdict on the claim's condition.
        memory: ratios of memory, if a claim about equal memory has rows of unequal memory.
        processes: the number of independent processes behind a time.
        limits: why the verdict is about this model alone; None if it is not.
        papers_model: whether the paper's claims are about this model.
    """

    number: Estimate
    model: str
    machine: str
    of: str
    condition: str = HOLDS
    memory: tuple[float, ...] = ()
    processes: int | None = None
    limits: str | None = None
    papers_model: bool = True


def verdict(found: Estimate, claim: Claim, condition: str = HOLDS) -> str:
    """The verdict on a claim from an interval.

    HOLDS: the whole interval is on the right side of the bar (or touches it), and the condition
    holds. FAILS: the whole interval is on the wrong side, or the condition fails. UNDECIDED:
    anything else, or too few samples.
    """
    if found.n < claim.least_n or found.low is None or found.high is None:
        return UNDECIDED
    sign = 1 if claim.at_least else -1
    low, high = sorted((sign * found.low, sign * found.high))
    if high < sign * claim.bar or condition == FAILS:
        return FAILS
    return HOLDS if low >= sign * claim.bar and condition == HOLDS else UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim with one measurement, or None if no run bears on it."""

    claim: Claim
    measured: Measurement | None

    @property
    def kind(self) -> str:
        """HOLDS, FAILS, UNDECIDED, UNEQUAL, NOT_RUN, or ELSEWHERE (run on another model only)."""
        return self._said[0]

    @property
    def verdict(self) -> str:
        """The kind in words, with its limits."""
        return self._said[1]

    @property
    def _said(self) -> tuple[str, str]:
        m, claim = self.measured, self.claim
        if m is None:
            return NOT_RUN, NOT_RUN
        kind, text = _found(claim, m)
        if m.limits is None:
            other = claim.of_papers_model and not m.papers_model
            return kind, f"{text}, on {m.model}" if other else text
        where = f"{m.model} ({m.limits})"
        if claim.of_papers_model:
            return ELSEWHERE, f"{ELSEWHERE}; on {where}: {text}"
        return kind, f"{text}, for {where} alone"


def _found(claim: Claim, m: Measurement) -> tuple[str, str]:
    """Kind and text of the verdict on the measured model."""
    if m.memory:
        apart = dict.fromkeys(f"{ratio:.2f}x" for ratio in (min(m.memory), max(m.memory)))
        return UNEQUAL, f"{UNEQUAL}: {' to '.join(apart)}"
    if m.processes is not None and m.processes < PROCESSES:
        return UNDECIDED, f"undecided: needs {PROCESSES} processes, has {m.processes}"
    kind = verdict(m.number, claim, m.condition)
    if kind != HOLDS or claim.top is None:
        return kind, kind
    within, above = m.number.low <= claim.top, m.number.high > claim.top
    where = " or ".join(["within"] * within + ["above"] * above)
    return kind, f"{kind}, {where} {claim.bar_text}"


def judge(rows: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> list[Judged]:
    """Judges every claim by every measurement that bears on it. Unfinished rows do not count."""
    whole = rows.status.ne(NOT_RUN).groupby([rows.setting, rows.row]).transform("all")
    tasks = rows.task_settings.map(lambda told: told if isinstance(told, dict) else {})
    rows = rows.assign(variant=[told.get("variant", "single") for told in tasks])
    rows["process"] = rows.process.astype(object).fillna("unknown")  # counts as one
    rows = rows[whole.astype(bool) & (rows.status == "ok")]
    full = {name: partner(rows, name) for name in {claim.against for claim in claims}}
    judged = []
    for claim in claims:
        own = rows.query(SPEC["topics"][claim.topic]) if claim.topic else rows
        own = own.query(claim.where) if claim.where and len(own) else own
        measured = list(MEASURES[claim.measure](claim, own, full[claim.against]))
        judged += [Judged(claim, one) for one in measured] or [Judged(claim, None)]
    return judged


# Which rows are judged


def is_papers(part: pd.DataFrame) -> bool:
    """Whether a part is BUZZ with the paper's parameters, except for those that a budget sets.

    A budget sets the sizes and how a long prompt is compacted. A row with a budget and sizes set
    by hand belongs to a sweep.
    """
    one = part.iloc[0]
    if one.method != "buzz":
        return False
    own = parameters_of(one)
    paper = dataclasses.asdict(BuzzPolicy())
    paper |= {"logn_base": None, "logn_clamp": False, "positions": "cache", "dtype": None}
    paper |= {"granularity": "token", "page_score": "mean", "heads": "each"}
    if not unknown(one.budget):
        if own.get("compact") == "widen":
            own["compact"] = paper["compact"]
        if {"window", "threshold"}.intersection(one.fixed):
            return False
    return paper | own == paper


def limits(one: pd.Series) -> str | None:
    """Why a verdict is about the row's model alone; None if it is not."""
    count = one.model_parameters
    if isinstance(one.model_settings, dict) and "hidden_size" in one.model_settings:
        return "random weights"
    if unknown(count):
        return "a model of unknown size"
    return f"{count / 1e6:,.0f}M parameters" if count < SMALL else None


def is_papers_model(one: pd.Series) -> bool:
    """Whether the paper's claims are about the row's model."""
    told = one.model_settings if isinstance(one.model_settings, dict) else {}
    path = str(told.get("name_or_path") or "").rstrip("/").lower()
    named = one.model.startswith("llama2_7b") or path.rpartition("/")[2].startswith("llama-2-7b")
    return named and limits(one) is None


def _measured(
    part: pd.DataFrame, number: Estimate, more: str = "", topic: str = "", **known: Any
) -> Measurement:
    one = part.iloc[0]
    task = f"{one.task} ({topic})" if topic and one.group else one.task
    budget = "its own sizes" if unknown(one.budget) else f"budget {budget_text(part)}"
    over = f" (holds {held(part):.2f}x)" if mark(part) else ""
    of = f"{task}, {budget}{over}{more}"
    whose = {"limits": limits(one), "papers_model": is_papers_model(one)}
    return Measurement(number, one.model, one.machine, of, **whose, **known)


# What is measured


def _ratio(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    if claim.per:
        yield from _over_processes(claim, rows, full)
        return
    for part in filter(is_papers, _by_row(rows, claim)):
        other = full.loc[part.index]
        if not (other.status == "ok").any():
            continue
        more = ""
        if needs := claim.needs:
            saved = _beside(part, other, needs["metric"], needs["inverse"]).value
            if saved is None or saved < needs["bar"]:
                continue
            more = f", allocated / {saved:.1f}"
        condition = HOLDS
        if claim.condition:
            kept = _beside(part, other, claim.condition["metric"], False)
            condition = verdict(kept, dataclasses.replace(claim, bar=claim.condition["bar"]))
        found = _beside(part, other, claim.metric, claim.inverse)
        if found.n or claim.where is None:
            yield _measured(part, found, more, claim.topic or "", condition=condition)


def _by_row(rows: pd.DataFrame, claim: Claim) -> list[pd.DataFrame]:
    parts = flat(settings(rows))
    return [
        one for part in parts for _, one in (part.groupby(claim.by) if claim.by else [(0, part)])
    ]


def _beside(part: pd.DataFrame, other: pd.DataFrame, metric: str, inverse: bool) -> Estimate:
    """The ratio of a metric to the full cache's, over the samples that both have."""
    turned = inverse or (metric == "score" and not part.higher_is_better.iloc[0])
    found = estimate(part, metric, other, INVERSE if turned else OWN, guard=True)
    if metric == "score" and part.blocks.map(lambda one: isinstance(one, list)).any():
        return found._replace(n=int(part.blocks[other.score.notna()].map(len).sum()))
    return found


def _lead(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """BUZZ's lead over the best other method of the same budget that held equal memory.

    Methods of the same budget with unequal memory are listed with their ratios, undecided. Rows
    without a budget count as of the same one.
    """
    for parts in settings(rows).values():
        for part in filter(is_papers, parts.values()):
            one = part.iloc[0]
            equal, unequal = [], []
            for other in parts.values():
                its = other.iloc[0]
                same = str((its.budget, its.budget_by)) == str((one.budget, one.budget_by))
                rival = same and its.method != REFERENCE and not its.method.startswith("buzz")
                if rival and (ratio := at_equal_memory(part, other)):
                    (equal if is_equal(ratio) else unequal).append((other, ratio))
            if equal:
                best, _ = max(equal, key=lambda pair: estimate(pair[0]).value or 0)
                name = best.iloc[0].label + mark(best)
                yield _leading(claim, part, [other for other, _ in equal], name)
            if unequal:
                shown = ", ".join(
                    f"{other.iloc[0].label}{mark(other)}"
                    f"{f' (holds {held(other):.2f}x)' if mark(other) else ''} at {ratio:.2f}x"
                    for other, ratio in unequal
                )
                others = [other for other, _ in unequal]
                lead = _leading(claim, part, others, f"{shown} of its bytes")
                yield dataclasses.replace(lead, memory=tuple(ratio for _, ratio in unequal))


def _leading(
    claim: Claim, part: pd.DataFrame, others: list[pd.DataFrame], best: str
) -> Measurement:
    values, names = together(part, others)
    known, low, high = (
        least_lead(*strata(values, **names), claim.relative) if len(values) else [None] * 3
    )
    number = [
        None if one is None or not np.isfinite(one) else 100 * float(one)
        for one in (known, low, high)
    ]
    return _measured(part, Estimate(*number, len(values)), f", against {best}")


def least_lead(
    groups: Sequence[Any], joint: bool = False, relative: bool = False
) -> tuple[Any, Any, Any]:
    """The first method's lead over the best other one, with both ends of its interval.

    The lead over the best is the least lead over any. So the lower end is the least lower end of
    all leads, and the upper end the least upper end. The upper ends are corrected for the number
    of others (Bonferroni), because the best of them is chosen by its score.

    Args:
        groups: scores [n, methods, ...].
        relative: whether the lead is divided by the other's score. That score may be 0, so the
            interval is computed for the inverse, the other's score over the first's.
    """
    own, *others = np.eye(groups[0].shape[1])
    pairs = [(other, own) if relative else (own - other, None) for other in others]
    value = [quotient(means(groups), of) for of in pairs]
    (low, high), (low_shared, high_shared) = ends_of_all(groups, pairs, "mean", joint)
    if not relative:
        return tuple(np.min(one, axis=0) for one in (value, low, high_shared))
    shares = (np.max(one, axis=0) for one in (value, high, low_shared))
    with np.errstate(divide="ignore"):
        return tuple(np.where(share > 0, 1 / share - 1, np.inf + 0 * share) for share in shares)


def ends_of_all(
    groups: Sequence[Any], pairs: Sequence[Weights], statistic: str, joint: bool
) -> Any:
    """Ends of several comparisons' intervals: [plain or corrected, low or high, comparisons, ...].

    Corrected: at a level for all of them together (Bonferroni).
    """
    return np.array(
        [
            np.stack([ends(groups, of, statistic, 1 - p, True, together=joint) for of in pairs], 1)
            for p in (0.05, 0.05 / len(pairs))
        ]
    )


def together(part: pd.DataFrame, others: list[pd.DataFrame]) -> tuple[Any, dict[str, Any]]:
    """Scores of the samples that all parts have, [n, methods], and their groups and units."""
    joined = part.set_index(SAME)
    sides = [other.set_index(SAME).score.reindex(joined.index) for other in others]
    values = np.stack([joined.score, *sides], -1).astype(float)
    known = np.isfinite(values).all(axis=1)
    return values[known], {name: joined[name].to_numpy(object)[known] for name in ("group", "unit")}


def at_equal_memory(own: pd.DataFrame, other: pd.DataFrame) -> float | None:
    """The ratio of the bytes of keys and values that two methods hold, on the samples of both.

    Bytes held, not allocated, in the layers that evict, which a budget governs. With `peak` budgets
    peak bytes are compared, otherwise mean bytes.
    """
    peak = own.budget_by.eq("peak").all() and other.budget_by.eq("peak").all()
    measure = "nbytes_peak" if peak else "nbytes_mean"
    own, other = (
        part.assign(held=part[f"kv_evicting_{measure}"].fillna(part[f"kv_{measure}"]))
        for part in (own, other)
    )
    both = own.merge(other, on="id", suffixes=("", "_other"))
    mine, theirs = both.held.sum(), both.held_other.sum()
    return float(mine / theirs) if theirs else None


def is_equal(ratio: float) -> bool:
    """Whether two methods with this ratio of memory held equal memory."""
    return ratio > 0 and max(ratio, 1 / ratio) <= 1 + TOLERANCE


def _spread(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    for family in families(rows, claim.parameter):
        parts, first = list(family.values()), next(iter(family.values()))
        reference = full.loc[first.index]
        if first.method.iloc[0] != "buzz" or reference.score.isna().all():
            continue
        values, names = together(first, [*parts[1:], reference])
        if not len(values):
            continue
        statistic = first.statistic.iloc[0]
        parts_of, joint = strata(INVERSES[statistic](values), **names)
        scores = means(parts_of, statistic)
        low, high = (float(end) for end in widest_gap(parts_of, statistic, joint))
        both = (low, high) if np.isfinite([low, high]).all() else (None, None)
        number = Estimate(float(np.ptp(scores[:-1]) / scores[-1]), *both, len(values))
        pairs = [at_equal_memory(a, b) for a, b in permutations(parts, 2)]
        apart = max(filter(None, pairs), default=1.0)
        own, other = parameters_of(first.iloc[0]), {claim.parameter} | of_budget(first.iloc[0])
        told = ", ".join(f"{value}{mark(part)}" for value, part in family.items())
        named = [one for one in ("sink", "window", "stride", "threshold") if one in own]
        fixed = " ".join(f"{key}={own[key]}" for key in named if key not in other)
        memory = () if is_equal(apart) else (apart,)
        yield _measured(first, number, f", {claim.parameter} {told} with {fixed}", memory=memory)


def widest_gap(
    groups: Sequence[Any], statistic: str = "mean", joint: bool = False
) -> tuple[Any, Any]:
    """Ends of the interval of (best - worst) / last, over all methods but the last.

    Best less worst is the largest of all differences. So the upper end is the largest upper end of
    all differences, and the lower end the largest lower end, corrected for their number
    (Bonferroni). A bootstrap of best less worst itself would find a gap between equal settings.
    """
    eye = np.eye(groups[0].shape[1])
    pairs = [(a - b, eye[-1]) for a, b in permutations(eye[:-1], 2)]
    (_, high), (low, _) = ends_of_all(groups, pairs, statistic, joint)
    return np.maximum(np.max(low, axis=0), 0), np.max(high, axis=0)


def _over_processes(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """The ratio of a time to the full cache's, on the same prompts and machine.

    Settings that differ only in the seed are repeats.
    """
    pools: dict[str, list[pd.DataFrame]] = {}
    for part in filter(is_papers, _by_row(rows, claim)):
        other, metric = full.loc[part.index], claim.metric
        both = part.timed & other.timed.eq(True) & ~part.loaded & other.loaded.eq(False)
        if claim.by:
            both &= part[claim.by] == other[claim.by]
        both &= (part.machine == other.machine) & part[metric].notna() & other[metric].notna()
        if both.any():
            chosen = part[both].assign(
                theirs=other[metric][both], other_process=other.process[both]
            )
            one = part.iloc[0]
            told = {k: v for k, v in (one.task_settings or {}).items() if k != "seed"}
            where = [told, one.model_settings, one.budget, one.budget_by, one.machine]
            by = part[claim.by].iloc[0] if claim.by else None
            pools.setdefault(str([*where, by]), []).append(chosen)
    for pool in pools.values():
        chosen = pd.concat(pool)
        # Independent units share no process: connected components of the pairs of processes.
        codes = pd.factorize(pd.concat([chosen.process, chosen.other_process]))[0]
        own, theirs = codes[: len(chosen)], codes[len(chosen) :]
        size = codes.max() + 1
        pairs = coo_matrix((np.ones(len(own)), (own, theirs)), (size, size))
        units = connected_components(pairs, directed=False)[1][own]
        times = chosen.groupby(units)[[claim.metric, "theirs"]].mean().astype(float)
        more = f", batches of {int(chosen.batch_size.iloc[0])}" if claim.by else ""
        yield _timed(chosen, times[claim.metric] / times.theirs, len(chosen), more)


def _timed(part: pd.DataFrame, ratios: Any, n: int, more: str) -> Measurement:
    """The geometric mean of the ratios of independent processes."""
    found = interval(np.log(np.asarray(ratios, float)), statistic="exp", guard=True)
    return _measured(part, found._replace(n=n), more, processes=len(ratios))


def _growth(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """Growth of the time per token from the shortest to the longest prompts, over that of log n.

    It is measured in each process that has both lengths. Rows with a fraction as budget are left
    out, because their cache grows with the prompt.
    """
    usable = rows[rows.timed & ~rows.loaded & rows.itl_p50_ms.notna()]
    pools: dict[str, list[pd.DataFrame]] = {}
    for part in filter(is_papers, flat(settings(usable))):
        one = part.iloc[0]
        if not isinstance(one.budget, float) or unknown(one.budget):
            told = [one.model_settings, one.machine, one.budget, one.budget_by]
            pools.setdefault(str(told), []).append(part)
    for pool in pools.values():
        part = pd.concat(pool)
        binned = lengths(part)
        ends = binned.min(), binned.max()
        if ends[1] < LONGER * ends[0]:
            continue
        part = part[binned.isin(ends)].assign(
            length=binned, log=np.log(part.prompt_tokens.astype(float))
        )
        own = part.groupby(["process", "length"])[["itl_p50_ms", "log"]].mean().unstack()
        own = own.dropna().astype(float)
        time, log = (own[name][ends[1]] / own[name][ends[0]] for name in ("itl_p50_ms", "log"))
        what = f", prompts of about {ends[0]:,} and {ends[1]:,} tokens"
        yield _timed(part, time / log, len(part), what)


MEASURES: dict[str, Callable[[Claim, pd.DataFrame, pd.DataFrame], Iterator[Measurement]]] = {
    "ratio": _ratio,
    "lead": _lead,
    "spread": _spread,
    "growth": _growth,
}


def table(judged: list[Judged]) -> Table:
    """A line for each claim and measurement."""
    lines = []
    for one in judged:
        m = one.measured
        number = m.number if m else NOTHING
        lines.append(
            {
                "claim": one.claim.statement,
                "number": one.claim.unit,
                "bar": one.claim.bar_text,
                "measured": number.value if m else NOT_RUN,
                "measured low": number.low,
                "measured high": number.high,
                "n": number.n,
                "processes": m.processes if m and m.processes is not None else "",
                "of": m.of if m else "",
                "model": m.model if m else "",
                "machine": m.machine if m else "",
                "verdict": one.verdict,
                "source of the claim": one.claim.origin,
            }
        )
    note = (
        "holds: the whole 95% interval is on the right side of the bar (and quality is kept, where"
        " the claim says so); does not hold: it is wholly on the other side; undecided: anything"
        " else, or too few samples. Intervals are bootstrap intervals that count one more sample on"
        " either side, as far out as any seen; those of times are over processes, of which a"
        f" verdict needs {PROCESSES}. {UNEQUAL}: bytes held, as measured, differ by more than"
        f" {TOLERANCE:.0%}; behind it the ratio. Memory is judged by the bytes that are allocated."
        " Models below 1B parameters or of random weights speak for themselves alone. Only BUZZ"
        " with the paper's parameters counts, except for sensitivity."
    )
    if any(one.measured and MARK in one.measured.of for one in judged):
        note += f" {MARK} holds over {TOLERANCE:.0%} more than its budget."
    return Table("claims", "Claim by claim", pd.DataFrame(lines, dtype=object), note)
