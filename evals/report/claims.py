"""Claim by claim: what a frame of samples says of the statements of claims.yaml.

A verdict comes from the 95 % interval alone, see :func:`verdict`. Picking the best of a sweep is no
test: of a swept method only rows with the paper's own parameters are judged (a budget may have set
window and threshold). Whatever a process happens upon (clocks, memory layout, a neighbour)
stays with it, so times are judged over processes.
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
from evals.report.table import NOT_RUN, Table
from evals.report.views import (
    budget_text,
    families,
    flat,
    held,
    length_bin,
    mark,
    parameters_of,
    settings,
    unknown,
)
from evals.results.frame import (
    INVERSES,
    MARK,
    NOTHING,
    REFERENCE,
    SAME,
    STATISTICS,
    TOLERANCE,
    Estimate,
    ends,
    estimate,
    interval,
    partner,
    strata,
)
from evals.results.frame import (
    NOT_RUN as UNFINISHED,
)

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this n"
UNEQUAL = "not at equal memory"
PAPERS_MODEL = "Llama-2-7B"
ELSEWHERE = f"not run on {PAPERS_MODEL}"
PROCESSES = 5  # that a verdict on speed needs
SMALL = 1_000_000_000  # parameters below which a model's verdicts are its own
LONGER = 4  # times the shortest prompts that the longest must be, for growth to be seen
OWN, INVERSE = ((1, 0), (0, 1)), ((0, 1), (1, 0))  # weights of a method and of the full cache


@dataclass(frozen=True)
class Claim:
    """A statement that runs can confirm or refute; fields as in claims.yaml."""

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
        of: the rows it compares, in words.
        condition: the verdict on what the claim takes for granted.
        memory: where the claim is about equal memory and it is not equal, the ratios.
        processes: of times, how many independent processes they come from.
        limits: why it speaks for its model alone; None if it does not.
        papers_model: whether the model is the one that the paper's claims are about.
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
    """What an interval says about a statement.

    It holds if the whole interval is on the right side of the bar (which belongs to that side) and
    its condition holds; it does not if the whole interval is on the wrong side, or its condition
    does not hold; everything else is undecided.
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
    """A claim with one measurement, or with none if it was not run."""

    claim: Claim
    measured: Measurement | None

    @property
    def kind(self) -> str:
        """HOLDS, FAILS, UNDECIDED, UNEQUAL, NOT_RUN, or ELSEWHERE: a claim about another model."""
        if self.measured is None:
            return NOT_RUN
        elsewhere = self.claim.of_papers_model and self.measured.limits
        return ELSEWHERE if elsewhere else self._found[0]

    @property
    def verdict(self) -> str:
        """The kind, with what limits or explains it."""
        if self.measured is None:
            return NOT_RUN
        m, (_, text) = self.measured, self._found
        if m.limits is None:
            other = self.claim.of_papers_model and not m.papers_model
            return f"{text}, on {m.model}" if other else text
        where = f"{m.model} ({m.limits})"
        if self.claim.of_papers_model:
            return f"{ELSEWHERE}; on {where}: {text}"
        return f"{text}, for {where} alone"

    @property
    def _found(self) -> tuple[str, str]:
        """What the number says of its own model: kind and text."""
        m, c = self.measured, self.claim
        assert m is not None
        if m.memory:
            ends = dict.fromkeys(f"{end:.2f}x" for end in (min(m.memory), max(m.memory)))
            return UNEQUAL, f"{UNEQUAL}: {' to '.join(ends)}"
        if m.processes is not None and m.processes < PROCESSES:
            return UNDECIDED, f"undecided: needs {PROCESSES} processes, has {m.processes}"
        kind = verdict(m.number, c, m.condition)
        if kind != HOLDS or c.top is None or m.number.low is None or m.number.high is None:
            return kind, kind
        where = (
            "within"
            if m.number.high <= c.top
            else "above"
            if m.number.low > c.top
            else "within or above"
        )
        return kind, f"{kind}, {where} {c.bar_text}"


def judge(rows: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> list[Judged]:
    """Every claim with every measurement that bears on it; of methods that are finished."""
    whole = rows.status.ne(UNFINISHED).groupby([rows.setting, rows.row]).transform("all")
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
    """Whether a row is BUZZ with the paper's parameters, apart from what a budget sets.

    A budget sets the sizes and how a long prompt is compacted; sizes set by hand beside a budget
    belong to a sweep.
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
    """Why a verdict from a row's model is of that model alone; None if it is not."""
    count = one.model_parameters
    if unknown(count) and one.model.startswith("llama2_7b"):
        count = 6_738_415_616
    if isinstance(one.model_settings, dict) and "hidden_size" in one.model_settings:
        return "random weights"
    if unknown(count):
        return "a model of unknown size"
    return f"{count / 1e6:,.0f}M parameters" if count < SMALL else None


def is_papers_model(one: pd.Series) -> bool:
    """Whether the model is one of the size and family that the paper's claims are about."""
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
    """A metric over the full cache's, of the samples that both have."""
    turned = inverse or (metric == "score" and not part.higher_is_better.iloc[0])
    found = estimate(part, metric, other, INVERSE if turned else OWN, guard=True)
    if metric == "score" and part.blocks.map(lambda one: isinstance(one, list)).any():
        return found._replace(n=int(part.blocks[other.score.notna()].map(len).sum()))
    return found


def _lead(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """The lead over the best other evicting method of the same budget that held the same.

    Others of the same budget (or, like the row, of sizes of their own) that held more or less are
    shown with their ratios, undecided.
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
    """The first method's lead over the best of the others, and both ends of its interval.

    It leads the best by a bar if it leads each by that, and does not if it fails one. So the lower
    end is the least lower end, and the upper end the least upper end, there with a chance shared
    out among the others, as they are chosen for their scores.

    Args:
        groups: of scores [n, methods, ...].
        relative: over the other's score; through its share of the first's, as it may well be none.
    """
    own, *others = np.eye(groups[0].shape[1])
    weights = [(other, own) if relative else (own - other, None) for other in others]
    value, low, high = [], [], []
    for of in weights:
        means = np.mean([np.nanmean(g, axis=0) for g in groups], axis=0)
        top = np.tensordot(of[0], means, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            value.append(top / np.tensordot(own, means, 1) if relative else top)
        plain, shared = (
            ends(groups, of, level=1 - chance, guard=True, together=joint)
            for chance in (0.05, 0.05 / len(others))
        )
        low.append(plain[1] if relative else plain[0])
        high.append(shared[0] if relative else shared[1])
    if not relative:
        return tuple(np.min(one, axis=0) for one in (value, low, high))
    shares = (np.max(one, axis=0) for one in (value, low, high))
    with np.errstate(divide="ignore"):
        return tuple(np.where(share > 0, 1 / share - 1, np.inf + 0 * share) for share in shares)


def together(part: pd.DataFrame, others: list[pd.DataFrame]) -> tuple[Any, dict[str, Any]]:
    """Scores of the samples that all have, [n, methods], and their groups and units."""
    joined = part.set_index(SAME)
    sides = [other.set_index(SAME).score.reindex(joined.index) for other in others]
    values = np.stack([joined.score, *sides], -1).astype(float)
    known = np.isfinite(values).all(axis=1)
    return values[known], {name: joined[name].to_numpy(object)[known] for name in ("group", "unit")}


def at_equal_memory(own: pd.DataFrame, other: pd.DataFrame) -> float | None:
    """Bytes of keys and values held by one method over another's, on the samples that both ran.

    Held, not allocated: what a method needs, whatever its buffers are for; in the layers that
    evict, which a budget governs. Of `peak` budgets the mean of the peak bytes, otherwise of the
    mean bytes.
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
    """Whether methods of this ratio of memory, either way round, held as much as one another."""
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
        means = STATISTICS[statistic](np.mean([np.nanmean(g, axis=0) for g in parts_of], axis=0))
        low, high = (float(end) for end in widest_gap(parts_of, statistic, joint))
        both = (low, high) if np.isfinite([low, high]).all() else (None, None)
        number = Estimate(float(np.ptp(means[:-1]) / means[-1]), *both, len(values))
        pairs = [at_equal_memory(a, b) for a, b in permutations(parts, 2)]
        apart = max(filter(None, pairs), default=1.0)
        own = parameters_of(first.iloc[0])
        told = ", ".join(f"{value}{mark(part)}" for value, part in family.items())
        others = (
            key for key in ("sink", "window", "stride", "threshold") if key != claim.parameter
        )
        fixed = " ".join(f"{key}={own[key]}" for key in others if key in own)
        memory = () if is_equal(apart) else (apart,)
        yield _measured(first, number, f", {claim.parameter} {told} with {fixed}", memory=memory)


def widest_gap(
    groups: Sequence[Any], statistic: str = "mean", joint: bool = False
) -> tuple[Any, Any]:
    """Ends of an interval for best less worst of all methods but the last, over the last.

    It is the largest of all differences: within a bar if each of them is, beyond it if one is. So
    the upper end is the largest upper end, and the lower end the largest lower end, there with a
    chance shared out among the differences. The bootstrap of a maximum less a minimum would find a
    gap between settings that are equal.
    """
    eye = np.eye(groups[0].shape[1])
    pairs = [(a - b, eye[-1]) for a, b in permutations(eye[:-1], 2)]
    low, high = (
        [ends(groups, of, statistic, 1 - chance, True, together=joint)[end] for of in pairs]
        for end, chance in ((0, 0.05 / len(pairs)), (1, 0.05))
    )
    return np.maximum(np.max(low, axis=0), 0), np.max(high, axis=0)


def _over_processes(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """A time over the full cache's on the same prompts and machine; settings that differ in the
    seed alone are repeats."""
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
        # No two units share a process: they are the connected components of the pairs.
        codes = pd.factorize(pd.concat([chosen.process, chosen.other_process]))[0]
        own, theirs = codes[: len(chosen)], codes[len(chosen) :]
        size = codes.max() + 1
        pairs = coo_matrix((np.ones(len(own)), (own, theirs)), (size, size))
        units = connected_components(pairs, directed=False)[1][own]
        means = chosen.groupby(units)[[claim.metric, "theirs"]].mean().astype(float)
        more = f", batches of {int(chosen.batch_size.iloc[0])}" if claim.by else ""
        yield _timed(chosen, means[claim.metric] / means.theirs, len(chosen), more)


def _timed(part: pd.DataFrame, ratios: Any, n: int, more: str) -> Measurement:
    """The geometric mean of independent processes' ratios."""
    found = interval(np.log(np.asarray(ratios, float)), statistic="exp", guard=True)
    return _measured(part, found._replace(n=n), more, processes=len(ratios))


def _growth(claim: Claim, rows: pd.DataFrame, full: pd.DataFrame) -> Iterator[Measurement]:
    """Time per token at the longest prompts over that at the shortest, relative to log n's growth.

    In each process that measured both. A budget that is a fraction of the prompt grows the cache by
    design and says nothing here.
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
        lengths = length_bin(part.prompt_tokens)
        ends = lengths.min(), lengths.max()
        if ends[1] < LONGER * ends[0]:
            continue
        part = part[lengths.isin(ends)].assign(
            length=lengths, log=np.log(part.prompt_tokens.astype(float))
        )
        means = part.groupby(["process", "length"])[["itl_p50_ms", "log"]].mean().unstack()
        means = means.dropna().astype(float)
        time, log = (means[name][ends[1]] / means[name][ends[0]] for name in ("itl_p50_ms", "log"))
        what = f", prompts of about {ends[0]:,} and {ends[1]:,} tokens"
        yield _timed(part, time / log, len(part), what)


MEASURES: dict[str, Callable[[Claim, pd.DataFrame, pd.DataFrame], Iterator[Measurement]]] = {
    "ratio": _ratio,
    "lead": _lead,
    "spread": _spread,
    "growth": _growth,
}


def table(judged: list[Judged]) -> Table:
    """Claim by claim."""
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
