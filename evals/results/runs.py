"""A run as all that compares runs knows it: what it was asked for, its records, what they mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.results.compare import REFERENCE, drawn, values_of
from evals.results.environment import machine
from evals.results.records import digest
from evals.results.schema import FORMAT, Asked, Environment, Record
from evals.results.statistics import Interval, bootstrap, mean, score_of

# What runs must share for their scores to be compared. Not the device: the same model answers the
# same on all, but for rounding. Speed is compared between runs of one machine only.
COMPARABLE = ("task", "task_version", "model", "model_digest", "seed")
COMPRESS: dict[str, Any] = {
    "compress": "prompt",
    "compress_chunk": None,
}  # as in runs that are older than these
# Settings of tasks that came later, with what runs did before: those are runs of today's.
LATER = {"questions": 1, "asked": "copies", "attempts": 1, "temperature": 0.0, "top_p": 1.0}
LATER |= {"spread": None}
# Settings that say where and how a run was made, not what of.
DISTURBED = "~"  # behind timings of samples during which other processes kept the machine busy
INCIDENTAL = ("output", "logger", "sweep_name", "objectives", "kl", "protocol", "device")


def comparable(config: Mapping[str, Any]) -> str:
    """Equal for runs whose scores may be compared, whatever part of the samples they are of."""
    known = {key: config.get(key) for key in COMPARABLE} | compression(config)
    return digest([FORMAT, known | {"task": settings_of(config) | {"shard": None}}])


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The task's, without those of :data:`LATER` that ask for nothing new."""
    task = config["task"]
    return {key: task[key] for key in task if key not in LATER or task[key] != LATER[key]}


def compression(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a prompt is compressed, see :mod:`evals.run.compress`; empty of whole prompts."""
    compress = config.get("compress", "prompt")
    if compress == "stream":
        return {key: config.get(key) for key in COMPRESS}
    return {} if compress == "prompt" else {"compress": compress}


def identity(config: Mapping[str, Any]) -> str:
    """Equal for runs that are parts or copies of one."""
    incidental = (*INCIDENTAL, *COMPRESS)
    known = {key: value for key, value in config.items() if key not in incidental}
    known |= compression(config)
    if known["method"]["name"] == REFERENCE:  # no budget changes it
        known = {key: value for key, value in known.items() if not key.startswith("budget")}
    return digest(known | {"task": settings_of(known) | {"shard": None}})


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """In which settings, of those that must be shared, configurations differ: their values."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}

    all_flat = [
        {k: v for key in COMPARABLE for k, v in flat(config.get(key), key).items()}
        | COMPRESS
        | compression(config)
        for config in configs
    ]
    names = dict.fromkeys(name for one in all_flat for name in one if name != "task.shard")
    columns = {name: [one.get(name) for one in all_flat] for name in names}
    return {name: values for name, values in columns.items() if any(v != values[0] for v in values)}


def length_bin(tokens: int) -> int:
    """The power of two nearest to a prompt's length."""
    return 2 ** round(math.log2(max(1, tokens)))


@dataclass(frozen=True)
class Run:
    """One configuration's records.

    Attributes:
        name: the folder's name; of several the first's.
        config: the resolved configuration; `task.shard` removed where shards were put together.
        environment: versions, machine, git revision; where there are several, that of most samples.
        summary: the run's own; of a failed run status and error, of an unfinished one empty.
        records: samples that ran, were out of memory or failed; each sample once.
        missing: shards that are not there, as written in `task.shard`.
        fidelity: with `kl=true`, the samples' distance to the full cache.
        folders: where it was read from.
        environments: those that samples were run in, by the digest that records name them by.
        asked: what it is of, see :class:`evals.results.schema.Asked`; None: of all that is there.
        stale: records beside them, of data that were changed since.
        problem: why nothing of it counts; empty if all is well.
    """

    name: str
    config: dict[str, Any]
    environment: Environment
    summary: dict[str, Any]
    records: list[Record]
    missing: tuple[str, ...] = ()
    fidelity: Sequence[Record] = ()
    folders: tuple[Path, ...] = ()
    environments: Mapping[str, Environment] = field(default_factory=dict)
    asked: Asked | None = None
    stale: int = 0
    problem: str = ""

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def method(self) -> str:
        return self.config["method"]["name"]

    @property
    def model(self) -> str:
        model = self.config["model"]
        return model["name"] + (", compiled" if model.get("compile") else "")

    @property
    def shard(self) -> str | None:
        return self.config["task"].get("shard")

    @property
    def budget(self) -> float | int | None:
        return None if self.method == REFERENCE else self.config["budget"]

    @property
    def parameters(self) -> dict[str, Any]:
        """What the method was configured with; a budget changes those that were not set by hand."""
        own = {k: v for k, v in self.config["method"].items() if k not in ("name", "_target_")}
        cache = {"positions": "cache"} | self.config["cache"]
        return own | cache | compression(self.config)

    @property
    def compress(self) -> str:
        """What of a prompt is compressed; of a stream with the tokens of its steps."""
        return " ".join(map(str, compression(self.config).values())) or COMPRESS["compress"]

    @property
    def fixed(self) -> tuple[str, ...]:
        """The method's parameters that the user set and a budget left alone."""
        return tuple(self.config.get("fixed") or ())

    @property
    def setting(self) -> str:
        """Equal for runs whose scores may be compared, see :func:`comparable`."""
        return comparable(self.config)

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it: the full cache, with plain attention."""
        return self.method == REFERENCE and self.config["cache"]["logn_base"] is None

    @property
    def machine(self) -> str:
        return machine(self.environment)

    @property
    def ran(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    @property
    def places(self) -> str:
        """Its folders, for messages."""
        return " and ".join(map(str, self.folders))

    @property
    def by_id(self) -> dict[str, Record]:
        return {record["id"]: record for record in self.records}

    @property
    def lacking(self) -> int:
        """Samples without a record."""
        return len(self.asked["samples"]) - len(self.records) if self.asked else 0

    @property
    def status(self) -> str:
        """complete, or what went wrong, with its reason."""
        if self.problem:
            return f"LEFT OUT: {self.problem}"
        if self.summary.get("status") == "failed":
            return f"FAILED: {self.summary.get('error')}"
        if self.missing:
            return f"unfinished: without shards {', '.join(self.missing)}"
        if self.lacking or not self.summary:
            of = f" of {len(self.asked['samples'])}" if self.asked else ""
            return f"unfinished: {len(self.records)}{of} samples"
        for status in ("failed", "oom"):
            found = [record for record in self.records if record["status"] == status]
            if found:
                reason = found[0].get("error", "out of memory")
                return f"{status.upper()} in {len(found)} of {len(self.records)} samples: {reason}"
        return "complete"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run."""
        whole = self.summary.get("status") == "complete" and not self.lacking and not self.missing
        return whole and not self.problem

    @property
    def scored(self) -> bool:
        """Whether there is a score that stands for the whole run."""
        return bool(self.ran) and self.finished

    @property
    def notes(self) -> list[str]:
        """What a reader should know of it."""
        notes = []
        if self.stale:
            notes.append(f"{self.stale} more records are of other data and do not count")
        used = Counter(r["environment"] for r in self.records if "environment" in r)
        if len(used) > 1:
            apart = _differing([self.environments.get(name, {}) for name in used])
            notes.append(f"its samples ran in {len(used)} environments, which differ in {apart}")
        loaded = [record.get("load") or 0 for record in self.ran if record.get("loaded")]
        if loaded:
            notes.append(
                f"other processes kept up to {max(loaded):.1f} cores busy during {len(loaded)} of"
                f" {len(self.ran)} samples: its timings ({DISTURBED}) are not to be relied on"
            )
        return notes

    def mean(self, name: str, records: Sequence[Record] | None = None) -> float | None:
        """Mean of a measurement over the samples that have it."""
        return mean(r.get(name) for r in (self.ran if records is None else records))

    def score(self, groups: Iterable[str] | None = None) -> float | None:
        """The headline's score, over all groups or some: the mean of the groups' means."""
        statistic = self.summary["statistic"]
        found = values_of(self._of(groups), self.summary["headline"], statistic)
        return score_of(found, statistic)

    def score_interval(self, groups: Iterable[str] | None = None) -> Interval:
        """95% bootstrap interval of :meth:`score`."""
        found = drawn(self._of(groups), self.summary["headline"])
        return bootstrap(found, self.summary["statistic"])

    def _of(self, groups: Iterable[str] | None) -> list[Record]:
        chosen = None if groups is None else set(groups)
        return [r for r in self.ran if chosen is None or r["group"] in chosen]

    def metric(self, name: str) -> tuple[float | None, Interval]:
        """One of the task's metrics over the samples, with its interval."""
        statistic = self.summary["statistic"]
        found = values_of(self.ran, name, statistic)
        return score_of(found, statistic), bootstrap(found, statistic)

    def kl(self) -> tuple[float | None, Interval]:
        """Mean divergence of the next-token distribution from the full cache's, in nats.

        Of the samples for which it is known, see :class:`evals.run.forced.Fidelity`.
        """
        known = [r["kl_to_full"] for r in self.fidelity if r["kl_to_full"] is not None]
        return score_of([known] if known else []), bootstrap([known])

    @property
    def kl_n(self) -> int | None:
        """Samples for which it is known; None if it was not asked for."""
        known = [r for r in self.fidelity if r["kl_to_full"] is not None]
        return len(known) if self.fidelity else None


def _differing(environments: Sequence[Environment]) -> str:
    """The fields in which environments differ, with their values."""
    flat = [one | one.get("versions", {}) for one in environments]
    names = dict.fromkeys(key for one in flat for key in one if key != "versions")
    parts = []
    for name in names:
        values = [str(one.get(name)) for one in flat]
        if len(set(values)) > 1:
            parts.append(f"{name} ({', '.join(dict.fromkeys(values))})")
    return ", ".join(parts) or "nothing that is on file"


def reference_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The full-cache run to compare a run with, of the same machine if there is one."""
    return reference(run.setting, runs, lambda other: other.machine != run.machine)


def reference(setting: str, runs: Iterable[Run], apart: Callable[[Run], Any]) -> Run | None:
    """The full-cache run of a setting, with plain attention; of several the one least apart."""
    full = [run for run in runs if run.is_reference and run.scored and run.setting == setting]
    return min(full, key=apart, default=None)
