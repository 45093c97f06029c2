"""What the report asks of runs, see :mod:`evals.results`: pairs of samples, labels, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from evals.compare import REFERENCE, same_sample, strata
from evals.results import Floats, Interval, Run, bootstrap, interval_of, read_runs, reference_of
from evals.schema import Record

__all__ = [
    "REFERENCE",
    "Floats",
    "Interval",
    "Run",
    "bootstrap",
    "interval_of",
    "length_bin",
    "pairs",
    "read_runs",
    "reference_of",
    "settings_text",
]


def pairs(
    run: Run, other: Run, value: Callable[[Record], Iterable[float | None]]
) -> dict[str, list[tuple[float, float]]]:
    """Values of the samples that both runs answered from the same prompt, by group.

    Of samples that are about the same, see :func:`evals.compare.strata`, the means.
    """
    theirs = {record["id"]: record for record in other.ran}
    parts: list[tuple[Record, list[tuple[float, float]]]] = []
    for record in run.ran:
        match = theirs.get(record["id"])
        if match and same_sample(record, match):
            both = zip(value(record), value(match), strict=True)
            known = [(a, b) for a, b in both if a is not None and b is not None]
            if known:
                parts.append((record, known))
    return strata(parts)


def settings_text(run: Run, runs: Iterable[Run]) -> str:
    """The parameters in which runs of the same method differ, as `name=value`.

    So is which of them a budget left alone (`fixed`), where that is all that differs.
    """
    alike = [other for other in runs if other.method == run.method]
    own = run.parameters
    varying = [key for key in own if any(one.parameters.get(key) != own[key] for one in alike)]
    parts = [f"{key}={own[key]}" for key in varying]
    twins = [one for one in alike if one.parameters == own and one.budget == run.budget]
    if any(one.fixed != run.fixed for one in twins):
        parts.append(f"fixed={'+'.join(run.fixed) or 'none'}")
    return " ".join(parts)


def length_bin(tokens: int) -> int:
    """The power of two nearest to a prompt's length."""
    return 2 ** round(math.log2(max(1, tokens)))
