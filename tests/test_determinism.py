"""The same command gives the same records, in whatever process, and however often it was stopped.

Batches are in test_evals_runner.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import MODEL, NEEDLE, ROOT, run_tiny, timeless

SETTING = ["task.repeats=8", "method=h2o", "budget=0.25"]
SAMPLES, WRITTEN = 24, 3
# The command `python run.py`, which is sent a signal when it has written so many records.
STOPPED = f"""
import os, runpy
from evals.results.folder import SettingFolder

append, written = SettingFolder.append, []

def append_and_stop(self, file, record):
    append(self, file, record)
    if record["method"] == "h2o":
        written.append(record)
    if record["method"] == "h2o" and len(written) == {WRITTEN}:
        os.kill(os.getpid(), int(os.environ["NUMBER"]))

SettingFolder.append = append_and_stop
runpy.run_path({str(ROOT / "run.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The records of a run that nothing disturbed."""
    records = timeless(run_tiny(tmp_path_factory.mktemp("whole"), *SETTING))
    assert len(records) == SAMPLES
    return records


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(
    whole, go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """It is begun by another process, in another folder, and ended by this one."""
    monkeypatch.setenv("NUMBER", str(int(number)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", STOPPED, *MODEL, *NEEDLE, *SETTING, "output=runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no other folder is left behind
    (file,) = go.runs.glob("needle-*/h2o*.jsonl")
    so_far = timeless(file)
    assert WRITTEN <= len(so_far) <= WRITTEN + 1  # that in flight is answered, but for SIGKILL
    assert so_far == whole[: len(so_far)]
    assert go(*SETTING) == file
    assert timeless(file) == whole
