"""The command `buzz-bench`, which is `python run.py` of a checkout.

Exit statuses and what is written when: docs/faults.md.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from buzz.errors import ConfigError
from evals import CONFIGS
from evals.launch import messages
from evals.launch.sweep import Objectives, ResultsCallback, run_all, run_sweep_job
from evals.results.folder import RunFailed
from evals.run.console import command
from evals.run.faults import TRACEBACKS, show_tracebacks
from evals.run.interrupt import Interrupted


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="config")
def main(cfg: DictConfig) -> list[str] | Objectives:
    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    try:
        if job.mode is RunMode.MULTIRUN:
            command.job = job.job.num % command.jobs  # 0 where this process does not know them all
            return run_sweep_job(cfg, overrides, Path(job.sweep.dir))
        rows = run_all(cfg, overrides)
        for row in rows:
            if row.error:
                raise row.error
        ResultsCallback.failed = sum(row.outcome.failed > 0 for row in rows)
        return [str(row.outcome.file.parent) for row in rows]
    except (ConfigError, RunFailed) as error:
        if show_tracebacks():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except (HydraException, OmegaConfBaseException) as error:  # in the overrides of one row
        if show_tracebacks():
            raise
        messages.report(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        status = error.exit_status if isinstance(error, Interrupted) else 130
        raise SystemExit(status) from None


def cli() -> int:
    """Runs what the command line asks for; the exit status."""
    ResultsCallback.failed, ResultsCallback.refused = 0, False
    in_full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = [sys.argv[0], *messages.arguments_of(sys.argv[1:])]
    # Hydra raises its errors only with HYDRA_FULL_ERROR=1, and otherwise prints them and exits. So
    # it is always set here, and what the user wants is in a variable of this project.
    variables = {"HYDRA_FULL_ERROR": "1", TRACEBACKS: str(int(in_full))}
    try:
        with patch.dict(os.environ, variables), patch.object(sys, "argv", arguments):
            main()
    except (HydraException, OmegaConfBaseException) as error:
        if in_full:
            raise
        messages.report(error)
        return 2
    return 2 if ResultsCallback.refused else 1 if ResultsCallback.failed else 0
