"""Where results go besides the setting's folder, which is always written: by default nowhere."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

from evals.results.record import Record
from evals.tasks.build import check_fields

PATIENCE = 300.0  # seconds that a logger may take


@dataclass(kw_only=True)
class Logger:
    """Logs nowhere else.

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
