"""Intervals: what they say of settings that are equal, nearly so, and far apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import ndtri

from evals.report.intervals import Means, least_lead, over_processes, widest_gap
from evals.results.statistics import Floats, bootstrap, lead

BAR = 0.1  # of the full cache's score
REPEATS = 400


def drawn(n: int, scores: list[float], kind: str, alike: float, repeats: int = REPEATS) -> Floats:
    """Scores [repeats, n, runs] of these true means; `alike` is their correlation (latent)."""
    rng = np.random.default_rng(n)
    shape = (repeats, n, len(scores))
    shared = rng.standard_normal((repeats, n, 1))
    latent = alike**0.5 * shared + (1 - alike) ** 0.5 * rng.standard_normal(shape)
    if kind == "binary":
        return (latent < ndtri(scores)).astype(float)
    return np.asarray(scores) * (1 + 0.4 * latent)  # ROUGE's spread over samples


def shares(scores: Floats) -> tuple[float, float]:
    """How often the settings (all runs but the last) are said to be apart, and to be alike."""
    low, high = widest_gap(Means.of([scores]), scores.shape[-1] - 1)
    return float(np.mean(low > BAR)), float(np.mean(high <= BAR))


def test_a_difference_is_drawn_in_pairs() -> None:
    """What both share of a sample is no uncertainty of their difference."""
    theirs = np.random.default_rng(0).normal(0, 10, 40)
    own = theirs + np.tile([0.9, 1.1], 20)
    low, high = bootstrap([list(zip(own, theirs, strict=True))], of=lead)
    assert (low, high) == pytest.approx(
        (1 - 1.96 * 0.1 / 40**0.5, 1 + 1.96 * 0.1 / 40**0.5), abs=0.01
    )
    alone = bootstrap([own])
    assert alone[1] - alone[0] > 4


CASES = [
    pytest.param(n, kind, settings, alike, id=f"{n} {kind} {settings} settings, {alike} alike")
    for n, kind, settings, alike in itertools.product(
        (30, 100, 200), ("binary", "continuous"), (2, 3, 5), (0, 0.8)
    )
]


@pytest.mark.parametrize("n, kind, settings, alike", CASES)
@pytest.mark.parametrize("score", [0.5, 0.9])
def test_equal_settings_are_rarely_said_to_differ(
    n: int, kind: str, settings: int, alike: float, score: float
) -> None:
    scores = drawn(n, [score] * (settings + 1), kind, alike)
    apart, _ = shares(scores)
    assert apart <= 0.05
    low, _ = widest_gap(Means.of([scores]), settings)
    assert np.mean(low > 0) <= 0.05  # nor by less than the bar


@pytest.mark.parametrize("n, kind, settings, alike", CASES)
def test_settings_at_the_bar_are_rarely_decided(
    n: int, kind: str, settings: int, alike: float
) -> None:
    apart, same = shares(drawn(n, [0.8] * (settings - 1) + [0.72, 0.8], kind, alike))
    assert apart <= 0.05 and same <= 0.05


@pytest.mark.parametrize("right", [0.2, 0.5])
@pytest.mark.parametrize("n", [30, 100])
def test_rare_losses_that_were_not_seen_are_not_ruled_out(n: int, right: float) -> None:
    """One setting answers as the full cache does but for a tenth that it loses: the bar exactly."""
    rng = np.random.default_rng(0)
    full = (rng.random((2000, n, 1)) < right).astype(float)
    kept = rng.random((2000, n, 1)) < 0.9
    apart, same = shares(np.concatenate([full, full * kept, full], axis=-1))
    assert apart <= 0.05 and same <= 0.05


@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("alike", [0, 0.8])
def test_a_large_difference_is_found(kind: str, alike: float) -> None:
    apart, _ = shares(drawn(200, [0.8, 0.8, 0.5, 0.8], kind, alike))
    assert apart > 0.9


@pytest.mark.parametrize(
    "n, kind, alike", [(200, "continuous", 0.8), (1000, "continuous", 0), (1000, "binary", 0.8)]
)
def test_equal_settings_are_confirmed_by_many_samples(n: int, kind: str, alike: float) -> None:
    _, same = shares(drawn(n, [0.8] * 4, kind, alike, 200))
    assert same > 0.9


def test_equal_answers_of_few_samples_prove_nothing() -> None:
    for n, holds in ((30, False), (100, True)):
        right = np.arange(n) % 2.0
        low, high = widest_gap(Means.of([np.stack([right] * 3, -1)]), 2)
        assert low == 0 and (high <= BAR) is np.bool_(holds)


@pytest.mark.parametrize("n, settings, kind", [(40, 3, "binary"), (40, 3, "continuous")])
def test_the_interval_contains_the_gap_that_was_seen(n: int, settings: int, kind: str) -> None:
    scores = drawn(n, [0.8, 0.7, 0.6, 0.8], kind, 0.5)
    low, high = widest_gap(Means.of([scores]), settings)
    means = scores.mean(1)
    gap = np.ptp(means[:, :-1], axis=1) / means[:, -1]
    assert (low <= gap).all() and (gap <= high).all()


def test_ratios_are_covered_as_often_as_promised() -> None:
    scores = drawn(50, [0.6, 0.8], "continuous", 0.5, 2000)
    low, high = Means.of([scores]).bounds(*np.eye(2))
    assert 0.94 <= np.mean((low <= 0.75) & (high >= 0.75)) <= 1


def test_groups_count_the_same_whatever_their_size() -> None:
    groups = [np.full((10, 2), [1.0, 2.0]), np.full((90, 2), [3.0, 2.0])]
    means = Means.of(groups)
    assert means.value(*np.eye(2)) == pytest.approx(1)
    own, other = Means.of([groups[0]]).bounds(*np.eye(2)), means.bounds(*np.eye(2))
    assert own[0] < 0.5 < own[1] and other[0] < 1 < other[1]


def test_perplexities_are_compared_through_their_logarithms() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, (2000, 200, 1)) + rng.normal([0.1, 0], 0.1, (2000, 200, 2))
    means = Means.of([losses], "exp")
    low, high = means.bounds(*np.eye(2))
    assert means.value(*np.eye(2)).mean() == pytest.approx(np.exp(0.1), rel=0.01)
    assert 0.94 <= np.mean((low <= np.exp(0.1)) & (high >= np.exp(0.1))) <= 1


def test_nothing_is_said_over_a_score_that_may_be_zero() -> None:
    scores = np.stack([np.arange(20) % 2, np.arange(20) == 3], -1)
    assert np.isnan(Means.of([scores]).bounds(*np.eye(2))).all()
    assert np.isfinite(Means.of([scores]).bounds(*np.eye(2)[::-1])).all()


@pytest.mark.parametrize("relative", [False, True])
def test_a_lead_over_the_best_other_is_one_over_each(relative: bool) -> None:
    bar = 0.1 / 0.7 if relative else 0.1  # of the lead over each rival, which are equal
    below = above = 0
    for scores in drawn(1000, [0.8, *[0.7] * 8], "continuous", 0):
        value, (low, high) = least_lead(Means.of([scores]), relative)
        assert low <= value <= high
        below += high < bar
        above += low > bar
    assert below <= 0.05 * REPEATS and above <= 0.05 * REPEATS


def test_a_rival_that_scores_nothing_is_no_rival() -> None:
    scores = drawn(200, [0.8, 0.5, 0.5], "continuous", 0.5, 1)[0]
    value, ends = least_lead(Means.of([scores[:, :2]]), relative=True)
    scores[:, 2] = 0
    assert least_lead(Means.of([scores]), relative=True)[0] == value
    assert np.isfinite(least_lead(Means.of([scores]), relative=True)[1]).all()
    assert least_lead(Means.of([scores[:, [0, 2]]]), relative=True)[0] == np.inf


def test_processes_are_the_unit_of_timings() -> None:
    assert over_processes([]) == (None, None)
    assert over_processes([1.5]) == (pytest.approx(1.5), None)
    value, (low, high) = over_processes([1.0, 2.0, 4.0])
    assert value == pytest.approx(2)
    half = 4.302653 * np.log(2) / np.sqrt(3)  # Student's t with 2 degrees of freedom
    assert (low, high) == (pytest.approx(2 / np.exp(half)), pytest.approx(2 * np.exp(half)))
    rng = np.random.default_rng(0)
    found = [over_processes(list(np.exp(rng.normal(0, 0.1, 5))))[1] for _ in range(2000)]
    assert 0.93 <= np.mean([low <= 1 <= high for low, high in found]) <= 0.97
