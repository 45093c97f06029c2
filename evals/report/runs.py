"""Run folders as the report sees them: finished, unfinished or failed; shards put together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from buzz.errors import ConfigError
from evals.compare import REFERENCE, strata, units, values_of
from evals.metrics import STATISTICS, mean, resampled, score_of
from evals.records import Record, RunFolder, digest

Interval = tuple[float, float] | None
Floats = NDArray[np.float64]
# Settings that say where and how a run was made, not what of.
INCIDENTAL = ("output", "logger", "sweep_name", "objectives", "kl", "protocol", "device")


@dataclass(frozen=True)
class Run:
    """One configuration's records.

    Attributes:
        name: the folder's name; of shards the first's.
        config: the resolved configuration; `task.shard` removed.
        environment: versions, machine, git revision.
        summary: the run's own; of a failed run status and error, of an unfinished one empty.
        records: samples that ran, were out of memory or failed.
        missing: shards that are not there, as written in `task.shard`.
        fidelity: with `kl=true`, the samples' distance to the full cache.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    records: list[Record]
    missing: tuple[str, ...] = ()
    fidelity: Sequence[Record] = ()

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def method(self) -> str:
        return self.config["method"]["name"]

    @property
    def model(self) -> str:
        return self.config["model"]["name"]

    @property
    def budget(self) -> float | int | None:
        return None if self.method == REFERENCE else self.config["budget"]

    @property
    def parameters(self) -> dict[str, Any]:
        """What the method was configured with; a budget changes those that were not set by hand."""
        own = {k: v for k, v in self.config["method"].items() if k not in ("name", "_target_")}
        return own | self.config["cache"]

    @property
    def setting(self) -> str:
        """Equal for runs of the same task, model and seed, on whatever machine."""
        return digest([self.config.get(key) for key in ("task", "task_version", "model", "seed")])

    @property
    def machine(self) -> str:
        device, cpu = (self.environment.get(key) for key in ("device", "cpu"))
        if device != "cpu":
            return str(device or "unknown")
        threads = self.environment.get("threads")
        return f"{cpu}, {threads} thread{'s' if threads != 1 else ''}"

    @property
    def ran(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    @property
    def status(self) -> str:
        """complete, or what went wrong, with its reason."""
        if self.summary.get("status") == "failed":
            return f"FAILED: {self.summary['error']}"
        if self.missing:
            return f"unfinished: without shards {', '.join(self.missing)}"
        if not self.summary:
            return f"unfinished: {len(self.records)} samples"
        if "statistic" not in self.summary:
            return "made by an earlier version"
        for status in ("failed", "oom"):
            found = [record for record in self.records if record["status"] == status]
            if found:
                reason = found[0].get("error", "out of memory")
                return f"{status.upper()} in {len(found)} of {len(self.records)} samples: {reason}"
        return "complete"

    @property
    def scored(self) -> bool:
        """Whether there is a score that stands for the whole run."""
        return bool(self.ran) and "statistic" in self.summary and not self.missing

    def mean(self, name: str, records: Sequence[Record] | None = None) -> float | None:
        """Mean of a measurement over the samples that have it."""
        return mean(r[name] for r in (self.ran if records is None else records))

    def score(self, groups: Iterable[str] | None = None) -> float | None:
        """The headline's score, over all groups or some: the mean of the groups' means."""
        statistic = self.summary["statistic"]
        found = values_of(self._of(groups), self.summary["headline"], statistic)
        return score_of(found, statistic)

    def score_interval(self, groups: Iterable[str] | None = None) -> Interval:
        """95% bootstrap interval of :meth:`score`."""
        parts = strata((r, units(r, self.summary["headline"])) for r in self._of(groups))
        return bootstrap(list(parts.values()), STATISTICS[self.summary["statistic"]])

    def _of(self, groups: Iterable[str] | None) -> list[Record]:
        chosen = None if groups is None else set(groups)
        return [r for r in self.ran if chosen is None or r["group"] in chosen]

    def metric(self, name: str) -> tuple[float | None, Interval]:
        """One of the task's metrics over the samples, with its interval."""
        statistic = self.summary["statistic"]
        found = values_of(self.ran, name, statistic)
        return score_of(found, statistic), bootstrap(found, STATISTICS[statistic])

    def kl(self) -> tuple[float | None, Interval]:
        """Mean divergence of the next-token distribution from the full cache's, in nats.

        Of the samples for which it is known, see :class:`evals.forced.Fidelity`.
        """
        known = [r["kl_to_full"] for r in self.fidelity if r["kl_to_full"] is not None]
        return score_of([known] if known else []), bootstrap([known])

    @property
    def kl_n(self) -> int | None:
        """Samples for which it is known; None if it was not asked for."""
        known = [r for r in self.fidelity if r["kl_to_full"] is not None]
        return len(known) if self.fidelity else None


def read_runs(root: Path) -> list[Run]:
    """All runs of a folder of run folders, shards of one run put together.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise ConfigError("runs", str(root), "there is no such folder")
    runs = [_read(path.parent) for path in sorted(root.glob("*/config.yaml"))]
    if not runs:
        raise ConfigError("runs", str(root), "holds no run folder; run.py makes them")
    whole = [run for run in runs if not run.config["task"].get("shard")]
    shards: dict[str, list[Run]] = {}
    for run in runs:
        if run.config["task"].get("shard"):
            shards.setdefault(_identity(run), []).append(run)
    return whole + [merge(parts) for parts in shards.values()]


def merge(shards: Sequence[Run]) -> Run:
    """One run from those of its shards."""
    given = {run.config["task"]["shard"]: run for run in shards}
    count = int(next(iter(given)).partition("/")[2])
    first = shards[0]
    failed = [run.summary for run in shards if run.summary.get("status") == "failed"]
    unfinished = [name for name, run in given.items() if not run.summary]
    missing = [f"{i}/{count}" for i in range(count) if f"{i}/{count}" not in given]
    return Run(
        name=first.name,
        config=first.config | {"task": first.config["task"] | {"shard": None}},
        environment=first.environment,
        summary=failed[0] if failed else first.summary,
        records=[record for run in shards for record in run.records],
        missing=tuple(sorted(missing + unfinished)),
        fidelity=[record for run in shards for record in run.fidelity],
    )


def _identity(run: Run) -> str:
    known = {key: value for key, value in run.config.items() if key not in INCIDENTAL}
    return digest(known | {"task": known["task"] | {"shard": None}})


def _read(folder: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    summary = _json(folder / "summary.json")
    return Run(
        name=folder.name,
        config=config,
        environment=_json(folder / "environment.json"),
        summary={} if summary.get("status") == "interrupted" else summary,
        records=list(RunFolder(folder).read().values()),
        fidelity=list(RunFolder(folder).read("fidelity.jsonl").values()),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def reference_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The full-cache run of the same setting with plain attention."""
    for other in runs:
        plain = other.method == REFERENCE and other.config["cache"]["logn_base"] is None
        if plain and other.scored and other.setting == run.setting:
            return other
    return None


def pairs(
    run: Run, other: Run, value: Callable[[Record], Iterable[float | None]]
) -> dict[str, list[tuple[float, float]]]:
    """Values of the samples that both runs answered from the same prompt, by group.

    Of samples that are about the same, see :func:`evals.compare.strata`, the means.
    """
    theirs = {record["id"]: record for record in other.ran}
    parts: list[tuple[Record, list[tuple[float, float]]]] = []
    for record in run.ran:
        match = theirs.get(record["id"])
        if match and match["prompt_sha256"] == record["prompt_sha256"]:
            both = zip(value(record), value(match), strict=True)
            known = [(a, b) for a, b in both if a is not None and b is not None]
            if known:
                parts.append((record, known))
    return strata(parts)


def interval_of(values: Floats | None) -> Interval:
    """The middle 95% of bootstrap values; None where some are not finite."""
    if values is None or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(
    groups: Sequence[Sequence[Any]], finish: Callable[[Floats], Floats] = lambda means: means
) -> Interval:
    """95% percentile interval of a function of the mean of the groups' means."""
    means = resampled(groups)
    return None if means is None else interval_of(finish(means))


def settings_text(run: Run, runs: Iterable[Run]) -> str:
    """The parameters in which runs of the same method differ, as `name=value`."""
    alike = [other.parameters for other in runs if other.method == run.method]
    own = run.parameters
    varying = [key for key in own if any(other.get(key) != own[key] for other in alike)]
    return " ".join(f"{key}={own[key]}" for key in varying)


def length_bin(tokens: int) -> int:
    """The power of two nearest to a prompt's length."""
    return 2 ** round(math.log2(max(1, tokens)))
