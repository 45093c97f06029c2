"""Claims on speed: what repeats in several processes, made by hand, are said to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import found, judged, write_row

from evals.report.claims import FAILS, HOLDS, NOT_RUN, UNDECIDED

LONG = {"prompt": 31_000, "task": "throughput"}


def repeat(root: Path, speed: float, count: int = 5, **more: Any) -> None:
    """Both methods in each of `count` processes, the full cache at 10 tokens a second and more."""
    for seed in range(count):
        where: dict[str, Any] = {"process": f"p{seed}", "seed": seed, **LONG, **more}
        where |= {"lengths": [where["prompt"]], "of": where.get("batch_size", 1)}
        own = speed * (1 + seed / 100)
        write_row(root, "full", [8.0] * 3, speed=10.0, **where)
        write_row(root, "buzz", [8.0] * 3, speed=own, **where)


def edit(root: Path, row: str, old: str, new: str, of: str = "jsonl") -> None:
    for file in root.glob(f"*/{row}.{of}"):
        file.write_text(file.read_text().replace(old, new))


def test_speed_needs_processes_and_is_over_them(tmp_path: Path) -> None:
    repeat(tmp_path / "four", 15.0, 4)
    fast = found(tmp_path / "four", "Decoding is 1.3x")
    assert fast.kind == UNDECIDED
    assert fast.verdict == "undecided: needs 5 processes, has 4"
    assert fast.measured and fast.measured.number.ends and fast.measured.number.n == 12

    repeat(tmp_path / "five", 14.0)
    fast = found(tmp_path / "five", "Decoding is 1.3x")
    assert fast.verdict == "holds, within 1.3 to 1.5"
    assert fast.measured and fast.measured.number.value == pytest.approx(15.28 / 11, abs=1e-3)
    assert fast.measured.processes == 5


@pytest.mark.parametrize("process", ["one", None])
def test_repeats_in_one_process_are_one(tmp_path: Path, process: str | None) -> None:
    """As of a sweep over seeds in one command, and of records that do not say."""
    repeat(tmp_path, 15.0, process=process)
    fast = found(tmp_path, "Decoding is 1.3x")
    assert fast.verdict == "undecided: needs 5 processes, has 1"
    assert fast.measured and fast.measured.number.ends is None and fast.measured.number.n == 15


def test_repeats_that_share_the_full_caches_process_are_one(tmp_path: Path) -> None:
    repeat(tmp_path, 15.0)
    for seed in range(5):
        edit(tmp_path, "full", f'"p{seed}"', '"other"')
    assert found(tmp_path, "Decoding is 1.3x").verdict == "undecided: needs 5 processes, has 1"


@pytest.mark.parametrize(
    "speed, expected",
    [
        (10.0, FAILS),
        (14.0, "holds, within 1.3 to 1.5"),
        (15.2, "holds, within or above 1.3 to 1.5"),
        (20.0, "holds, above 1.3 to 1.5"),
    ],
)
def test_a_range_of_speed_has_two_ends(tmp_path: Path, speed: float, expected: str) -> None:
    repeat(tmp_path, speed)
    assert found(tmp_path, "Decoding is 1.3x").verdict == expected


def test_timings_under_load_count_nowhere(tmp_path: Path) -> None:
    repeat(tmp_path, 15.0)
    for prompt, batch in ((31_000, 4), (2_000, 1)):
        repeat(tmp_path, 15.0, prompt=prompt, batch_size=batch)
    starts = ("Decoding is 1.3x", "Decoding in batches", "Work", "Time per token")
    assert NOT_RUN not in {one.verdict for start in starts for one in judged(tmp_path, start)}
    edit(tmp_path, "buzz", '"loaded": false', '"loaded": true')
    assert {one.verdict for start in starts for one in judged(tmp_path, start)} == {NOT_RUN}


def test_speed_counts_at_32k_on_one_machine_and_latency_below_4k(tmp_path: Path) -> None:
    for prompt in (31_000, 2_000):
        repeat(tmp_path, 20.0, prompt=prompt)
    fast, latency = found(tmp_path, "Decoding is 1.3x"), found(tmp_path, "Work")
    assert fast.kind == HOLDS and fast.measured and fast.measured.number.n == 15
    assert latency.kind == HOLDS and latency.measured and latency.measured.number.n == 15

    edit(tmp_path, "buzz", "a CPU", "another CPU")
    edit(tmp_path, "environments", '{"a CPU"', '{"another CPU": {"cpu": "b"}, "a CPU"', "json")
    assert found(tmp_path, "Decoding is 1.3x").verdict == NOT_RUN


def test_batches_are_compared_with_batches_of_their_size(tmp_path: Path) -> None:
    repeat(tmp_path, 12.0, batch_size=8)
    repeat(tmp_path, 9.0, batch_size=4, prompt=2_000)
    four, eight = judged(tmp_path, "Decoding in batches")
    if four.measured and "batches of 8" in four.measured.of:
        four, eight = eight, four
    assert four.kind == FAILS and four.measured and "batches of 4" in four.measured.of
    assert eight.kind == HOLDS and eight.measured and "batches of 8" in eight.measured.of
    assert found(tmp_path, "Work").verdict == NOT_RUN

    edit(tmp_path, "full", '"batch_size": 8', '"batch_size": 4')
    assert len(judged(tmp_path, "Decoding in batches")) == 1


@pytest.mark.parametrize("speed, expected", [(10.0, HOLDS), (2.0, FAILS)])
def test_growth_is_measured_against_log_n(tmp_path: Path, speed: float, expected: str) -> None:
    for seed in range(5):
        where: dict[str, Any] = {"process": f"p{seed}", "seed": seed, "task": "throughput"}
        for prompt, own in ((1024, 10.0), (8192, speed)):
            where |= {"prompt": prompt, "lengths": [prompt], "speed": own}
            write_row(tmp_path, "full", [1.0] * 9, **where)
            write_row(tmp_path, "buzz", [1.0] * 9, budget=512, **where)
            where |= {"speed": 1.0}  # grows with the prompt by design, and says nothing
            write_row(tmp_path, "buzz", [1.0] * 9, budget=0.25, **where)
    growth = found(tmp_path, "Time per token")
    ratio = (1000 / speed + 1) / (100 + 1) / (13 / 10)
    assert growth.measured and growth.measured.number.value == pytest.approx(ratio)
    assert growth.verdict == expected


def test_growth_is_seen_within_a_process(tmp_path: Path) -> None:
    for seed, prompt in enumerate((1024, 8192) * 5):
        where: dict[str, Any] = {"process": f"p{seed}", "seed": seed, "task": "throughput"}
        write_row(tmp_path, "buzz", [1.0] * 9, prompt=prompt, **where)
    assert found(tmp_path, "Time per token").verdict == "undecided: needs 5 processes, has 0"


def test_a_verdict_names_the_full_cache_that_it_is_against(tmp_path: Path) -> None:
    """This project's at 10 tokens a second and more, transformers' own at 20."""
    repeat(tmp_path, 14.0)
    for seed in range(5):
        where: dict[str, Any] = {"process": f"p{seed}", "seed": seed, **LONG, "of": 1}
        write_row(tmp_path, "stock", [8.0] * 3, speed=20.0, lengths=[31_000], **where)
    own = found(tmp_path, "Decoding is 1.3x")
    other = found(tmp_path, "Beside stock: decoding is 1.3x")
    assert own.verdict == "holds, within 1.3 to 1.5" and "full's" in own.claim.unit
    assert other.kind == FAILS and "stock's" in other.claim.unit
    assert other.measured and other.measured.number.value == pytest.approx(15.28 / 21, abs=1e-3)
