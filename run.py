"""Runs one configuration: `python run.py method=buzz task=needle budget=0.25`.

Several at a time, with one table in the end: `python run.py -m method=full,streaming_llm,h2o,buzz`;
several tasks: `python run.py task=suite 'task.tasks=[needle,pydoc]'`; sweeps and where they run:
docs/sweeps.md; exit statuses and what is written when: docs/faults.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from buzz.errors import ConfigError
from evals.launch import messages
from evals.launch.sweep import Objectives, ResultsCallback, run_job
from evals.report import fidelity as fidelity_report
from evals.results.reading import read_summary
from evals.results.records import RunFailed
from evals.run import fidelity
from evals.run.interrupt import Interrupted
from evals.run.runner import run_all


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> list[str] | Objectives:
    job = HydraConfig.get()
    overrides = (override.partition("=")[0] for override in job.overrides.task)
    names = (name.lstrip("+").removeprefix("method.") for name in overrides if "method." in name)
    try:
        if job.mode is RunMode.MULTIRUN:
            return run_job(cfg, list(job.overrides.task), list(names), Path(job.sweep.dir))
        if cfg.get("fidelity"):
            print(fidelity_report.shown(fidelity.run_all(cfg)))
            return []
        folders = run_all(cfg, fixed=names)
        ResultsCallback.failed = sum(read_summary(folder)["failed"] > 0 for folder in folders)
        return [str(folder) for folder in folders]
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt as error:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        status = error.exit_status if isinstance(error, Interrupted) else 130
        raise SystemExit(status) from None


def cli() -> int:
    """Runs what the command line asks for; the exit status."""
    ResultsCallback.failed = 0
    asked = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):  # else Hydra prints its errors and exits
            main()
    except (HydraException, OmegaConfBaseException) as error:
        if asked:
            raise
        messages.report(error)
        return 2
    return 1 if ResultsCallback.failed else 0


if __name__ == "__main__":
    sys.exit(cli())
