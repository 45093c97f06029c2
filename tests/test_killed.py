"""Thirty commands killed at a moment of chance and given again: nothing lost, no other number."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import MADE, MODEL, NEEDLE, ROOT, TIMES

pytestmark = pytest.mark.slow

RUN = ["run.py", *MODEL, *NEEDLE, "task.repeats=8", "budget=0.25", "output=out"]
SWEEP = [RUN[0], "-m", *RUN[1:]]
ALL = ["+experiment=fidelity", "task=needle", "hydra.sweeper.params.budget='0.25,0.5'"]
COMMANDS = {
    "samples": [*RUN, "method=h2o"],
    "comparison": [*SWEEP, "method=full,buzz", "kl=true", "task.repeats=4"],
    "sweep": [*SWEEP, "method=full,h2o,buzz", "task.repeats=3"],
    "one pass": [*SWEEP[:-2], *ALL, "output=out"],
    "report": ["-m", "evals.report", "runs=../runs", "out=out"],
}
MEASURED = TIMES | MADE | {"environment", "seconds", "question_s", "context_peak_nbytes"}


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    script, *rest = COMMANDS[command]
    folder.mkdir(exist_ok=True)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    program = [script] if script == "-m" else [str(ROOT / script)]
    pipes["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *program, *rest], cwd=folder, **pipes)


def numbers(folder: Path) -> dict[str, Any]:
    """All that was written, by file, without what differs from one process to the next."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "out").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl" and path.name != "jobs.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            last = {row["id"]: {k: row[k] for k in row.keys() - MEASURED} for row in rows}
            found[name] = list(last.values())
        elif path.suffix in (".csv", ".md", ".tex"):
            found[name] = path.read_text()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, dict[str, Any]]]:
    """Of each command, undisturbed: its seconds, and the numbers."""
    base = tmp_path_factory.mktemp("whole")
    found = {}
    for command in COMMANDS:
        if command == "report":
            (base / "sweep" / "out").rename(base / "runs")
        begun = time.perf_counter()
        process = start(command, base / command)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        found[command] = (time.perf_counter() - begun, numbers(base / command))
        assert found[command][1]
    found["runs"] = (0.0, {"path": base / "runs"})
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_given_again(whole, command: str, seed: int, tmp_path: Path) -> None:
    """Twice, anywhere from its first second to its last."""
    if command == "report":
        (tmp_path / "runs").symlink_to(whole["runs"][1]["path"])
    seconds, expected = whole[command]
    chance = random.Random(f"{command} {seed}")
    folder, killed = tmp_path / "it", 0
    for _ in range(2):
        process = start(command, folder)
        try:
            process.communicate(timeout=seconds * chance.uniform(0.3, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    process = start(command, folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert killed, "ended before it could be killed; a slower command is needed"
    assert numbers(folder) == expected
