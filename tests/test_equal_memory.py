"""What runs held beside their budgets and beside each other, from records alone."""

from __future__ import annotations

from typing import Any

import pytest

from evals.results.equal_memory import at_equal_memory, held_over_budget, is_equal, is_over


def record(name: str = "0", **facts: Any) -> dict[str, Any]:
    return {
        "id": name,
        "status": "ok",
        "budget_by": "peak",
        "budget_entries": 100,
        "kv_entries_peak": 100,
        "kv_entries_mean": 80.0,
        "kv_nbytes_peak": 1000,
        "kv_nbytes_mean": 800.0,
    } | facts


def test_a_run_is_held_to_its_budget_by_its_own_measure() -> None:
    assert held_over_budget([record()]) == 1
    assert held_over_budget([record(budget_by="mean")]) == 0.8
    grown = [record(kv_entries_peak=130), record(kv_entries_peak=110)]
    assert held_over_budget(grown) == pytest.approx(1.2)
    assert held_over_budget([*grown, record(status="oom", kv_entries_peak=900)]) == pytest.approx(
        1.2
    )


def test_without_a_budget_or_its_measure_nothing_is_over() -> None:
    early = record(kv_entries_peak=900)
    del early["budget_by"]
    without = record(budget_entries=None, budget_by=None)
    assert held_over_budget([early, without]) is None and not is_over(None)
    assert held_over_budget([early, record()]) == 1


def test_five_percent_are_tolerated_and_no_more() -> None:
    assert not is_over(1.05) and is_over(1.0501)
    assert is_equal(1.05) and is_equal(1 / 1.05) and not is_equal(1.06) and not is_equal(1 / 1.06)
    assert not is_equal(None) and not is_equal(0.0)


def test_runs_are_compared_on_shared_samples_by_peak_only_if_both_budgets_are() -> None:
    own = [record("a", kv_nbytes_peak=1100), record("b", kv_nbytes_peak=1e9)]
    other = [record("a"), record("c", kv_nbytes_peak=1e9)]
    assert at_equal_memory(own, other) == pytest.approx(1.1)
    assert at_equal_memory(own, [record("a", budget_by="mean", kv_nbytes_mean=400.0)]) == 2
    assert at_equal_memory(own, [record("a", budget_by=None)]) == 1
    assert at_equal_memory(own, [record("c")]) is None
    assert at_equal_memory(own, [record("a", status="failed")]) is None
