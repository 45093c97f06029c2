"""Where results go besides the run folder, which is always written."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.records import Record


@dataclass(kw_only=True)
class Logger:
    """Logs nowhere else."""

    name: str

    def log(
        self, folder: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        """Takes a finished run."""


@dataclass(kw_only=True)
class WandbLogger(Logger):
    """Weights & Biases: configuration, per-sample table, summary. Its failures are warnings.

    Attributes:
        project, entity: as W&B calls them.
        mode: online, offline or disabled; by default online if WANDB_API_KEY is set, else offline.
    """

    project: str
    entity: str | None = None
    mode: str | None = None

    def log(
        self, folder: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        try:
            import wandb

            run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=folder.name,
                config=config,
                mode=self.mode or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
                dir=folder,
                settings=wandb.Settings(silent=True),
            )
            columns = sorted({key for record in records for key in record if key != "trace"})
            rows = [[_cell(record.get(key)) for key in columns] for record in records]
            run.log({"samples": wandb.Table(columns=columns, data=rows)})
            run.summary.update(summary)
            run.finish()
        except Exception as error:  # a logger must not cost the result
            warnings.warn(f"not logged to Weights & Biases: {error}", stacklevel=2)


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value
