"""The same command gives the same records, in whatever process, and however often it was stopped.

Batches are in test_evals_runner.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import MODEL, NEEDLE, ROOT, timeless

SETTING = [*MODEL, *NEEDLE, "task.repeats=8", "method=h2o", "budget=0.25"]
SAMPLES = 24


def start(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "run.py", *SETTING, f"output={output}"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(output: Path) -> Path:
    process = start(output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = output.glob("needle-*")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The records of a run that nothing disturbed."""
    records = timeless(finish(tmp_path_factory.mktemp("whole")))
    assert len(records) == SAMPLES
    return records


def test_another_process_gives_the_same_records(whole, go) -> None:
    assert timeless(go("task.repeats=8", "method=h2o", "budget=0.25")) == whole


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(whole, tmp_path, number) -> None:
    process = start(tmp_path)
    while process.poll() is None:
        files = list(tmp_path.glob("needle-*/samples.jsonl"))
        if files and files[0].read_bytes().count(b"\n") > 2:
            process.send_signal(number)
            break
        time.sleep(0.005)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)
    so_far = timeless(files[0].parent)
    assert 2 < len(so_far) < SAMPLES
    assert timeless(finish(tmp_path)) == whole
