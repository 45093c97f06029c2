"""What a run says of how far it is where there is no terminal."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager

import pytest
from runs import MODEL

from buzz import ConfigError
from evals.results.folder import RunFailed
from evals.run import console
from evals.run.console import Command, begin_command, command, progress


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
    with progress("needle, 3 methods", 100, lambda: "h2o@0.25 accuracy 0.5") as advance:
        line = clock.line(2)
        assert (
            line
            == "needle, 3 methods: 0 of 100 samples done in 2 min, 100 left; h2o@0.25 accuracy 0.5"
        )
        advance(25)
        told = "25 of 100 samples done in 40 min, 75 left, about 2 h 00 min"
        assert told in clock.line(38)
        advance(50)
        assert "75 of 100 samples done in 45 min, 25 left, about 15 min" in clock.line(5)
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_line_says_which_setting_it_is_and_how_long_all_take(monkeypatch, capsys) -> None:
    """The first took 10 minutes, the second was done before; this one takes 6, and two follow."""
    clock = Clock(monkeypatch, capsys)
    begin_command()
    command.number, command.of = 1, 5
    with progress("needle, 2 methods", 3, lambda: "") as advance:
        clock.now += 600
        advance(3)
    command.number = 3
    with progress("needle, 2 methods", 4, lambda: "full accuracy 1") as advance:
        advance(1)
        said = clock.line(1.5)
    begin_command()
    start = "setting 3 of 5, needle, 2 methods: 1 of 4 samples done in 2 min, 3 left, about 4 min; "
    assert said == start + "all settings done in about 20 min; full accuracy 1"


def test_jobs_and_tasks_of_a_sweep_are_counted(main, monkeypatch) -> None:
    """Two seeds of a suite with two tasks are four settings; a command alone is one."""
    seen = []

    def run_job(plans):
        seen.append((command.number, command.of))
        raise RunFailed("enough")

    monkeypatch.setattr("evals.launch.sweep.run_job", run_job)
    model = [*MODEL, "model.max_length=2048"]
    assert main("-m", *model, "task=suite", "seed=0,1", "method=h2o,buzz", "budget=0.5") == 1
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seen.clear()
    assert main(*model, "task=suite") == 1 and main(*model) == 1
    assert seen == [(1, 2), (2, 2), (1, 1)]
    seen.clear()  # a worker of a launcher knows its own jobs alone
    plugin = sys.modules["hydra_plugins.one_pass"]  # loaded by Hydra
    monkeypatch.setattr(plugin, "command", Command())
    assert main("-m", *model, "task=suite", "seed=0,1", "method=h2o") == 1
    assert seen == [(1, 2), (2, 2)] * 2


def test_batches_of_each_methods_size_are_counted_exactly(go, monkeypatch) -> None:
    """Beside what is there already; rows without room for a batch are over at once."""
    counted = []

    @contextmanager
    def recorded(name, total, status):
        done = []
        yield done.append
        counted.append((name, total, sum(done)))

    monkeypatch.setattr("evals.run.runner.progress", recorded)
    room = ["task=throughput", "task.lengths=[100]", "task.max_new_tokens=8"]
    room += ["task.batch_size=max", "task.kv_limit=0.5MB", "task.samples=9"]
    file = go(*room, "method=full", needle=False)
    assert ("throughput, 1 method", 9, 9) in counted
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:7]))
    counted.clear()
    with pytest.raises(ConfigError, match="32 rows fit"):
        go(*room, "method=local", "method.window=30", needle=False)
    assert ("throughput, 2 methods", 2 + 9, 2 + 9) in counted


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
    assert seen[0] == ("needle, 2 methods", 3) and seen[-1] == ("needle, timings", 2 * 3)
    file.write_text("".join(line for line in lines if '"0%"' not in line))
    seen.clear()
    go(*options)
    assert seen[0] == ("needle, 2 methods", 1)
