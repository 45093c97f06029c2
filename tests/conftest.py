"""What a test run leaves out unless asked for: slow tests, and GPU tests without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from runs import MODEL, NEEDLE, ROOT

settings.register_profile("untimed", deadline=None)  # how busy a machine is fails no test
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: run with --slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Names the order of the tests, which pytest-randomly does in a header that -q hides."""
    if (seed := config.getoption("randomly_seed", None)) is not None:
        terminalreporter.write_line(f"in the order of --randomly-seed={seed}")


@pytest.fixture
def go(tmp_path: Path):
    """Runs the tiny model with some overrides; the run's folder."""
    import evals.run.runner

    def go(*overrides: str, fixed: frozenset[str] = frozenset(), needle: bool = True) -> Path:
        task = NEEDLE if needle else []
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            cfg = compose("config", [*MODEL, *task, f"output={tmp_path}/runs", *overrides])
        return evals.run.runner.run(cfg, fixed)

    go.runs = tmp_path / "runs"
    return go


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process; its exit status."""
    import run

    def main(*arguments: str) -> int:
        output = [] if "output=" in " ".join(arguments) else [f"output={main.runs}"]
        argv = ["run.py", f"--config-path={ROOT}/configs", *arguments, *output]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            return run.cli()
        except SystemExit as error:
            return error.code

    main.runs = tmp_path / "runs"
    return main
