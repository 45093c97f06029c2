"""The jobs of a sweep: what cannot run is skipped or recorded, and never stops the others.

Each job adds one line to `jobs.jsonl` in the sweep's folder, in whatever process or machine it ran,
so that the process that launched them can tell in the end what became of all.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from buzz.errors import ConfigError
from evals.report.terminal import print_tables
from evals.results.reading import put_together, read_run, read_summary
from evals.results.records import InUse, RunFailed, RunFolder, parse
from evals.run.plan import Plan, expand
from evals.run.runner import run

JOBS = "jobs.jsonl"
# A setting of these that cannot be served is a combination to leave out of the grid.
COMBINED = ("method.", "budget", "cache.")

Objectives = float | list[float] | None


def run_job(cfg: DictConfig, overrides: list[str], fixed: list[str], folder: Path) -> Objectives:
    """Runs one configuration of a sweep, of a suite all its tasks, and notes what became of it.

    Args:
        cfg: the composed configuration.
        overrides: what the sweep composed it from.
        fixed: the method's parameters that the user set, which a budget leaves alone.
        folder: the sweep's.

    Returns:
        What `cfg.objectives` names, from the summaries, task after task: a number if there is one
        objective and one task. None if there are no objectives, or a task did not finish
        a sample.
    """
    try:
        outcomes = [_run_task(one, fixed) for one in expand(cfg)]
    except ConfigError as error:
        outcomes = [{"status": "failed", "reason": str(error)}]
    with open(folder / JOBS, "a", encoding="utf-8") as file:
        for outcome in outcomes:
            file.write(json.dumps({"overrides": overrides, **outcome}, allow_nan=False) + "\n")
    if not cfg.objectives or any(outcome["status"] != "complete" for outcome in outcomes):
        return None
    summaries = [read_summary(Path(outcome["folder"])) for outcome in outcomes]
    if not all(summary["n"] for summary in summaries):
        return None  # out of memory in every sample: a failed trial
    values = [objective(summary, name) for summary in summaries for name in cfg.objectives]
    return values[0] if len(values) == 1 else values


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


def _run_task(cfg: DictConfig, fixed: list[str]) -> dict[str, Any]:
    try:
        folder = run(cfg, fixed)
        failed = read_summary(folder)["failed"]
        return {"status": "complete", "folder": str(folder), "failed_samples": failed}
    except RunFailed as error:  # its folder says so
        return {"status": "failed", "reason": str(error)}
    except ConfigError as error:
        # Two jobs may come to the same run: the full cache, for one, has no budget.
        skipped = isinstance(error, InUse) or error.field.startswith(COMBINED)
        status = "skipped" if skipped else "failed"
        return {"status": status, "reason": str(error)}
    except Exception as error:  # whatever it is, the other jobs go on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        folder = _record_failure(Plan.of(cfg, fixed), reason)
        return {"status": "failed", "reason": reason, "folder": str(folder)}


def _record_failure(plan: Plan, reason: str) -> Path:
    """Leaves a run folder that says what was asked for and why it is not there."""
    folder = RunFolder(plan.folder)
    with folder.lock():
        folder.write("config.yaml", OmegaConf.to_yaml(plan.config))
        folder.write("summary.json", {"status": "failed", "error": reason})
    return folder.path


class ResultsCallback(Callback):
    """Prints the table when a run or all jobs of a sweep are over, and what was skipped or failed.

    Args:
        picture: where a sweep's scores are drawn against their memory; None: nowhere.
    """

    failed = 0  # of this process's runs; decides its exit status

    def __init__(self, picture: str | None = None) -> None:
        self.picture = picture
        self.folders: list[Path] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses an output that cannot be written, in which Hydra makes a folder first of all."""
        try:
            Path(f"{config.output}/.hydra").mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            refused = ConfigError("output", config.output, f"{error}; give another folder")
            print(f"error: {refused}", file=sys.stderr)
            raise SystemExit(2) from None

    on_multirun_start = on_run_start

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        single = config.hydra.mode is not RunMode.MULTIRUN
        if single and job_return.status is JobStatus.COMPLETED:
            self.folders += map(Path, job_return.return_value)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folders:
            print_tables(self.folders)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        jobs = read_jobs(Path(config.hydra.sweep.dir))
        done = [Path(job["folder"]) for job in jobs if job["status"] == "complete"]
        if done:
            print_tables(list(dict.fromkeys(done)))
        common = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
        for job in jobs:
            if job["status"] != "complete":
                own = " ".join(name for name in job["overrides"] if name not in common)
                print(f"{job['status'].upper()} {own}: {job['reason']}")
        counts = Counter(job["status"] for job in jobs)
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
        incomplete = sum(job.get("failed_samples", 0) > 0 for job in jobs)
        if incomplete:
            print(f"{incomplete} of the complete ones with samples that failed")
        ResultsCallback.failed = counts["failed"] + incomplete
        if self.picture and done:
            from evals.report.figures import draw_pareto  # with matplotlib, which is slow to import

            if draw_pareto(put_together(map(read_run, done)), Path(self.picture)):
                print(f"picture: {self.picture}   records: {config.output}/*/")


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """What became of a sweep's jobs so far."""
    path = folder / JOBS
    jobs = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            jobs.append(parse(line))
        except ValueError:  # its process was killed as it wrote
            torn = {"overrides": [], "status": "failed", "reason": f"{path}:{number} is torn"}
            jobs.append(torn)
    return jobs
