"""Which runs are judged, beside which others, and on which samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from buzz import BuzzPolicy
from evals.results.compare import same_sample, strata
from evals.results.runs import Run, reference_of
from evals.results.schema import Record

BUDGETED = ("window", "threshold")  # sizes that a budget sets unless the user fixed them


def is_papers(run: Run) -> bool:
    """Whether a run is BUZZ with the paper's parameters, apart from what a budget sets.

    A budget sets the sizes and how a long prompt is compacted; sizes set by hand beside a budget
    belong to a sweep.
    """
    if run.method != "buzz" or not run.scored:
        return False
    own = dict(run.parameters)
    paper = dataclasses.asdict(BuzzPolicy())
    paper |= {"logn_base": None, "logn_clamp": False, "positions": "cache"}
    if run.budget is not None:
        if own.get("compact") == "widen":
            own["compact"] = paper["compact"]
        if set(BUDGETED) & set(run.config.get("fixed") or ()):
            return False
    return paper | own == paper


def with_full(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """The paper's BUZZ beside the full cache, at every budget and on every task that was run."""
    for run in runs:
        full = reference_of(run, runs) if is_papers(run) else None
        if full:
            yield run, full


def together(
    runs: Sequence[Run], value: Callable[[Record], Iterable[float | None]]
) -> dict[str, list[tuple[float, ...]]]:
    """Values of the samples that all runs answered, of one prompt and references, by group.

    Of samples that are about the same, see :func:`evals.results.compare.strata`, the means.
    """
    first, *others = ({record["id"]: record for record in run.ran} for run in runs)
    parts: list[tuple[Record, list[tuple[float, ...]]]] = []
    for name, record in first.items():
        found = [record, *(other[name] for other in others if name in other)]
        if len(found) == len(runs) and all(same_sample(record, one) for one in found):
            rows = zip(*map(value, found), strict=True)
            if known := [row for row in rows if None not in row]:
                parts.append((record, known))
    return strata(parts)


def families(runs: Sequence[Run], parameter: str) -> list[list[Run]]:
    """Runs of one method, setting and budget that differ in one parameter alone, by its value.

    Of several with one value, as from two machines, the first.
    """
    found: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if run.scored and parameter in run.parameters and not left_to_budget(run, parameter):
            others = {k: v for k, v in run.parameters.items() if k != parameter}
            fixed = sorted(set(run.config.get("fixed") or ()) - {parameter})
            budget = (run.budget, run.config.get("budget_by"))
            key = f"{run.setting} {run.method} {budget} {fixed} {sorted(others.items(), key=str)}"
            found.setdefault(key, {}).setdefault(run.parameters[parameter], run)
    several = [list(family.values()) for family in found.values() if len(family) > 1]

    def value(run: Run) -> tuple[bool, bool, Any]:
        own = run.parameters[parameter]
        return own is not None, isinstance(own, str), own

    return [sorted(family, key=value) for family in several]


def left_to_budget(run: Run, parameter: str) -> bool:
    """Whether the budget chose this size, whatever the configuration says."""
    fixed = run.config.get("fixed")  # not in early configurations
    known = run.budget is not None and fixed is not None
    return known and parameter in BUDGETED and parameter not in fixed
