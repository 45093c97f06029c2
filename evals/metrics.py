"""Metrics and statistics that more than one task needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by rouge-score with Porter stemming."""
    scores = _scorer().score(reference, prediction)
    return {name: 100 * score.fmeasure for name, score in scores.items()}


def bootstrap_interval(
    groups: Sequence[Sequence[float]], resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the groups' means.

    Each group is resampled by itself. The seed is fixed: the same data give the same interval.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(resamples)
    for values in groups:
        data = np.asarray(values, dtype=float)
        picks = rng.integers(len(data), size=(resamples, len(data)))
        means += data[picks].mean(axis=1) / len(groups)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
