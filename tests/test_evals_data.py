"""Reading other people's files, and the records' own format."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buzz import ConfigError
from evals.data import read_jsonl
from evals.metrics import bootstrap_interval
from evals.records import RunFolder, arithmetic_runs, digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', ":3'?: not JSON"),
        (b'{"a": 1}\n[1]\n', ":2'?: not a JSON object"),
        (b'{"a": 1}\n{"b": 1}\n', ":2'?: lacks a"),
        (b'{"a": "\xff"}\n', ":1'?: not UTF-8"),
        (b'{"a": "x\\ud800"}\n', ":1'?: holds a lone surrogate"),
        (b"\n", "holds no samples"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_jsonl(path, "task.data_file", ("a",))
    assert caught.value.field == "task.data_file"


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": "x\u2028y \\ud83d\\ude00"}\n\n{"a": 2}', encoding="utf-8")
    assert read_jsonl(path, "f") == [{"a": "x\u2028y \U0001f600"}, {"a": 2}]


@given(st.lists(st.integers(0, 50)))
def test_arithmetic_runs_lose_nothing(values: list[int]) -> None:
    runs = arithmetic_runs(values)
    assert [first + i * step for first, count, step in runs for i in range(count)] == values


def test_arithmetic_runs_are_short_for_a_growing_cache() -> None:
    assert arithmetic_runs([*range(90, 140), *range(60, 140)]) == [(90, 50, 1), (60, 80, 1)]


def test_malformed_record_inside_the_file_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append({"id": "a"})
    with open(folder.samples, "a") as file:
        file.write("{torn\n")
    folder.append({"id": "b"})
    with pytest.raises(ConfigError, match="samples.jsonl:2"):
        folder.read()


def test_last_record_of_an_id_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for status in ("failed", "ok"):
        folder.append({"id": "a", "status": status})
    assert folder.read() == {"a": {"id": "a", "status": "ok"}}


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1]}) == digest({"b": [1], "a": 1}) != digest({"a": 1, "b": [2]})


def test_bootstrap_interval_is_that_of_a_mean_of_means() -> None:
    assert bootstrap_interval([[1.0] * 5, [0.0] * 9]) == (0.5, 0.5)
    low, high = bootstrap_interval([[0.0, 1.0] * 50])
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
