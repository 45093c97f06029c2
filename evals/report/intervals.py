"""Intervals of what claims are about: ratios and gaps of paired scores, and of timings.

Scores of several runs on the same samples have means m with a covariance. What is judged is
(over . m) / (under . m) for two weightings of the runs: a score over the full cache's, one method's
lead over another. Its bounds are Fieller's (Biometrika 41, 1954) with Student's t, and count one
more sample, as far out on the bound's side as any two runs were seen apart: differences that are
rare may not have been seen at all, and thirty equal answers are no proof of equality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy.special import stdtrit

from evals.metrics import STATISTICS
from evals.report.runs import Floats, Interval

CHANCE = 0.025  # of each end of a 95% interval to be wrong


@dataclass(frozen=True)
class Means:
    """Means of several runs' scores on the same samples; leading axes are independent repetitions.

    Attributes:
        n: samples of each group.
        means: [..., groups, runs].
        scatter: sums of squares and products about the means, [..., groups, runs, runs].
        widest: the largest difference between two runs on one sample, or, of runs that never
            differ, the largest score, [...].
        statistic: what becomes of the mean of the groups' means, see
            :data:`evals.metrics.STATISTICS`.
    """

    n: Floats
    means: Floats
    scatter: Floats
    widest: Floats
    statistic: str = "mean"

    @classmethod
    def of(cls, groups: Sequence[Any], statistic: str = "mean") -> Means:
        """From groups of scores [..., samples, runs]."""
        scores = [np.asarray(group, float) for group in groups]
        means = np.stack([group.mean(-2) for group in scores], -2)
        apart = [group - group.mean(-2, keepdims=True) for group in scores]
        scatter = np.stack([a.swapaxes(-1, -2) @ a for a in apart], -3)
        gaps = np.max([np.ptp(group, -1).max(-1) for group in scores], 0)
        largest = np.max([np.abs(group).max((-1, -2)) for group in scores], 0)
        widest = np.where(gaps > 0, gaps, largest)
        n = np.array([group.shape[-2] for group in scores], float)
        return cls(n, means, scatter, widest, statistic)

    def value(self, over: Floats, under: Floats | None = None) -> Floats:
        """over . m / under . m; without `under` over . m."""
        means = STATISTICS[self.statistic](self.means.mean(-2))
        with np.errstate(divide="ignore", invalid="ignore"):
            return means @ over / (1.0 if under is None else means @ under)

    def bounds(
        self, over: Floats, under: Floats | None = None, chance: float = CHANCE
    ) -> tuple[Floats, Floats]:
        """The ends of an interval for :meth:`value`, each wrong with probability `chance`.

        NaN where `under . m` may be zero.
        """
        t = stdtrit(self.n.sum(), 1 - chance)
        return self._end(over, under, -t), self._end(over, under, t)

    def _end(self, over: Floats, under: Floats | None, t: float) -> Floats:
        """The bound on the side of t's sign."""
        n = self.n
        far = math.copysign(1, t) * self.widest[..., None] * over / (over @ over)
        means = self.means + far[..., None, :] / (n + 1)[:, None]
        square = (far[..., :, None] * far[..., None, :])[..., None, :, :]
        scatter = self.scatter + (n / (n + 1))[:, None, None] * square
        covariance = (scatter / (n * (n + 1))[:, None, None]).sum(-3) / len(n) ** 2
        mean = means.mean(-2)
        if self.statistic == "exp":  # by the delta method
            mean = np.exp(mean)
            covariance = covariance * (mean[..., :, None] * mean[..., None, :])

        def product(a: Floats, b: Floats) -> Floats:
            return np.einsum("i,...ij,j->...", a, covariance, b)

        if under is None:
            return mean @ over + t * np.sqrt(product(over, over))
        top, bottom = mean @ over, mean @ under
        a = bottom**2 - t**2 * product(under, under)
        b = top * bottom - t**2 * product(over, under)
        c = top**2 - t**2 * product(over, over)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(
                a > 0, (b + np.sign(t) * np.sqrt(np.maximum(b**2 - a * c, 0))) / a, np.nan
            )


def widest_gap(means: Means, settings: int) -> tuple[Floats, Floats]:
    """Ends of an interval for the best less the worst of the first `settings` runs over the last.

    Best less worst is the largest of all differences. It is within a bar if each of them is, and
    beyond it if one is: so the upper end is the largest upper bound, and the lower end the largest
    lower bound, there with a chance shared out among the differences (Bonferroni). The plain
    bootstrap of a maximum less a minimum would find a gap between settings that are equal.
    """
    runs = np.eye(means.means.shape[-1])
    differences = [runs[i] - runs[j] for i, j in permutations(range(settings), 2)]
    shared = CHANCE / len(differences)
    low = np.max([means.bounds(d, runs[-1], shared)[0] for d in differences], 0)
    high = np.max([means.bounds(d, runs[-1])[1] for d in differences], 0)
    return np.maximum(low, 0), high


def least_lead(means: Means, relative: bool = False) -> tuple[float, tuple[float, float]]:
    """The first run's lead over the best of the others, and an interval for it.

    It leads the best by a bar if it leads each by that, and does not if it fails one: the lower end
    is the smallest lower bound, the upper end the smallest upper bound, there with a chance shared
    out among the others, as they are chosen for their scores.

    Args:
        relative: over the other's score.
    """
    own, *others = np.eye(means.means.shape[-1])
    shared = CHANCE / len(others)
    if relative:  # through the other's share of the first's score, which may well be none
        shares = [float(means.value(other, own)) for other in others]
        ends = [means.bounds(other, own)[1] for other in others]
        starts = [means.bounds(other, own, shared)[0] for other in others]
        value, low, high = (_over_share(float(np.max(found))) for found in (shares, ends, starts))
    else:
        leads = [own - other for other in others]
        value = min(float(means.value(lead)) for lead in leads)
        low = min(float(means.bounds(lead)[0]) for lead in leads)
        high = min(float(means.bounds(lead, chance=shared)[1]) for lead in leads)
    return value, (low, high)


def _over_share(share: float) -> float:
    """The lead of what another has this share of."""
    return 1 / share - 1 if share > 0 else math.nan if math.isnan(share) else math.inf


def over_processes(ratios: Sequence[float]) -> tuple[float | None, Interval]:
    """The geometric mean of independent processes' ratios, and its 95% interval by Student's t.

    None for the mean of none, and for the interval of fewer than two.
    """
    if not ratios:
        return None, None
    logs = np.log(ratios)
    value = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return value, None
    half = stdtrit(len(logs) - 1, 1 - CHANCE) * logs.std(ddof=1) / math.sqrt(len(logs))
    return value, (value * math.exp(-half), value * math.exp(half))
