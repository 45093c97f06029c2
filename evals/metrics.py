"""Metrics and statistics that more than one task needs."""

from __future__ import annotations

import re
import statistics
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from numpy.typing import NDArray
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

# What becomes of the mean of the groups' means to be the score; and the other way round.
STATISTICS: dict[str, Statistic] = {"mean": lambda means: means, "exp": np.exp}
INVERSES: dict[str, Statistic] = {"mean": lambda scores: scores, "exp": np.log}


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by rouge-score with Porter stemming."""
    scores = _scorer().score(reference, prediction)
    return {name: 100 * score.fmeasure for name, score in scores.items()}


def package_rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by the package `rouge`, as LongBench and BUZZ use it.

    Nothing is stemmed, repeated n-grams count once, and sentences end at full stops. A text without
    a word scores 0. Names begin with ``pkg_``.
    """
    names = {"pkg_rouge1": "rouge-1", "pkg_rouge2": "rouge-2", "pkg_rougeL": "rouge-l"}
    limit = sys.getrecursionlimit()
    # The package walks the words of two sentences by recursion.
    sys.setrecursionlimit(limit + len(reference) + len(prediction))
    try:
        (scores,) = Rouge().get_scores([prediction], [reference])
    except ValueError:  # an empty text
        return dict.fromkeys(names, 0.0)
    finally:
        sys.setrecursionlimit(limit)
    return {ours: 100 * scores[theirs]["f"] for ours, theirs in names.items()}


def as_buzz_writes(text: str) -> str:
    """An answer as the code of the BUZZ paper writes it before it is scored.

    Its decoding takes out blanks before punctuation and contracted verbs, in this order, white
    space around the answer goes, and its writer leaves a blank at the end, which the package
    `rouge` takes for a further, empty sentence. An empty answer stays empty.
    """
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return f"{text.strip()} " if text.strip() else ""


def self_bleu(text: str) -> float:
    """How far the sentences of a text repeat each other, 0..1: their mean BLEU against the others.

    As the code of the BUZZ paper has it: BLEU of 1- to 3-grams with equal weights, smoothed by
    method 1 of Chen and Cherry (2014); sentences end at full stops, so after a last one follows an
    empty sentence, which scores 0. So does a text without a full stop, which has no others.
    """
    counts = Counter(tuple(sentence.split()) for sentence in text.split("."))
    weights, smooth = (1 / 3, 1 / 3, 1 / 3), SmoothingFunction().method1
    total = 0.0
    for sentence, times in counts.items():
        # To BLEU it is the same how often a reference is there.
        others = [other for other in counts if other != sentence or times > 1]
        if others:
            total += times * sentence_bleu(others, sentence, weights, smooth)
    return total / counts.total()


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, prediction: str) -> float:
    """F1 over the words of the normal forms, 0..1."""
    expected, found = normalized(answer).split(), normalized(prediction).split()
    common = (Counter(expected) & Counter(found)).total()
    return 2 * common / (len(expected) + len(found)) if common else 0.0


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
