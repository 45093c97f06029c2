"""Runs one configuration: `python run.py method=buzz task=needle budget=0.25`.

Several at a time, with one table in the end: `python run.py -m method=full,streaming_llm,h2o,buzz`;
several tasks: `python run.py task=suite 'task.tasks=[needle,pydoc]'`; sweeps and where they run:
docs/sweeps.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from buzz.errors import ConfigError
from evals.runner import RunFailed, run_all
from evals.sweep import Objectives, SweepCallback, run_job


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> list[str] | Objectives:
    job = HydraConfig.get()
    overrides = (override.partition("=")[0] for override in job.overrides.task)
    names = (name.lstrip("+").removeprefix("method.") for name in overrides if "method." in name)
    try:
        if job.mode is RunMode.MULTIRUN:
            return run_job(cfg, list(job.overrides.task), list(names), Path(job.sweep.dir))
        return [str(folder) for folder in run_all(cfg, fixed=names)]
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
    sys.exit(1 if SweepCallback.failed else 0)
