"""Equal memory, from lengths alone: what a budget promises holds for every method and length."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from baselines import FullPolicy, H2OPolicy, LocalPolicy, SnapKVPolicy, StreamingLLMPolicy
from buzz import POLICIES, Budget, BuzzPolicy, ConfigError, Policy

EVICTING = sorted(name for name in POLICIES if POLICIES[name].evicts != "never")
sizes = st.floats(0.05, 0.8) | st.integers(64, 4096)
prompts = st.integers(64, 131_072)
answers = st.integers(1, 2000)


def fitted(name: str, size: float | int, by: str, prompt: int) -> tuple[Policy, int]:
    """Skips the fractions of short prompts that leave no room for a sink."""
    try:
        policy, entries = Budget(size, by).policy(POLICIES[name](), prompt)
    except ConfigError as error:
        assume(round(size * prompt) > 8 if isinstance(size, float) else True)
        raise AssertionError(f"{name} was refused") from error
    assert entries == (size if isinstance(size, int) else round(size * prompt))
    return policy, entries


@settings(max_examples=400)
@given(st.sampled_from(EVICTING), sizes, prompts, answers)
@example("buzz", 512, 32_000, 24)
@example("buzz", 0.25, 534, 24)
@example("snapkv", 0.25, 2_000, 500)
def test_by_peak_no_method_ever_exceeds_its_budget(name, size, prompt, answer) -> None:
    policy, entries = fitted(name, size, "peak", prompt)
    lengths = policy.lengths([prompt] + [1] * (answer - 1))
    if policy.evicts == "prompt":  # then it grows by one a step
        assert lengths == [min(prompt, entries) + step for step in range(answer)]
    else:
        assert max(lengths) <= entries
        if prompt > entries and "buzz" not in name:
            slack = getattr(policy, "every", 1) - 1  # of entries that come between two evictions
            assert min(lengths) == entries - slack


@settings(max_examples=400)
@given(st.sampled_from(EVICTING), sizes, prompts)
def test_by_mean_the_steady_state_is_the_budget(name, size, prompt) -> None:
    policy, entries = fitted(name, size, "mean", prompt)
    if policy.evicts == "prompt":
        assert policy.lengths([prompt]) == [min(prompt, entries)]
        return
    footprint = policy.footprint(prompt)
    assert footprint.mean == pytest.approx(entries, rel=0.01, abs=1)
    assert footprint.after_prompt <= footprint.peak == policy.footprint().peak


@given(st.sampled_from(EVICTING), sizes, prompts, answers, st.sampled_from(["peak", "mean"]))
def test_nothing_but_the_budget_decides_the_parameters(name, size, prompt, answer, by) -> None:
    """A policy for a prompt of another length but the same budget is the same policy."""
    policy, entries = fitted(name, size, by, prompt)
    assert fitted(name, entries, by, prompt + answer)[0] == policy


@given(
    st.sampled_from(["buzz", "buzz_fast", "buzz_strided"]),
    st.integers(64, 4096),
    st.sampled_from(["peak", "mean"]),
    st.integers(20, 400),
    st.integers(20, 400),
    st.integers(3, 9),
)
def test_buzz_keeps_its_share_of_window(name, entries, by, window, threshold, stride) -> None:
    asked = POLICIES[name](window=window, threshold=threshold, stride=stride)
    policy, _ = Budget(entries, by).policy(asked, 10 * entries)
    share = window / threshold
    assert policy.window >= share * policy.threshold - 1 - share
    assert policy.threshold >= policy.window / share - 2 - 2 / share
    assert (policy.sink, policy.stride, policy.compact) == (4, stride, "widen")


@given(st.integers(200, 4096), st.integers(10, 150), st.sampled_from(["peak", "mean"]))
def test_what_the_user_fixed_stays_and_the_rest_makes_up_for_it(entries, value, by) -> None:
    for field in ("window", "threshold"):
        asked = dataclasses.replace(BuzzPolicy(), **{field: value})
        policy, _ = Budget(entries, by).policy(asked, 10 * entries, frozenset({field}))
        assert getattr(policy, field) == value
        reached = policy.footprint()
        assert (reached.peak if by == "peak" else reached.mean) == pytest.approx(entries, abs=1.5)
    fixed = frozenset({"recent"})
    assert Budget(entries, by).policy(H2OPolicy(recent=value), 9999, fixed)[0] == H2OPolicy(
        recent=value, heavy=entries - value
    )


def test_the_original_defaults_are_their_own_mean_budget() -> None:
    policy, _ = Budget(410, "mean").policy(BuzzPolicy(), 1000)
    assert policy == BuzzPolicy(compact="widen")
    lengths = BuzzPolicy().lengths([1000] + [1] * 4000)[1000:]
    # By hand: 93 kept history entries are kept again (31 + 62), and so are 94 (32 + 62).
    assert min(lengths) in (257, 258) and max(lengths) == 564


def test_a_budget_that_is_not_set_changes_nothing_and_the_full_cache_has_none() -> None:
    assert Budget(0.25).policy(FullPolicy(), 100) == (FullPolicy(), None)
    assert BuzzPolicy().compact == "once"
    chosen = BuzzPolicy(compact="until_fits")
    assert Budget(512).policy(chosen, 1000)[0].compact == "until_fits"


@dataclass(frozen=True, kw_only=True)
class Stubborn(LocalPolicy):
    """A method that nobody gave a `fit`."""

    name: ClassVar[str] = "stubborn"

    window: int = 100

    fit = Policy.fit


@pytest.mark.parametrize(
    ("policy", "budget", "fixed", "prompt", "field", "says"),
    [
        (BuzzPolicy(), 0, "", 9, "budget", "between 0 and 1"),
        (BuzzPolicy(), 1.5, "", 9, "budget", "between 0 and 1"),
        (BuzzPolicy(), True, "", 9, "budget", "between 0 and 1"),
        (BuzzPolicy(threshold=400), 100, "threshold", 999, "budget", "would hold 405"),
        (BuzzPolicy(window=160), 100, "window", 999, "budget", "would hold 166"),
        (BuzzPolicy(), 512, "window threshold", 999, "budget", "holds 564 and not 512"),
        (BuzzPolicy(), 512, "compact", 32_000, "budget", "holds 6,520 after a prompt of 32,000"),
        (BuzzPolicy(), 0.05, "", 100, "budget", "would hold 7"),
        (BuzzPolicy(stride=2), 512, "", 999, "method.stride", "at least 3"),
        (StreamingLLMPolicy(sink=8), 8, "", 999, "budget", "would hold 9"),
        (H2OPolicy(), 100, "heavy recent", 999, "budget", "holds 560 and not 100"),
        (H2OPolicy(), 1000, "heavy recent", 999, "budget", "holds 560 and not 1,000"),
        (SnapKVPolicy(), 100, "capacity", 2000, "budget", "leave out method.capacity=1024"),
        (Stubborn(), 512, "", 999, "budget", "class Stubborn needs a `fit`"),
        (Stubborn(), 64, "", 999, "budget", "holds 100 and not 64"),
    ],
)
@pytest.mark.filterwarnings("ignore:method.stride")
def test_what_cannot_be_met_is_refused(policy, budget, fixed, prompt, field, says) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget(budget).policy(policy, prompt, frozenset(fixed.split()))
    assert caught.value.field == field and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="^budget_by='average': choose one of peak, mean"):
        Budget(512, "average")
