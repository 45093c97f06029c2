"""The bench's command line; what it measures is not for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from scripts import bench, measure


def test_two_shapes_at_once_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--llama-7b", "--hidden-size", "64"])
    assert "--llama-7b: not allowed with --hidden-size" in capsys.readouterr().err


def test_a_shape_is_passed_on_whole(monkeypatch) -> None:
    ran: list[dict[str, object]] = []

    class Done:
        returncode, stdout = 0, "{}"

    def run(command: list[str], **_: object) -> type[Done]:
        ran.append(json.loads(command[-1]))
        return Done

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "available", lambda: 10**12)
    for flags, shape in (
        (["--llama-7b"], bench.LLAMA_7B),
        (["--hidden-size", "64"], bench.SHAPE | {"hidden_size": 64}),
    ):
        bench.child(bench.parse(flags), "buzz", 2048, "1")
        assert measure.Job(**ran.pop()).shape == shape


def test_what_does_not_fit_is_not_started(monkeypatch) -> None:
    monkeypatch.setattr(bench.subprocess, "run", None)
    monkeypatch.setattr(bench, "available", lambda: 10 * 10**9)
    arguments = bench.parse(["--llama-7b", "--device", "cpu"])
    row = bench.child(arguments, "full", 4096, "1")
    assert row["failed"].startswith("does not fit: needs about 1")
    assert 13.4e9 < bench.needs(bench.job(arguments, "full", 1, 1)) < 14.5e9  # of 13.5 GB weights


def test_the_largest_batch_is_found_whatever_else_fails(monkeypatch) -> None:
    tried: list[int] = []

    def child(arguments, method: str, prompt: int, batch: str) -> dict[str, object]:
        tried.append(int(batch))
        if tried == [1, 2]:
            return {"failed": "a lost connection"}
        return {"failed": "OOM"} if int(batch) > 7 else {"batch": int(batch)}

    monkeypatch.setattr(bench, "child", child)
    assert bench.largest(bench.parse([]), "full", 64) == {"batch": 6}
    assert tried == [1, 2, 2, 4, 8, 6]


def test_ratios_are_of_equal_batches_alone() -> None:
    one, two = {"batch": 1, "decode_ms": 3.0}, {"batch": 2, "decode_ms": 6.0}
    assert bench.ratio(one, {"batch": 1, "decode_ms": 6.0}, "decode_ms") == "0.50"
    assert bench.ratio(one, two, "decode_ms") == bench.ratio(one, {"failed": "OOM"}, "x") == "-"


TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("method", ["stock", "full", "buzz", "buzz-chunked"])
def test_rows_fill_a_limit_and_never_exceed_it(method: str) -> None:
    entry = 2 * 2 * 2 * 8 * 4
    job = measure.Job(method, prompt=700, new=4, settle=1, shape=TINY, kv_limit=entry * 2500)
    row = measure.measure(job)
    held = {"stock": 711, "full": 711}.get(method, 272 + 11)  # one eviction, then 11 tokens
    assert row["batch"] == 2500 // held
    assert row["kv_bytes"] <= job.kv_limit
    assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms"])


def test_a_prompt_in_chunks_is_held_until_its_end() -> None:
    job = measure.Job("h2o", prompt=700, new=2, settle=1, shape=TINY, chunk=128)
    row = measure.measure(job)
    assert row["entries"] == 560 and row["read_bytes"] > row["kv_bytes"] > 0
    assert row["linear_ms"] < row["decode_ms"]


def test_a_measured_row_is_not_measured_again(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def child(arguments, method: str, prompt: int, batch: str) -> dict[str, object]:
        asked.append(method)
        if method == "h2o":
            raise KeyboardInterrupt
        return {"failed": "OOM"}

    monkeypatch.setattr(bench, "child", child)
    command = ["--lengths", "64", "--repeats", "1", "--out", str(tmp_path), "--resume"]
    command += ["--methods", "full", "h2o"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bench.main(command)
    assert asked == ["full", "h2o", "h2o"]


def test_more_methods_are_measured_when_asked_for(tmp_path: Path, monkeypatch) -> None:
    measured: list[str] = []

    def child(arguments, method: str, prompt: int, batch: str) -> dict[str, str]:
        measured.append(method)
        return {"failed": "OOM"}

    monkeypatch.setattr(bench, "child", child)
    common = ["--lengths", "64", "--repeats", "1", "--out", str(tmp_path)]
    assert bench.main([*common, "--methods", "tova", "snapkv"]) == 0
    assert measured == ["tova", "snapkv"]
    assert bench.main(common) == 0
    assert measured[2:] == list(bench.METHODS) and "tova" not in bench.METHODS


def test_what_evictions_take_is_seen() -> None:
    row = measure.measure(measure.Job("h2o", prompt=600, new=5, shape=TINY))
    assert 0 < row["eviction_share"] < 1


def test_methods_take_their_steps_in_turn(tmp_path: Path, monkeypatch) -> None:
    def process(arguments, asked: dict[str, object]) -> object:
        methods = asked.pop("paired")
        return measure.paired(measure.Job(**{**asked, "shape": TINY}), methods)

    monkeypatch.setattr(bench, "process", process)
    flags = ["--paired", "--device", "cpu", "--lengths", "600", "--new", "5", "--out"]
    assert bench.main([*flags, str(tmp_path), "--methods", "full", "buzz"]) == 0
    (file,) = tmp_path.glob("*-paired.csv")
    rows = pandas.read_csv(file).set_index("method")
    assert list(rows.index) == ["full", "buzz"] and rows.first_over_it["full"] == 1
    assert rows.entries["full"] == 600 + measure.SETTLE + 5 > rows.entries["buzz"]
    assert rows.kv_bytes["full"] == rows.entries["full"] * 2 * 2 * 2 * 8 * 4


def test_what_does_not_fit_together_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "process", None)
    monkeypatch.setattr(bench, "available", lambda: 10 * 10**9)
    flags = ["--llama-7b", "--device", "cpu", "--paired", "--lengths", "4096", "--out"]
    assert bench.main([*flags, str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-paired.csv")
    assert pandas.read_csv(file).failed[0].startswith("does not fit")


@pytest.mark.parametrize("flags", [["--batch", "2"], ["--repeats", "3"], ["--resume"]])
def test_pairs_have_one_row_each(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--paired", *flags])
    assert "--paired: not allowed with" in capsys.readouterr().err
