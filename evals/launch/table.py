"""The table after a run: Hydra calls it when all tasks are over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from evals.report.terminal import print_tables


class TableCallback(Callback):
    """Prints the table when a run is over; of a sweep `SweepCallback` does."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        single = config.hydra.mode is not RunMode.MULTIRUN
        if single and job_return.status is JobStatus.COMPLETED:
            self.folders += map(Path, job_return.return_value)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folders:
            print_tables(self.folders)
