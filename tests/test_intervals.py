"""Intervals: what they say of settings that are equal, nearly so, and far apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from evals.report.claims import least_lead, widest_gap
from evals.results.frame import DIFFERENCE, RATIO, ends, interval

BAR = 0.1  # of the full cache's score
REPEATS = 200


def drawn(n: int, scores: list[float], kind: str, alike: float, repeats: int = REPEATS) -> Any:
    """Scores [repeats, n, runs] of these true means; `alike` is their correlation (latent)."""
    rng = np.random.default_rng(n)
    shape = (repeats, n, len(scores))
    shared = rng.standard_normal((repeats, n, 1))
    latent = alike**0.5 * shared + (1 - alike) ** 0.5 * rng.standard_normal(shape)
    if kind == "binary":
        return (latent < ndtri(scores)).astype(float)
    return np.asarray(scores) * (1 + 0.4 * latent)  # ROUGE's spread over samples


def shares(scores: Any) -> tuple[float, float]:
    """How often the settings (all methods but the last) are said to be apart, and to be alike."""
    low, high = widest_gap([scores.transpose(1, 2, 0)])
    return float(np.mean(low > BAR)), float(np.mean(high <= BAR))


def test_a_difference_is_drawn_in_pairs() -> None:
    """What both share of a sample is no uncertainty of their difference."""
    theirs = np.random.default_rng(0).normal(0, 10, 40)
    own = theirs + np.tile([0.9, 1.1], 20)
    both = interval(np.stack([own, theirs], -1), DIFFERENCE)
    half = 1.96 * 0.1 / 40**0.5
    assert both.ends == pytest.approx((1 - half, 1 + half), abs=0.01) and both.n == 40
    alone = interval(own)
    assert alone.ends and alone.ends[1] - alone.ends[0] > 4


CASES = [
    pytest.param(n, kind, settings, alike, id=f"{n} {kind} {settings} settings, {alike} alike")
    for n, kind, settings, alike in itertools.product(
        (30, 100), ("binary", "continuous"), (2, 3), (0, 0.8)
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
    low, _ = widest_gap([scores.transpose(1, 2, 0)])
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
    full = (rng.random((500, n, 1)) < right).astype(float)
    kept = rng.random((500, n, 1)) < 0.9
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
    _, same = shares(drawn(n, [0.8] * 4, kind, alike, 50))
    assert same > 0.9


def test_equal_answers_of_few_samples_prove_nothing() -> None:
    for n, holds in ((30, False), (100, True)):
        right = np.arange(n) % 2.0
        low, high = widest_gap([np.stack([right] * 3, -1)])
        assert low == 0 and bool(high <= BAR) is holds


@pytest.mark.parametrize("n, settings, kind", [(40, 3, "binary"), (40, 3, "continuous")])
def test_the_interval_contains_the_gap_that_was_seen(n: int, settings: int, kind: str) -> None:
    scores = drawn(n, [0.8, 0.7, 0.6, 0.8], kind, 0.5)
    low, high = widest_gap([scores.transpose(1, 2, 0)])
    means = scores.mean(1)
    gap = np.ptp(means[:, :-1], axis=1) / means[:, -1]
    assert (low <= gap).all() and (gap <= high).all()


def test_ratios_are_covered_as_often_as_promised() -> None:
    scores = drawn(50, [0.6, 0.8], "continuous", 0.5, 2000)
    for guard, least in ((False, 0.925), (True, 0.95)):  # the plain bootstrap covers a little less
        low, high = ends([scores.transpose(1, 2, 0)], RATIO, guard=guard)
        assert least <= np.mean((low <= 0.75) & (high >= 0.75)) <= 1


def test_groups_count_the_same_whatever_their_size() -> None:
    values = np.concatenate([np.full((10, 2), [1.0, 2.0]), np.full((90, 2), [3.0, 2.0])])
    group = np.repeat(["small", "large"], [10, 90])
    assert interval(values, RATIO, group=group).value == pytest.approx(1)
    assert interval(values, RATIO).value == pytest.approx(1.4)
    assert interval([1.0, 2.0, 3.0], group=["a", "a", "b"]).ends is None  # one alone says nothing


def test_samples_of_one_unit_are_drawn_together() -> None:
    """Ten questions, each asked four times with the same answer, are ten samples and not forty."""
    right = np.arange(10) % 2.0
    once = interval(right)
    again = interval(np.tile(right, 4), unit=np.tile(np.arange(10).astype(str), 4))
    assert again.ends == once.ends and again.value == once.value and again.n == 40
    assert interval(np.tile(right, 4)).ends != once.ends


def test_perplexities_are_compared_through_their_logarithms() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, (1000, 200, 1)) + rng.normal([0.1, 0], 0.1, (1000, 200, 2))
    low, high = ends([losses.transpose(1, 2, 0)], RATIO, "exp", guard=True)
    one = interval(losses[0], RATIO, statistic="exp")
    assert one.value == pytest.approx(np.exp(np.subtract(*losses[0].mean(axis=0))))
    assert 0.94 <= np.mean((low <= np.exp(0.1)) & (high >= np.exp(0.1))) <= 1


def test_nothing_is_said_over_a_score_that_may_be_zero() -> None:
    scores = np.stack([np.arange(20) % 2, np.arange(20) == 3], -1).astype(float)
    assert interval(scores, RATIO).ends is None
    assert interval(scores[:, ::-1], RATIO).ends is not None


@pytest.mark.parametrize("n", [10, 30, 300])
def test_samples_that_never_differ_are_read_by_the_rule_of_three(n: int) -> None:
    """None of n was found: at most 3 in n + 1 of them would be."""
    missed = interval(np.zeros(n), span=(0.0, 1.0))
    assert missed.ends == (0.0, pytest.approx(3 / (n + 1), abs=1.01 / (n + 1)))
    found = interval(np.ones(n), span=(0.0, 1.0))
    assert found.ends == (pytest.approx(1 - missed.ends[1]), 1.0)
    assert interval(np.zeros(n)).ends is None  # nothing says what a score might be
    assert interval(np.zeros(n), guard=False).ends == (0.0, 0.0)
    equal = interval(np.ones((n, 2)), DIFFERENCE)
    assert equal.ends and equal.ends[0] == pytest.approx(-equal.ends[1]) and equal.ends[1] > 2 / n


def test_the_rule_of_three_counts_the_samples_of_all_groups() -> None:
    """Five depths, twenty passkeys each, none found: 3 of a hundred, not 3 of twenty."""
    depths = np.repeat(np.arange(5), 20)
    found = interval(np.zeros(100), group=depths, span=(0.0, 1.0))
    assert found.ends == (0.0, pytest.approx(0.03, abs=0.003))


@pytest.mark.parametrize("relative", [False, True])
def test_a_lead_over_the_best_other_is_one_over_each(relative: bool) -> None:
    bar = 0.1 / 0.7 if relative else 0.1  # of the lead over each rival, which are equal
    scores = drawn(500, [0.8, *[0.7] * 4], "continuous", 0, 100)
    value, low, high = least_lead([scores.transpose(1, 2, 0)], relative=relative)
    assert ((low <= value) & (value <= high)).all()
    assert np.mean(high < bar) <= 0.05 and np.mean(low > bar) <= 0.05


def test_a_rival_that_scores_nothing_is_no_rival() -> None:
    scores = drawn(200, [0.8, 0.5, 0.5], "continuous", 0.5, 1)[0]
    value, *both = least_lead([scores[:, :2]], relative=True)
    scores[:, 2] = 0
    again, *ends_again = least_lead([scores], relative=True)
    assert again == value and np.isfinite([*both, *ends_again]).all()
    assert least_lead([scores[:, [0, 2]]], relative=True)[0] == np.inf


def test_few_processes_or_seeds_say_little() -> None:
    """Their geometric mean; the guard makes up for what a bootstrap of five leaves out."""

    def over(ratios: Any) -> Any:
        return interval(np.log(ratios), statistic="exp", guard=True)

    assert over([1.5]).value == pytest.approx(1.5) and over([1.5]).ends is None
    three = over([1.0, 2.0, 4.0])
    assert three.value == pytest.approx(2) and three.ends[0] < 1 and three.ends[1] > 4
    drawn = np.random.default_rng(0).normal(0, 0.1, (5, 1, 2000))
    low, high = ends([drawn], statistic="exp", guard=True)
    assert 0.95 <= np.mean((low <= 1) & (high >= 1)) <= 0.98
    low, high = ends([drawn], statistic="exp", guard=False)
    assert np.mean((low <= 1) & (high >= 1)) < 0.87


def test_the_same_samples_give_the_same_interval() -> None:
    values = np.random.default_rng(3).random(30)
    assert interval(values) == interval(values.copy())
    assert interval([0.0, 1.0] * 50).ends == pytest.approx((0.402, 0.598), abs=0.012)
    assert interval([np.nan, *values]) == interval(values)
    assert interval([]) == (None, None, None, 0) and interval([1.0]).ends is None


def test_the_order_of_groups_decides_nothing() -> None:
    """A rate of 2 of 10 in five groups of two may be lower and higher than it was."""
    values, groups = [0] * 8 + [1, 1], [i // 2 for i in range(10)]
    found = [interval(one, group=groups, span=(0, 1)) for one in (values, values[::-1])]
    assert found[0] == found[1] == (0.2, 0.0, 0.4, 10)
