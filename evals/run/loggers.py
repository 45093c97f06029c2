"""Services that get results besides the setting's folder, which is always written."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, Literal

import numpy as np

from buzz.errors import ConfigError
from evals.results.folder import unrolled
from evals.results.record import Record
from evals.tasks.build import check_fields

PATIENCE = 300.0  # seconds that a logger may take
LEFT_OUT = {"trace", "tokens"}  # long, and of no use in a table


@dataclass(kw_only=True)
class Logger:
    """No service.

    Attributes:
        service: what warnings call it.
    """

    service: ClassVar[str] = ""

    name: str

    def check(self) -> None:
        """What can be checked before a model is loaded.

        Raises:
            ConfigError: a setting is wrong, or a package is not installed.
        """
        check_fields("logger", self)

    def log(
        self, file: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        """Takes a finished row, whose file is written by now. Failures are warnings.

        So is a service that takes no end: it runs in a thread that dies with the process.
        """
        problems: list[str] = []

        def guarded() -> None:
            try:
                self._log(file, config, records, summary)
            except Exception as error:  # a logger must not cost the result
                problems.append(str(error) or type(error).__name__)

        thread = Thread(target=guarded, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            problems.append(f"no answer within {PATIENCE:g} s")
        if problems:
            warnings.warn(f"not logged to {self.service}: {problems[0]}", stacklevel=2)

    def _log(
        self, file: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        pass


@dataclass(kw_only=True)
class WandbLogger(Logger):
    """Weights & Biases: configuration, per-sample table, cache lengths, summary.

    A sweep's runs share a group.

    Attributes:
        project, entity: as W&B calls them.
        mode: online, offline or disabled; by default online if WANDB_API_KEY is set, else offline.
    """

    service: ClassVar[str] = "Weights & Biases"

    project: str
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None

    def _log(
        self, file: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        import wandb

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=f"{file.parent.name} {file.stem}",
            group=config["sweep_name"],
            config=config,
            mode=self.mode or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
            dir=file.parent,
            settings=wandb.Settings(silent=True),
        )
        columns = sorted({key for record in records for key in record} - LEFT_OUT)
        rows = [[_cell(record.get(key)) for key in columns] for record in records]
        run.log(
            {
                "samples": wandb.Table(columns=columns, data=rows),
                "cache length": wandb.Histogram(cache_lengths(records)),
            }
        )
        run.summary.update(summary)
        run.finish()


@dataclass(kw_only=True)
class TensorBoardLogger(Logger):
    """TensorBoard event files, a folder for each row: numbers, cache lengths, configuration."""

    service: ClassVar[str] = "TensorBoard"

    def check(self) -> None:
        super().check()
        if find_spec("tensorboard") is None:
            remedy = "is not installed: pip install -e '.[tensorboard]'"
            raise ConfigError("logger", self.name, remedy)

    def _log(
        self, file: Path, config: dict[str, Any], records: list[Record], summary: dict[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(file.parent / file.stem)) as writer:
            writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")
            for name, value in summary.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    writer.add_scalar(name, value)
            if lengths := cache_lengths(records):
                writer.add_histogram("cache length", np.array(lengths))


def cache_lengths(records: list[Record]) -> list[int]:
    """Entries held after every step of every sample, from the records' traces."""
    return unrolled(run for record in records for run in record.get("trace", ()))


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value
