"""What a run says of how far it is where there is no terminal."""

from __future__ import annotations

import time

import pytest

from evals.run import console
from evals.run.console import progress


class Clock:
    """Minutes that pass as told; each is one line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        self.now, self.capsys = 0.0, capsys
        monkeypatch.setattr(console, "MINUTE", 0.01)
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)

    def line(self, minutes: float) -> str:
        """The second line after so many more minutes; the first may have begun before."""
        self.now += 60 * minutes
        self.capsys.readouterr()
        said = ""
        for _ in range(500):
            time.sleep(0.01)
            said += self.capsys.readouterr().err
            if said.count("\n") > 1:
                return said.splitlines()[1]
        raise AssertionError("silence")


def test_a_line_says_what_is_done_and_left(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch, capsys)
    with progress("needle: 3 methods", 100, lambda: "h2o@0.25 accuracy 0.5") as advance:
        line = clock.line(2)
        assert line == "needle: 3 methods: 0 of 100 done in 2 min, 100 left; h2o@0.25 accuracy 0.5"
        advance(25)
        told = "25 of 100 done in 40 min, 75 left, about 2 h 00 min"
        assert told in clock.line(38)
        advance(50)
        assert "75 of 100 done in 45 min, 25 left, about 15 min" in clock.line(5)
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_run_counts_what_was_missing(go, monkeypatch, capsys) -> None:
    """Prompts that are there already would make the estimate too good."""
    seen = []

    def recorded(name, total, status):
        seen.append((name, total))
        return progress(name, total, status)

    monkeypatch.setattr("evals.run.runner.progress", recorded)
    options = ["method=h2o", "budget=0.25", "kl=true", "time_samples=2"]
    file = go(*options)
    lines = file.read_text().splitlines(keepends=True)
    assert seen[0] == ("needle: 2 methods", 3) and seen[-1] == ("needle: timings", 2 * 3)
    file.write_text("".join(line for line in lines if '"0%"' not in line))
    seen.clear()
    go(*options)
    assert seen[0] == ("needle: 2 methods", 1)
