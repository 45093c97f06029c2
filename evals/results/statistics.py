"""What becomes of many samples' values: means, scores, and their 95% bootstrap intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

# What becomes of the mean of the groups' means to be the score; and the other way round.
STATISTICS: dict[str, Statistic] = {"mean": lambda means: means, "exp": np.exp}
INVERSES: dict[str, Statistic] = {"mean": lambda scores: scores, "exp": np.log}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def score_of(groups: Sequence[Sequence[float]], statistic: str = "mean") -> float | None:
    """A statistic of the mean of the groups' means; None if there is nothing in them."""
    if not groups:
        return None
    return float(STATISTICS[statistic](np.mean([np.mean(group) for group in groups])))


def bootstrap_interval(
    groups: Sequence[Sequence[float]], statistic: str = "mean"
) -> tuple[float, float] | None:
    """95% percentile bootstrap interval of :func:`score_of`.

    Each group is resampled by itself. The seed is fixed: the same data give the same interval.

    Returns:
        None when nothing can be resampled: no group, or one of a single value; or if the statistic
        overflows.
    """
    means = resampled(groups)
    if means is None:
        return None
    with np.errstate(over="ignore"):
        return _interval(STATISTICS[statistic](means))


def bootstrap_difference(
    pairs: Sequence[Sequence[tuple[float, float]]], statistic: str = "mean"
) -> tuple[float, float] | None:
    """As :func:`bootstrap_interval`, of the first's statistic less the second's, kept in pairs.

    Args:
        pairs: groups of (first, second) values of the same sample.
    """
    means = resampled(pairs)
    if means is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        both = STATISTICS[statistic](means)
    return _interval(both[:, 0] - both[:, 1])


def resampled(groups: Sequence[Sequence[Any]], resamples: int = 2000) -> Floats | None:
    """Means of the groups' means [resamples, ...] of groups [samples, ...].

    Returns:
        None when nothing can be resampled: no group, or one of a single value.
    """
    if not groups or min(map(len, groups)) < 2:
        return None
    rng = np.random.default_rng(0)
    values = [np.asarray(group, float) for group in groups]
    picks = (group[rng.integers(len(group), size=(resamples, len(group)))] for group in values)
    return sum(pick.mean(axis=1) for pick in picks) / len(values)


def _interval(values: Floats) -> tuple[float, float] | None:
    """The middle 95%; None where some are not finite, as exp of large losses is not."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
