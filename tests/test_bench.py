"""The bench's command line; what it measures is not for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench


def test_two_shapes_at_once_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--llama-7b", "--hidden-size", "64"])
    assert "--llama-7b: not allowed with --hidden-size" in capsys.readouterr().err


def test_a_shape_is_passed_on_whole(monkeypatch) -> None:
    ran: list[list[str]] = []

    class Done:
        returncode, stdout = 0, "{}"

    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: ran.append(command) or Done)
    for flags, shape in (
        (["--llama-7b"], bench.LLAMA_7B),
        (["--hidden-size", "64"], bench.SHAPE | {"hidden_size": 64}),
    ):
        bench.child(bench.parse(flags), "buzz", 2048, "1")
        assert bench.shape_of(bench.parse(ran.pop()[2:])) == shape


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
