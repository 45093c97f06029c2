"""What lies in run folders, read and checked: each sample counted once, runs put together.

Everything that compares runs takes them from here: the runner looks for its full-cache run, the
terminal table and the report read all there are. A folder that cannot be read, or that contradicts
another, is left out by name and stops nobody.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from buzz.errors import ConfigError
from evals.results.compare import REFERENCE
from evals.results.records import FIDELITY, RunFolder, sha256
from evals.results.runs import Run, differing_settings, identity
from evals.results.schema import FORMAT, Asked, Record, problem_of

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's takes ten times as long
UNREADABLE = {
    **{key: {"name": "unreadable"} for key in ("method", "task", "model")},
    "cache": {"logn_base": None},
    "budget": None,
    "seed": 0,
}


def read_runs(root: Path) -> list[Run]:
    """All runs of a folder of run folders, put together.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise ConfigError("runs", str(root), "there is no such folder")
    folders = [path.parent for path in sorted(root.glob("*/config.yaml"))]
    if not folders:
        raise ConfigError("runs", str(root), "holds no run folder; run.py makes them")
    runs = put_together([read_run(folder) for folder in folders])
    return [_compared(run, runs) if run.fidelity else run for run in runs]


def _compared(run: Run, runs: Sequence[Run]) -> Run:
    """A run without comparisons with answers that no full-cache run here gives any more."""
    full = [one for one in runs if one.is_reference and one.scored and one.setting == run.setting]
    given = {(r["id"], sha256(r["tokens"])) for one in full for r in one.ran if "tokens" in r}
    if not given:
        return run
    known = [
        one
        for one in run.fidelity
        if "answer_sha256" not in one or (one["id"], one["answer_sha256"]) in given
    ]
    return dataclasses.replace(run, fidelity=known)


def read_run(folder: Path) -> Run:
    """A folder's run. If something in it cannot be read, the run's `problem` says what."""
    config: dict[str, Any] = UNREADABLE
    try:
        config = _config(folder)
        return _read(folder, config)
    except (ConfigError, OSError) as error:
        problem = str(error) if isinstance(error, OSError) else f"{error.value}: {error.remedy}"
        return left_out(Run(folder.name, config, {}, {}, [], folders=(folder,)), problem)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError("run", str(folder), "no config.yaml: not a run's folder")
    try:
        config: Any = yaml.load(path.read_bytes(), Loader=LOADER)
        problem = problem_of(config, path.name)
    except (yaml.YAMLError, ValueError) as error:
        problem = f"not YAML ({str(error).splitlines()[0]})"
    if problem:
        raise ConfigError("run", str(path), f"{problem}; the run's own command writes it anew")
    return config


def _read(folder: Path, config: dict[str, Any]) -> Run:
    files = RunFolder(folder)
    summary = files.load("summary.json") or {}
    environments = files.environments()
    asked: Asked | None = files.load("prompts.json")
    try:
        records = files.read()
    except ConfigError as error:
        if "another version" in error.remedy:
            raise ConfigError(error.field, error.value, _again(error.remedy, config)) from error
        raise
    wanted = asked["samples"] if asked else {}
    own = records
    if asked:
        found = {name: records[name] for name in wanted if name in records}
        own = {n: r for n, r in found.items() if r.get("sample_sha256") == wanted[n]}
    if summary.get("status") == "complete":
        for record in own.values():
            if record["status"] == "ok" and summary["headline"] not in record["scores"]:
                place, score = f"{files.samples}, sample {record['id']}", summary["headline"]
                raise ConfigError("run", place, f"lacks the score {score}; remove that line")
    used = Counter(r["environment"] for r in own.values() if r.get("environment") in environments)
    name = used.most_common(1)[0][0] if used else next(reversed(environments), None)
    return Run(
        name=folder.name,
        config=config,
        environment=environments[name] if name else {},
        summary={} if summary.get("status") == "interrupted" else summary,
        records=list(own.values()),
        fidelity=[one for id, one in files.read(FIDELITY).items() if id in own],
        folders=(folder,),
        environments=environments,
        asked=asked,
        stale=len(records) - len(own),
    )


def _again(problem: str, config: dict[str, Any]) -> str:
    """Instead of the remedy for one line: the command that made the run."""
    what = {key: config[key]["name"] for key in ("task", "method", "model")}
    budget = "" if config["budget"] is None else f" budget={config['budget']}"
    command = f"python run.py {' '.join(f'{key}={name}' for key, name in what.items())}{budget}"
    return f"{problem.partition(';')[0]}; run it again: {command}, other settings in config.yaml"


def left_out(run: Run, problem: str) -> Run:
    """A run of which nothing counts, and why."""
    return dataclasses.replace(run, records=[], fidelity=(), summary={}, problem=problem)


def put_together(runs: Iterable[Run]) -> list[Run]:
    """One run of all that are parts or copies of one, in the order of the first of each.

    The same run on two machines is two: their timings differ. Shards may come from several.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    runs = list(runs)
    whole = {(identity(run.config), run.machine) for run in runs if not run.shard}
    for run in runs:
        name, where = identity(run.config), run.machine
        key = (name, where if not run.shard or (name, where) in whole else "shards")
        if run.problem:
            key = (run.name, str(run.folders))
        groups.setdefault(key, []).append(run)
    return [merge(group) for group in groups.values()]


def merge(parts: Sequence[Run]) -> Run:
    """One run from its parts and copies; left out if they contradict each other."""
    first = parts[0]
    if len(parts) == 1 and not first.shard:
        return first
    config = first.config | {"task": first.config["task"] | {"shard": None}}
    failed = [run.summary for run in parts if run.summary.get("status") == "failed"]
    summaries = [run.summary for run in parts if run.summary]
    records: dict[str, tuple[Record, Run]] = {}
    problem = _of_other_data(parts)
    for run in parts:
        for record in run.records:
            earlier = records.setdefault(record["id"], (record, run))
            if problem := problem or _contradiction(*earlier, record, run):
                break
            if record["status"] == "ok" != earlier[0]["status"]:
                records[record["id"]] = (record, run)
    fidelity = {one["id"]: one for run in reversed(parts) for one in run.fidelity}
    asked = _asked(parts)
    order = [name for name in asked["samples"] if name in records] if asked else list(records)
    merged = Run(
        name=first.name,
        config=config,
        environment=first.environment,
        summary=failed[0] if failed else summaries[0] if summaries else {},
        records=[records[name][0] for name in order],
        missing=_missing(parts, len(records)),
        fidelity=[fidelity[name] for name in order if name in fidelity],
        folders=tuple(folder for run in parts for folder in run.folders),
        environments={k: v for run in parts for k, v in run.environments.items()},
        asked=asked,
        stale=sum(run.stale for run in parts),
    )
    return left_out(merged, problem) if problem else merged


def _of_other_data(parts: Sequence[Run]) -> str:
    """Whether the parts are of different data, in words; empty if not, as far as is known."""
    known = [run for run in parts if run.asked]
    for run in known:
        if run.asked["data"] != known[0].asked["data"]:
            one, two = sorted([known[0].folders[0], run.folders[0]])
            return f"{one} and {two} are of different data; run both again, or remove one"
    return ""


def _contradiction(record: Record, run: Run, other: Record, elsewhere: Run) -> str:
    """Whether two records of one sample cannot both be right, in words; empty if they can."""
    if record is other:
        return ""
    apart = [key for key in ("prompt_sha256", "sample_sha256") if record.get(key) != other.get(key)]
    if record["status"] == other["status"] == "ok":
        apart += [key for key in ("prediction", "tokens") if record.get(key) != other.get(key)]
        ours, theirs = record["scores"], other["scores"]
        if ours.keys() != theirs.keys() or not all(
            math.isclose(ours[name], theirs[name], rel_tol=1e-6, abs_tol=1e-9) for name in ours
        ):
            apart.append("scores")
    if not apart:
        return ""
    names = {"prompt_sha256": "prompt", "sample_sha256": "references"}
    what = names.get(apart[0], apart[0])
    one, two = sorted([run.folders[0], elsewhere.folders[0]])
    return f"sample {record['id']} has another {what} in {one} than in {two}; remove one of them"


def _missing(parts: Sequence[Run], found: int) -> tuple[str, ...]:
    """The shards that are not there or not finished, unless others hold all their samples."""
    if any(not run.shard and run.finished for run in parts):
        return ()
    totals = {run.asked["of"] for run in parts if run.asked}
    if len(totals) == 1 and found == totals.pop():
        return ()
    given = {run.shard: run for run in sorted(parts, key=lambda run: run.finished) if run.shard}
    if not given:
        return ()
    counts = Counter(int(name.partition("/")[2]) for name in given)
    count = max(counts, key=lambda n: (counts[n], -n))
    names = [f"{i}/{count}" for i in range(count)]
    return tuple(n for n in names if n not in given or given[n].lacking or not given[n].summary)


def _asked(parts: Sequence[Run]) -> Asked | None:
    """What all parts are of, together, in the task's order; None if one does not say."""
    places: dict[str, tuple[int, str]] = {}
    for run in parts:
        if run.asked is None:
            return None
        start, _, step = (run.shard or "0/1").partition("/")
        for place, (name, value) in enumerate(run.asked["samples"].items()):
            places[name] = (int(start) + place * int(step), value)
    samples = {name: places[name][1] for name in sorted(places, key=places.__getitem__)}
    return {"samples": samples, "of": parts[0].asked["of"], "data": parts[0].asked["data"]}


def find_references(setting: str, folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished full-cache runs of a setting among folders, and which of these cannot be read.

    A run's summary tells whether it is looked at, so that a thousand others cost little.
    """
    found, broken = [], []
    for path in sorted(folders):
        try:
            summary = read_summary(path) if (path / "summary.json").is_file() else {}
        except ConfigError as error:
            if error.field == "output":  # and not one that failed or is of an early version
                broken.append(f"{error.value}: {error.remedy}")
            continue
        if summary.get("method") == REFERENCE and summary.get("setting") == setting:
            run = read_run(path)
            if run.problem:
                broken.append(run.problem)
            elif run.is_reference:
                found.append(run)
    return found, broken


def nearest_reference(config: Mapping[str, Any], folders: Iterable[Path]) -> list[str]:
    """Where another setting has a full-cache run, in what it differs: one line, of the nearest."""
    lines = []
    for folder in sorted(folders):
        with suppress(ConfigError):
            if read_summary(folder).get("method") == REFERENCE:
                apart = differing_settings([config, _config(folder)])
                values = (f"{name} {theirs}, here {own}" for name, (own, theirs) in apart.items())
                lines.append((len(apart), f"{folder.name} has {'; '.join(values)}"))
    return [line for _, line in sorted(lines)]


def read_summary(folder: Path) -> dict[str, Any]:
    """A finished run's summary.

    Raises:
        ConfigError: the folder holds none, or a broken one, an early version wrote it, or the run
            failed.
    """
    summary = RunFolder(folder).load("summary.json")
    if summary is None:
        raise ConfigError("run", str(folder), "no summary.json: not a finished run's folder")
    if summary["status"] != "complete":
        raise ConfigError("run", str(folder), f"the run failed: {summary.get('error')}")
    if summary.get("format") != FORMAT:
        raise ConfigError("run", str(folder), "an early version's summary; run it again")
    return summary
