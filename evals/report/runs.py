"""What the report asks of runs, see :mod:`evals.results`: labels and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable

from evals.compare import REFERENCE
from evals.results import Floats, Interval, Run, bootstrap, interval_of, read_runs, reference_of

__all__ = [
    "REFERENCE",
    "Floats",
    "Interval",
    "Run",
    "bootstrap",
    "interval_of",
    "length_bin",
    "read_runs",
    "reference_of",
    "settings_text",
]


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
