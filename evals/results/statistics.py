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


def means_by(
    key: Callable[[Mapping[str, Any]], Any], records: Iterable[Mapping[str, Any]], metric: str
) -> dict[Any, float]:
    """Means of a metric by what `key` makes of samples; those of which it makes None are out."""
    values: dict[Any, list[float]] = {}
    for record in records:
        if (name := key(record)) is not None:
            values.setdefault(name, []).append(record["scores"][metric])
    return {name: statistics.fmean(found) for name, found in values.items()}


def means_by_meta(
    keys: Iterable[str], records: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, dict[str, float]]:
    """For each key that the samples' `meta` has, means of a metric by its value, in order."""
    found = {key: means_by(lambda r, key=key: r["meta"].get(key), records, metric) for key in keys}
    return {
        key: {str(name): means[name] for name in sorted(means)}
        for key, means in found.items()
        if means
    }


def score_of(groups: Sequence[Sequence[float]], statistic: str = "mean") -> float | None:
    """A statistic of the mean of the groups' means; None if there is nothing in them."""
    if not groups:
        return None
    return float(STATISTICS[statistic](np.mean([np.mean(group) for group in groups])))


def bootstrap(
    groups: Sequence[Sequence[Any]],
    statistic: str = "mean",
    of: Statistic = lambda values: values,
    resamples: int = 2000,
) -> Interval:
    """95% percentile bootstrap interval of a function of a statistic of the mean of groups' means.

    Each group is resampled by itself. The seed is fixed: the same data give the same interval.

    Args:
        groups: of values, or of several values of a sample, which stay together.
        statistic: see :func:`score_of`.
        of: what of it, [resamples] from [resamples, ...]; for pairs e.g. :func:`lead`.

    Returns:
        None when nothing can be resampled: no group, or one of a single value; or if the function
        is not finite, as exp of large losses.
    """
    if not groups or min(map(len, groups)) < 2:
        return None
    rng = np.random.default_rng(0)
    values = [np.asarray(group, float) for group in groups]
    picks = (group[rng.integers(len(group), size=(resamples, len(group)))] for group in values)
    means = sum(pick.mean(axis=1) for pick in picks) / len(values)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = of(STATISTICS[statistic](means))
    if not np.isfinite(found).all():
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def lead(pairs: Floats) -> Floats:
    """The first less the second, of [..., 2]."""
    return pairs[..., 0] - pairs[..., 1]
