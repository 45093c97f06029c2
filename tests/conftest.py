"""What a test run leaves out unless asked for: slow tests, and GPU tests without a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM
from hypothesis import settings
from runs import ROOT, run_tiny

# Test processes run beside each other, and tiny models gain nothing by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(1)

# How busy a machine is fails no test, and what a change broke fails in every run.
settings.register_profile("alike", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None, max_examples=500, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        action="store_true",
        help="also run tests that take minutes; other and more random examples in each run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs Chromium; skipped where there is none")
    settings.load_profile("others" if config.getoption("--slow") else "alike")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: run with --slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA device")
    browser = pytest.mark.skip(reason="browser: no Chromium; install it, or name it in CHROMIUM")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(gpu)
        if item.get_closest_marker("browser") and not CHROMIUM:
            item.add_marker(browser)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Names the order of the tests, which pytest-randomly does in a header that -q hides."""
    if (seed := config.getoption("randomly_seed", None)) is not None:
        terminalreporter.write_line(f"in the order of --randomly-seed={seed}")


@pytest.fixture(autouse=True)
def own_measurements(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """What methods measure of a model is kept in a folder of the test run, not the user's."""
    folder = tmp_path_factory.getbasetemp() / "measured"
    monkeypatch.setattr("baselines.calibration.user_cache", lambda: folder)


@pytest.fixture
def go(tmp_path: Path):
    """`run_tiny`, into a folder of the test's own."""

    def go(*overrides: str, **options: Any) -> Path:
        return run_tiny(go.runs, *overrides, **options)

    go.runs = tmp_path / "runs"
    return go


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process; its exit status."""
    from evals.launch import command

    def main(*arguments: str) -> int:
        output = [] if "output=" in " ".join(arguments) else [f"output={main.runs}"]
        argv = ["run.py", f"--config-path={ROOT}/configs", *arguments, *output]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            return command.cli()
        except SystemExit as error:
            return error.code

    main.runs = tmp_path / "runs"
    return main


@pytest.fixture
def refusal(main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What a command is refused with: one line, before a model is loaded."""
    import evals.run.runner

    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(evals.run.runner, "load_model", None)
            assert main(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return refusal
