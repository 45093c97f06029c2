"""Turns a command into jobs. Rows of one setting share a job; one that fails stops no other.

Each job of a sweep adds a line per row to `jobs.jsonl` in the sweep's folder, whatever process or
machine it runs in. From these lines the process that launched the jobs tells at the end what became
of all rows.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from buzz.errors import ConfigError
from evals import CONFIGS
from evals.report.terminal import print_tables
from evals.report.views import summary
from evals.results.folder import InUse, RunFailed, parse
from evals.results.frame import load
from evals.run.console import begin_command, command
from evals.run.plan import Plan, expand
from evals.run.runner import Outcome, run_job

JOBS = "jobs.jsonl"
SHARED = ["task", "model", "logger", "seed", "device", "output", "compress", "compress_chunk"]
VALUES = ("budget", "budget_by", "label")  # settings on which no other setting depends
# An error in one of these fields means a combination that a grid may have: it is skipped.
COMBINED = ("method.", "budget", "cache.")

# Models that could not be loaded, by their section: later jobs do not try again.
_missing: dict[str, ConfigError] = {}

Objectives = float | list[float] | None


@dataclass
class Asked:
    """One row of a job.

    Attributes:
        overrides: what tells it from the job's other rows.
        plan: None where there is an error.
    """

    overrides: list[str]
    plan: Plan | None = None
    outcome: Outcome | None = None
    error: Exception | None = None

    @property
    def status(self) -> str:
        if self.error is None:
            return "complete"
        # A row that is in use is that of another job.
        combined = isinstance(self.error, ConfigError) and self.error.field.startswith(COMBINED)
        return "skipped" if combined or isinstance(self.error, InUse) else "failed"

    @property
    def line(self) -> dict[str, Any]:
        """Its line in `jobs.jsonl`."""
        known: dict[str, Any] = {"overrides": self.overrides, "status": self.status}
        if self.error is not None:
            known["reason"] = _first_line(self.error)
            known["wrong_input"] = isinstance(self.error, ConfigError)
        if self.outcome is not None:
            known |= {"folder": str(self.outcome.file.parent), "failed": self.outcome.failed}
            known["row"] = self.outcome.plan.row
        return known


def run_all(cfg: DictConfig, overrides: Sequence[str] = ()) -> list[Asked]:
    """Runs the rows of a configuration under its tasks, those of one setting together.

    Args:
        cfg: the composed configuration.
        overrides: what it was composed from. A method's parameters among them are fixed: no budget
            changes them.

    Returns:
        What became of each row.
    """
    asked: list[Asked] = []
    settings: dict[str, list[Asked]] = {}
    known: dict[str, Plan] = {}  # by the sections of SHARED
    for config, own, fixed in _rows(cfg, overrides):
        try:
            every = expand(config)
        except ConfigError as error:
            asked.append(Asked(own, error=error))
            continue
        for one in every:
            of_suite = [f"task={one.task.name}"] if len(every) > 1 else []
            asked.append(row := Asked([*own, *of_suite]))
            model = OmegaConf.to_yaml(one.model)
            try:
                if model in _missing:
                    raise _missing[model]
                shared = OmegaConf.to_yaml(OmegaConf.masked_copy(one, SHARED), resolve=True)
                row.plan = Plan.of(one, fixed, known.get(shared))
                known.setdefault(shared, row.plan)
                settings.setdefault(str(row.plan.folder), []).append(row)
            except ConfigError as error:
                row.error = error
                if error.field == "model.name_or_path":
                    _missing[model] = error
    command.of = command.jobs * len(settings)
    for number, rows in enumerate(settings.values(), start=1):
        command.number = command.job * len(settings) + number
        _run(rows)
    return asked


def _run(rows: Sequence[Asked]) -> None:
    """Runs the rows of one setting."""
    try:
        for row, outcome in zip(rows, run_job([row.plan for row in rows]), strict=True):
            row.outcome, row.error = outcome, outcome.error
            if outcome.new and not outcome.error:
                plan = outcome.plan
                plan.logger.log(outcome.file, plan.config, outcome.records, _summary(outcome))
    except (ConfigError, RunFailed) as error:
        for row in rows:
            row.error = error
    except Exception as error:  # whatever it is, the other jobs go on
        traceback.print_exc()
        for row in rows:
            row.error = error


def _rows(
    cfg: DictConfig, overrides: Sequence[str]
) -> Iterator[tuple[DictConfig, list[str], list[str]]]:
    """Each row's configuration, what tells it from the others, and its fixed parameters.

    A sweep's `rows` meet an experiment's `variants` in every combination. What the user typed stays
    fixed under a budget; a variant's parameters are scaled by it.
    """
    shared = [one for one in overrides if not one.startswith("rows=")]
    rows = [list(row) for row in cfg.rows or [[]]]
    variants = [list(variant) for variant in cfg.variants or [[]]]
    known: dict[tuple[str, ...], DictConfig] = {}
    for row in rows:
        fixed = [name for one in [*shared, *row] if (name := _parameter(one))]
        for variant in variants:
            own = [*variant, *row]
            yield (_composed([*shared, *own], known) if own else cfg), own, fixed


def _parameter(override: str) -> str | None:
    """The method's parameter that an override sets."""
    name = override.partition("=")[0].lstrip("+")
    return name.removeprefix("method.") if name.startswith("method.") else None


def _composed(overrides: Sequence[str], known: dict[tuple[str, ...], DictConfig]) -> DictConfig:
    """The configuration of one row.

    Args:
        known: configurations composed so far, without what :data:`VALUES` sets. Composing takes
            long, setting these values does not.
    """
    values = [one for one in overrides if one.partition("=")[0].lstrip("+") in VALUES]
    found = OverridesParser.create().parse_overrides(values)
    if any(one.is_sweep_override() or one.is_add() for one in found):
        return _compose(overrides)  # which raises the error
    rest = tuple(one for one in overrides if one not in values)
    if rest not in known:
        known[rest] = _compose(rest)
    config = copy.deepcopy(known[rest])
    for override in found:
        OmegaConf.update(config, override.key_or_group, override.value())
    return config


def _compose(overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return compose("config", list(overrides))
    folder = str(CONFIGS)
    if HydraConfig.initialized():  # in a process that a launcher started
        sources = HydraConfig.get().runtime.config_sources
        (folder,) = (source.path for source in sources if source.provider == "main")
    with initialize_config_dir(folder, version_base=None):
        return compose("config", list(overrides))


def run_sweep_job(cfg: DictConfig, overrides: list[str], folder: Path) -> Objectives:
    """Runs one job of a sweep, and adds its rows to `jobs.jsonl`.

    Args:
        folder: the sweep's.

    Returns:
        The values of `cfg.objectives`, row after row; a number if there is one objective and one
        row. None if there are no objectives, or a row did not finish any sample.
    """
    rows = run_all(cfg, overrides)
    with open(folder / JOBS, "a", encoding="utf-8") as file:
        for row in rows:
            own = [one for one in overrides if not one.startswith("rows=")]
            line = row.line | {"overrides": [*own, *row.overrides]}
            file.write(json.dumps(line, allow_nan=False) + "\n")
    if not cfg.objectives or any(row.error for row in rows):
        return None
    summaries = [_summary(row.outcome) for row in rows if row.outcome]
    if not all(one["n"] for one in summaries):
        return None  # out of memory in every sample: a failed trial
    values = [objective(one, name) for one in summaries for name in cfg.objectives]
    return values[0] if len(values) == 1 else values


def _summary(outcome: Outcome) -> dict[str, Any]:
    frame = load(outcome.file.parent)
    return summary(frame[frame.row == outcome.plan.row])


def objective(summary: dict[str, Any], name: str) -> float:
    """A number of a summary by its name.

    Raises:
        ConfigError: there is no such number.
    """
    value = summary.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        known = [k for k, v in summary.items() if isinstance(v, float)]
        raise ConfigError("objectives", name, f"choose among {', '.join(known)}")
    return float(value)


def _first_line(error: Exception) -> str:
    text = str(error)
    if not isinstance(error, ConfigError | RunFailed):
        text = f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


class ResultsCallback(Callback):
    """Prints the table at the end of a run or of a sweep's jobs, and what was skipped or failed.

    Args:
        picture: file for a plot of a sweep's scores against their memory; None: no plot.
    """

    # Of this process's runs, for its exit status: what failed, and whether nothing ran at all
    # because each row's input was wrong.
    failed = 0
    refused = False

    def __init__(self, picture: str | None = None) -> None:
        self.picture = picture
        self.folders: list[Path] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses an output that cannot be written: Hydra makes a folder there first of all."""
        begin_command()
        try:
            Path(f"{config.output}/.hydra").mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            refused = ConfigError("output", config.output, f"{error}; give another folder")
            print(f"error: {refused}", file=sys.stderr)
            raise SystemExit(2) from None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _missing.clear()
        self.on_run_start(config, **kwargs)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        single = config.hydra.mode is not RunMode.MULTIRUN
        if single and job_return.status is JobStatus.COMPLETED:
            self.folders += map(Path, job_return.return_value)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folders:
            print_tables(list(dict.fromkeys(self.folders)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        rows = read_jobs(Path(config.hydra.sweep.dir))
        done = list(dict.fromkeys(Path(r["folder"]) for r in rows if r["status"] == "complete"))
        if done:
            print_tables(done)
        common = set.intersection(*(set(row["overrides"]) for row in rows)) if rows else set()
        incomplete: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["status"] != "complete":
                own = " ".join(name for name in row["overrides"] if name not in common)
                incomplete.setdefault((row["status"], row["reason"]), []).append(own)
        for (status, reason), alike in incomplete.items():
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            print(f"{status.upper()} {alike[0]}{more}: {reason}")
        counts = Counter(row["status"] for row in rows)
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
        lacking = sum(r["status"] == "complete" and r.get("failed", 0) > 0 for r in rows)
        if lacking:
            print(f"{lacking} complete, but with samples that failed")
        ResultsCallback.failed = counts["failed"] + lacking
        ResultsCallback.refused = bool(rows) and all(row.get("wrong_input") for row in rows)
        if self.picture and done:
            from evals.report.figures import draw_pareto  # with matplotlib, which is slow to import

            if draw_pareto(load(*done), Path(self.picture)):
                print(f"picture: {self.picture}   records: {config.output}/*/")


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """What became of the rows of a sweep's jobs so far."""
    path = folder / JOBS
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse(line))
        except ValueError:  # its process was killed while writing
            torn = {"overrides": [], "status": "failed", "reason": f"{path}:{number} is torn"}
            rows.append(torn)
    return rows
