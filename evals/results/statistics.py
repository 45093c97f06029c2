"""What becomes of many samples' values: means, scores, and their 95% bootstrap intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float] | None
Statistic = Callable[[Floats], Floats]

# What becomes of the mean of the groups' means to be the score; and the other way round.
STATISTICS: dict[str, Statistic] = {"mean": lambda means: means, "exp": np.exp}
INVERSES: dict[str, Statistic] = {"mean": lambda scores: scores, "exp": np.log}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def means_by(key: str, records: Iterable[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Means of a metric by what the samples' `meta` has under `key`; those that lack it are out."""
    values: dict[str, list[float]] = {}
    for record in records:
        if (name := record["meta"].get(key)) is not None:
            values.setdefault(str(name), []).append(record["scores"][metric])
    return {name: statistics.fmean(values[name]) for name in sorted(values)}


def score_of(groups: Sequence[Sequence[float]], statistic: str = "mean") -> float | None:
    """A statistic of the mean of the groups' means; None if there is nothing in them."""
    if not groups:
        return None
    return float(STATISTICS[statistic](np.mean([np.mean(group) for group in groups])))


def bootstrap(groups: Sequence[Sequence[Any]], finish: Statistic = STATISTICS["mean"]) -> Interval:
    """95% percentile bootstrap interval of a function of the mean of the groups' means.

    Each group is resampled by itself. The seed is fixed: the same data give the same interval.

    Returns:
        None when nothing can be resampled: no group, or one of a single value; or if the function
        overflows, as exp of large losses does.
    """
    means = resampled(groups)
    if means is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return interval_of(finish(means))


def bootstrap_interval(groups: Sequence[Sequence[float]], statistic: str = "mean") -> Interval:
    """Of :func:`score_of`."""
    return bootstrap(groups, STATISTICS[statistic])


def bootstrap_difference(
    pairs: Sequence[Sequence[tuple[float, float]]], statistic: str = "mean"
) -> Interval:
    """Of the first's statistic less the second's, kept in pairs.

    Args:
        pairs: groups of (first, second) values of the same sample.
    """
    return bootstrap(pairs, lambda means: -np.diff(STATISTICS[statistic](means))[:, 0])


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


def interval_of(values: Floats | None) -> Interval:
    """The middle 95% of resampled values; None where some are not finite."""
    if values is None or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
