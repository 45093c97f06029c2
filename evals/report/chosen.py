"""Which runs are judged, and beside which others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from buzz import BuzzPolicy
from evals.report.runs import BUDGETED, Run, reference_of


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


def families(runs: Sequence[Run], parameter: str) -> list[list[Run]]:
    """Runs of one method, setting and budget that differ in one parameter alone, by its value."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.scored and parameter in run.parameters and not run.left_to_budget(parameter):
            others = {k: v for k, v in run.parameters.items() if k != parameter}
            fixed = sorted(set(run.config.get("fixed") or ()) - {parameter})
            budget = (run.budget, run.config.get("budget_by"))
            key = f"{run.setting} {run.method} {budget} {fixed} {sorted(others.items(), key=str)}"
            found.setdefault(key, []).append(run)
    several = [family for family in found.values() if len(family) > 1]

    def value(run: Run) -> tuple[bool, bool, Any]:
        own = run.parameters[parameter]
        return own is not None, isinstance(own, str), own

    return [sorted(family, key=value) for family in several]
