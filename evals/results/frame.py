"""All records of a folder as one pandas.DataFrame, and the bootstrap interval of every number.

    from evals.results import frame
    rows = frame.load("results/runs")
    frame.view(rows, ["task", "row"])                           # scores with 95 % intervals
    frame.view(rows, ["task", "row"], "kl_to_full", against="h2o")    # and paired with H2O

A row is one sample under one method. Every table, figure and verdict is a grouping of such rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from buzz.errors import ConfigError
from evals.results.environment import machine
from evals.results.folder import REFERENCE, SettingFolder, sha256
from evals.results.record import FORMAT

TOLERANCE = 0.05  # methods whose memory differs by less count as equal
MARK = "†"  # marks methods that hold more than their budget plus TOLERANCE
COLUMNS = (
    # the setting: what rows share so that their scores can be compared
    *("setting", "task", "model", "seed", "compress", "headline", "statistic"),
    *("higher_is_better", "grouped_by", "task_settings", "model_settings"),
    # the method, and what it was given
    *("row", "label", "method", "parameters", "fixed", "cache", "budget", "budget_by"),
    # the sample
    *("id", "group", "unit", "meta", "prompt_sha256", "sample_sha256", "prompt_tokens"),
    *("status", "error", "asked_nbytes", "scores", "score", "blocks", "prediction", "references"),
    *("tokens", "generated_tokens", "stop_reason", "truncated_tokens", "chat_template"),
    # what the cache held: entries per layer and KV head, bytes of keys and values
    *("budget_entries", "held", "kv_entries_mean", "kv_entries_peak", "kv_nbytes_mean"),
    *("kv_nbytes_peak", "kv_evicting_nbytes_mean", "kv_evicting_nbytes_peak"),
    *("allocated_nbytes", "evictions", "batch_size"),
    # distance to the full cache
    *("kl_to_full", "kl_median", "top1_to_full"),
    # times: of timed samples only
    *("timed", "loaded", "ttft_s", "question_s", "decode_tokens_per_s", "itl_p50_ms"),
    *("itl_p95_ms", "memory_peak_nbytes", "context_peak_nbytes", "question_peak_nbytes"),
    *("process", "environment", "machine", "model_parameters", "git_revision"),
)
SAME = ["setting", "id", "prompt_sha256", "sample_sha256"]  # equal for samples that are paired
WITHOUT_BUDGET = (REFERENCE, "stock")  # keep everything: this project's and transformers' caches
NOT_RUN = "not run"  # the status of a sample without a record
# The score as a function of the mean over groups, and the inverse function.
STATISTICS: dict[str, Callable[[Any], Any]] = {"mean": lambda means: means, "exp": np.exp}
INVERSES: dict[str, Callable[[Any], Any]] = {"mean": lambda scores: scores, "exp": np.log}


# Reading


def load(*roots: str | Path) -> pd.DataFrame:
    """Reads all settings in or below some folders: a row for each method and sample.

    Samples without a record have the status `not run`. Committed samples (samples.csv.gz,
    spread.csv) come in the same columns. KL is left blank if it was measured on another answer of
    the full cache than the one in the folder.

    Returns:
        :data:`COLUMNS`, `scores.NAME` for every metric, and any other field of a record.
        `attrs["left_out"]` lists what could not be read or does not count, with the reason.

    Raises:
        ConfigError: a folder does not exist.
    """
    rows: list[dict[str, Any]] = []
    stored: list[pd.DataFrame] = []
    left_out: list[str] = []
    folders: dict[Path, Path] = {}
    for root in map(Path, roots):
        if not root.exists():
            raise ConfigError("runs", str(root), "no such folder")
        # The second was version 0.2's.
        for file in sorted([*root.rglob("setting.yaml"), *root.rglob("samples.jsonl")]):
            folders.setdefault(file.parent.resolve(), file.parent)
        for file in sorted(root.rglob("prompts.json")):
            if file.parent.resolve() not in folders:
                left_out.append(
                    f"{file.parent}: no setting.yaml, which says what its records are of"
                )
        stored += [_committed(file, root) for file in sorted(root.rglob("samples.csv.gz"))]
        stored += [_spread(file) for file in sorted(root.rglob("spread.csv"))]
    count = Counter(path.name for path in folders.values())
    for path in folders.values():
        name = path.name if count[path.name] == 1 else "-".join(path.parts).lstrip("/-")
        try:
            rows += list(_rows(SettingFolder(path), name, left_out))  # all of it, or nothing
        except (ConfigError, OSError) as error:
            reason = str(error)
            if isinstance(error, ConfigError):
                file = "" if error.value == str(path) else f"{error.value}: "
                reason = f"{file}{error.remedy}"
            left_out.append(f"{path}: {reason}")
    read = pd.DataFrame(rows)
    read["budget"] = pd.Series([row["budget"] for row in rows], dtype=object)  # 512, not 512.0
    parts = [one for one in (read, *stored) if len(one)]  # nothing would make seeds of it 0.0
    found = pd.concat(parts or [read], ignore_index=True)
    more = [name for name in found.columns if name not in COLUMNS]
    found = found.reindex(columns=[*COLUMNS, *more])
    found["budget"] = found["budget"].astype(object).where(found["budget"].notna(), None)
    for name in ("group", "prompt_sha256", "sample_sha256"):
        found[name] = found[name].astype(object).fillna("")
    for name in ("timed", "loaded"):
        found[name] = found[name].eq(True)
    found["fixed"] = [one if isinstance(one, list) else [] for one in found["fixed"]]
    found.attrs["left_out"] = left_out
    return found


def _rows(folder: SettingFolder, name: str, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one setting's rows of the frame.

    Args:
        name: what the setting is called in the frame.
        left_out: gets a line for whatever does not count.

    Raises:
        ConfigError: setting.yaml or prompts.json is missing, broken or of another version.
    """
    known, asked = folder.setting, folder.asked
    if known["version"] != FORMAT or asked is None:
        version = f"written by another version ({known['version']}, not {FORMAT})"
        remedy = "no prompts.json; run its command again" if asked is None else version
        raise ConfigError("runs", str(folder.path), remedy)
    if lacking := asked["of"] - len(asked["samples"]):
        left_out.append(f"{folder.path}: {lacking} of {asked['of']} samples are of other shards")
    metric, environments = known["metric"], folder.environments
    shared: dict[str, Any] = {
        "setting": name,
        "task": known["task"]["name"],
        "model": known["model"]["name"] + (", compiled" if known["model"].get("compile") else ""),
        "task_settings": known["task"],
        "model_settings": known["model"],
        **{name: known.get(name) for name in ("seed", "compress", "model_digest")},
        **{name: metric[name] for name in ("headline", "statistic", "higher_is_better")},
        "grouped_by": metric["grouped_by"],
    }
    if known["compress"] == "stream":
        shared["compress"] = f"stream {known['compress_chunk']}"
    full: dict[str, Any] = {}
    for row, files in folder.rows.items():
        records, reasons = folder.put_together(files, asked["samples"])
        left_out += reasons
        if row == REFERENCE:  # it is the first
            full = records
        told = next(iter(records.values()), {})
        names = ("label", "method", "parameters", "fixed", "cache", "budget", "budget_by")
        same: dict[str, Any] = {key: told.get(key) for key in names}
        for sample, digest in asked["samples"].items():
            record: Any = records.get(sample)
            if record is None:
                record = {"status": NOT_RUN, "id": sample, "sample_sha256": digest}
            place = environments.get(str(record.get("environment")), {})
            scores = record.get("scores") or {}
            line = {**shared, "row": row, **same, **record, "score": scores.get(metric["headline"])}
            line |= {f"scores.{one}": value for one, value in scores.items()}
            answer = record.get("reference_sha256")
            if answer and (sample not in full or answer != sha256(full[sample].get("tokens"))):
                line |= {"kl_to_full": None, "kl_median": None, "top1_to_full": None}
            by, entries = record.get("budget_by"), record.get("budget_entries")
            budgeted = by and entries and "scores" in record
            line["held"] = record[f"kv_entries_{by}"] / entries if budgeted else None
            line["machine"] = machine(place) if place else "unknown"
            yield line | {one: place.get(one) for one in ("model_parameters", "git_revision")}


def _committed(file: Path, root: Path) -> pd.DataFrame:
    """Reads committed samples of the embedded model; `held` compares the mean number of entries."""
    found = pd.read_csv(file, dtype={"sample": str})
    folder = file.parent.relative_to(root).as_posix()
    context = found.get("context_tokens", found.prompt_tokens)  # in older files all of it
    found["setting"] = found.task if folder == "." else f"{folder}/" + found.task
    found["compress"] = found.task.str.extract(r"-(context|stream.*)$")[0].fillna("prompt")
    found["task"] = found.task.str.replace(r"-(context|stream.*)$", "", regex=True)
    found["budget_entries"] = found.budget.where(found.budget >= 1, context * found.budget)
    found["held"] = found.entries_mean / found.budget_entries
    found["row"] = found.method + "@" + found.budget.map("{:g}".format)
    measured = ["budget", "budget_by", "budget_entries", "held", "kl", "kl_median", "top1"]
    measured += ["entries_mean", "entries_peak", "evictions"]
    full = found.drop_duplicates(["setting", "sample"]).drop(columns=measured)
    full = full.assign(row=REFERENCE, method=REFERENCE, score=full.full_score)
    found = pd.concat([full, found], ignore_index=True)
    found = found.rename(columns=STORED).drop(columns="full_score")
    model = found.model if "model" in found else _SMOLLM["model"]
    return found.assign(label=found.method, **_SMOLLM | {"model": model})


# Columns that have another name in committed samples.
STORED = {"sample": "id", "kl": "kl_to_full", "top1": "top1_to_full", "answer": "reference_sha256"}
STORED |= {"entries_mean": "kv_entries_mean", "entries_peak": "kv_entries_peak"}
_SMOLLM = {"model": "smollm2", "seed": 0, "status": "ok", "headline": "score", "statistic": "mean"}
_SMOLLM |= {"higher_is_better": True, "grouped_by": "group"}


def _spread(file: Path) -> pd.DataFrame:
    """Reads committed samples whose facts stand in one cell, in neighbouring ones, or apart."""
    found = pd.read_csv(file).rename(columns={"sample": "id", "kl": "kl_to_full"})
    found["setting"] = found.task + "-spread=" + found.spread
    full = found.method == REFERENCE
    found["row"] = np.where(full, REFERENCE, found.method + "@" + found.budget.map("{:g}".format))
    found["budget"] = found.budget.astype(object).mask(full, None)
    found["budget_by"] = full.map({True: None, False: "peak"})
    found["score"] = found.accuracy
    return found.assign(label=found.method, **_SMOLLM | {"headline": "accuracy"})


# Estimates and their intervals


class Estimate(NamedTuple):
    """A number, its 95 % interval if it has one, and the number of samples behind it."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


NOTHING = Estimate(None, None, None, 0)
Weights = tuple[Sequence[float], Sequence[float] | None]
VALUE: Weights = ((1,), None)
DIFFERENCE: Weights = ((1, -1), None)
RATIO: Weights = ((1, 0), (0, 1))


def interval(
    values: Any,
    of: Weights = VALUE,
    *,
    group: Any = None,
    unit: Any = None,
    statistic: str = "mean",
    guard: bool | None = None,
    span: tuple[float, float] | None = None,
) -> Estimate:
    """Estimates a score, a difference or a ratio, with its percentile bootstrap interval.

    The estimate is (over . m) / (under . m), or over . m if `of` has no `under`. m holds each
    method's mean: the mean of the groups' means, passed through `statistic` (exp turns a loss into
    a perplexity). Samples are resampled with the values of all methods together, so comparisons
    are paired. The random seed is fixed: equal samples give equal intervals. Seeds and processes
    can be the samples, too.

    The guard covers differences so rare that no sample shows them. It adds one sample to the
    smallest group (of several to the one whose mean it moves farthest), once for the lower end and
    once for the upper end. That sample is as extreme as
    the largest difference between two methods on one sample (with one method: between two
    samples). If all samples are equal, it differs by the largest value. The interval of n equal
    samples is then 3 / (n + 1) of that value wide: the rule of three.

    Args:
        values: [n] or [n, methods]; samples with an unknown value are left out.
        of: VALUE, DIFFERENCE (first less second), RATIO, or other weights (over, under) of the
            methods.
        group: [n], the group of each sample; all groups have the same weight.
        unit: [n], the unit of sampling, such as a context with several questions; a unit's
            samples are resampled together and count as their mean.
        guard: whether to use the guard; None: only if all samples are equal. A verdict from few
            samples needs it.
        span: least and largest value of a single sample; the guard's sample has one of these.

    Returns:
        No ends if a group has a single sample, or if an end is not finite (a ratio to a score that
        may be 0).
    """
    table = np.asarray(values, float)
    table = table[:, None] if table.ndim == 1 else table
    known = np.isfinite(table).all(axis=1)
    if not known.any():
        return Estimate(None, None, None, 0)
    parts = (None if one is None else np.asarray(one, object)[known] for one in (group, unit))
    groups, together = strata(table[known], *parts)
    value = float(quotient(means(groups, statistic), of))
    both = np.asarray(ends(groups, of, statistic, 0.95, guard, span, together))
    low, high = both.tolist() if np.isfinite(both).all() else (None, None)
    return Estimate(value if np.isfinite(value) else None, low, high, int(known.sum()))


def strata(values: Any, group: Any, unit: Any) -> tuple[list[Any], bool]:
    """The values to resample, [n, methods] for each group; units are replaced by their means.

    Returns:
        The groups, and whether they share units. If they do, a unit is resampled in all groups at
        once: every group has a line for every unit, blank if it has no sample of it.
    """
    names = np.zeros(len(values), int) if group is None else pd.factorize(group)[0]
    about = -np.ones(len(values), int)
    if unit is not None:
        about = pd.factorize(np.where(unit == "", None, unit))[0]
    if (about < 0).all():
        return [values[names == i] for i in pd.unique(names)], False
    about = np.where(about < 0, about.max() + 1 + np.arange(len(values)), about)
    cells = pd.DataFrame(values).groupby([names, about], sort=False).mean()
    together = cells.index.get_level_values(1).has_duplicates
    every = pd.unique(about)
    found = (cells.loc[i] for i in pd.unique(names))
    return [(one.reindex(every) if together else one).to_numpy() for one in found], together


def ends(
    groups: Sequence[Any],
    of: Weights = VALUE,
    statistic: str = "mean",
    level: float = 0.95,
    guard: bool | None = None,
    span: tuple[float, float] | None = None,
    together: bool = False,
) -> tuple[Any, Any]:
    """Both ends of :func:`interval`, from groups [n, methods, ...].

    Each element of the further axes is a repetition with ends of its own.

    Args:
        level: probability that the interval covers the truth.
        together: whether line i of all groups is one unit.
    """
    if min(map(len, groups)) < 2:
        nothing = np.full(groups[0].shape[2:], np.nan)
        return nothing, nothing
    chances = (1 - level) / 2, (1 + level) / 2

    def quantiles(groups: Sequence[Any]) -> Any:
        sizes = tuple(map(len, groups))
        weights = _weights(sizes[:1]) * len(groups) if together else _weights(sizes)
        found = quotient(np.moveaxis(_score(weights, groups, statistic), 1, 0), of)
        finite = np.isfinite(found).all(axis=0)
        return np.where(finite, np.quantile(np.where(finite, found, 0), chances, axis=0), np.nan)

    if not guard:
        low, high = quantiles(groups)
        if guard is False or not (np.abs(high - low) <= 1e-12 * np.abs(high)).any():
            return low, high
    low, high = (quantiles(_with_one_more(groups, of, i, span, together))[i] for i in (0, 1))
    apart = low != high  # else no sample shows how much samples may differ
    return np.where(apart, low, np.nan), np.where(apart, high, np.nan)


def means(groups: Sequence[Any], statistic: str = "mean") -> Any:
    """The statistic of the mean of the groups' means: [methods, ...]."""
    return STATISTICS[statistic](np.mean([np.nanmean(one, axis=0) for one in groups], axis=0))


def quotient(means: Any, of: Weights) -> Any:
    """A weighted sum of the methods' means [methods, ...], or the ratio of two such sums."""
    over, under = of
    top = np.tensordot(np.asarray(over, float), means, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return top if under is None else top / np.tensordot(np.asarray(under, float), means, 1)


def _score(weights: Sequence[Any], groups: Sequence[Any], statistic: str) -> Any:
    """The methods' means in each resample: [resamples, methods, ...]."""
    total: Any = 0
    count: Any = 0
    for weight, values in zip(weights, groups, strict=True):
        known = np.isfinite(values)
        if known.all():
            total, count = total + np.tensordot(weight, values, 1) / len(values), count + 1
            continue
        with np.errstate(invalid="ignore"):
            n = np.tensordot(weight, known.astype(float), 1)
            means = np.tensordot(weight, np.where(known, values, 0), 1) / n
        total, count = total + np.nan_to_num(means), count + (n > 0)
    with np.errstate(over="ignore"):
        return STATISTICS[statistic](total / count)


@lru_cache(maxsize=4)
def _weights(sizes: tuple[int, ...], resamples: int = 2000) -> list[Any]:
    """How often a resample has each sample: [resamples, n] for each group."""
    rng, found = np.random.default_rng(0), []
    for n in sizes:
        picks = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
        counts = np.bincount(picks.ravel(), minlength=resamples * n)
        found.append(counts.reshape(-1, n).astype(float))
    return found


def _with_one_more(
    groups: Sequence[Any], of: Weights, end: int, span: Any, together: bool
) -> list[Any]:
    """The groups with the guard's sample for the low (0) or the high (1) end, see interval."""
    weights = np.asarray(of[0], float)
    axis = 0 if len(weights) == 1 else 1
    apart = [np.max(np.nanmax(g, axis) - np.nanmin(g, axis), axis=0) for g in groups]
    largest = [np.nanmax(np.abs(g), axis=(0, 1)) for g in groups]
    gap, largest = np.max(apart, axis=0), np.max(largest, axis=0)
    far = (-1, 1)[end] * np.where(gap > 0, gap, largest)
    direction = (weights / (weights @ weights)).reshape(-1, *[1] * far.ndim)
    found, gains = [], []
    smallest = min(map(len, groups))
    for group in groups:
        mean = np.nanmean(group, axis=0)
        more = mean + far * direction
        if span:  # the minuend at one end of it, the subtrahend at the other
            more[weights > 0], more[weights < 0] = span[end], span[1 - end]
        found.append(np.concatenate([group, more[None]]))
        # Of groups that it moves as far, one by its mean: the order of groups decides nothing.
        gain = (-1, 1)[end] * np.tensordot(weights, more - mean - 1e-9 * mean, 1)
        gains.append(gain if len(group) == smallest else np.full_like(gain, -np.inf))
    if together:
        return found
    moved = np.argmax(gains, axis=0)
    for i, group in enumerate(groups):
        if (moved == i).any():
            found[i][-1] = np.where(moved == i, found[i][-1], np.nan)
        else:
            found[i] = group
    return found


# Groupings


def partner(rows: pd.DataFrame, against: str = REFERENCE) -> pd.DataFrame:
    """The records of another method on the same samples, line by line; blank if it has none.

    Args:
        against: the other method's label. A method with a budget is taken at the same budget.

    Returns:
        The columns of `rows`, on its index.
    """
    same = rows.row if against == REFERENCE else rows.label
    others = rows[(rows.status == "ok") & (same == against)]
    keys = SAME if against in WITHOUT_BUDGET else [*SAME, "budget", "budget_by"]
    # Of several rows the one with the fewest parameters of its own.
    others = others.iloc[others.row.map(len).argsort(kind="stable")]
    found = rows[keys].merge(others.drop_duplicates(keys), on=keys, how="left")
    return found.set_axis(rows.index)[rows.columns]


def estimate(
    rows: pd.DataFrame,
    metric: str = "score",
    other: pd.DataFrame | None = None,
    of: Weights = VALUE,
    every: pd.DataFrame | None = None,
    **options: Any,
) -> Estimate:
    """Estimates a metric of one method in one setting, alone or paired with another method.

    Scores are averaged by unit and group, and perplexities are exp of mean losses. Every other
    metric is a plain mean over samples. The interval of a text's score is over its blocks.

    Args:
        metric: a column.
        other: :func:`partner` of these rows, for DIFFERENCE and RATIO.
        every: the frame that they are of: a sample may have any score between those of its setting.
        options: see :func:`interval`.
    """
    sides = [rows] if other is None or of is VALUE else [rows, other]
    values = np.stack([side[metric].astype(float) for side in sides], axis=-1)
    if not scored(metric):
        if of is DIFFERENCE:
            return interval(values[:, 0] - values[:, 1], **options)
        return interval(values, of, **options)
    options["statistic"] = statistic = next(iter(rows.statistic), "mean")
    if every is not None:
        options["span"] = span_of(rows, metric, every)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = INVERSES[statistic](values)
    names = {name: rows[name].to_numpy(object) for name in ("group", "unit")}
    found = interval(values, of, **options, **names)
    known = np.isfinite(values).all(axis=1)
    if metric != "score" or not rows.blocks.map(lambda one: isinstance(one, list))[known].any():
        return found
    texts = zip(*(side.blocks[known] for side in sides), strict=True)
    blocks = [np.stack(text, axis=-1) for text in texts]
    counts = [len(text) for text in blocks]
    names = {name: np.repeat(one[known], counts) for name, one in names.items()}
    drawn = interval(np.concatenate(blocks), of, **options, **names)
    return found._replace(low=drawn.low, high=drawn.high)


def scored(metric: str) -> bool:
    return metric == "score" or metric.startswith("scores.")


def span_of(rows: pd.DataFrame, metric: str, every: pd.DataFrame) -> tuple[float, float] | None:
    """Least and largest score in the settings of some rows; None if it is no mean of scores."""
    if not scored(metric) or next(iter(rows.statistic), "") != "mean":
        return None
    found = every[metric][every.setting.isin(rows.setting)].astype(float)
    return float(found.min()), float(found.max())


def view(
    rows: pd.DataFrame,
    by: Sequence[str],
    metric: str = "score",
    against: str | None = None,
    across: str | None = None,
) -> pd.DataFrame:
    """Groups rows by some columns and estimates a metric of each group.

    Args:
        against: another method's label; adds difference and ratio over the samples that both have,
            except to itself.
        across: `seed` or `process`; estimates the metric for each of these, and gives their mean
            with its interval over them.

    Returns:
        `value`, `low`, `high`, `n`; `difference`, `difference_low`, ..., `ratio`, ...
    """
    ran = rows[rows.status == "ok"]
    others = None if against is None else partner(rows, against)
    kinds = {"": VALUE} if others is None else {"": VALUE, "difference": DIFFERENCE, "ratio": RATIO}
    lines = []
    for names, part in ran.groupby(list(by), sort=False, dropna=False):
        line = dict(zip(by, names, strict=True))
        for kind, of in kinds.items():
            itself = kind and others is not None and others.row[part.index].equals(part.row)
            one = NOTHING if itself else over_parts(part, across, metric, others, of, rows)
            stem = f"{kind}_" if kind else ""
            line |= {kind or "value": one.value}
            line |= {f"{stem}low": one.low, f"{stem}high": one.high, f"{stem}n": one.n}
        lines.append(line)
    return pd.DataFrame(lines).set_index(list(by)) if lines else pd.DataFrame()


def over_parts(
    rows: pd.DataFrame,
    parts: str | None,
    metric: str,
    others: pd.DataFrame | None = None,
    of: Weights = VALUE,
    every: pd.DataFrame | None = None,
) -> Estimate:
    """:func:`estimate`; with `parts` (`seed` or `process`) the mean of one estimate for each."""
    pieces = [rows] if parts is None else [part for _, part in rows.groupby(parts)]
    found = [
        estimate(piece, metric, None if others is None else others.loc[piece.index], of, every)
        for piece in pieces
    ]
    if parts is None:
        return found[0]
    return over(found, of, None if every is None else span_of(rows, metric, every))


def over(
    found: Sequence[Estimate], of: Weights = VALUE, span: tuple[float, float] | None = None
) -> Estimate:
    """The mean of several seeds' or processes' estimates, and its interval over them.

    Args:
        of: what was estimated.
        span: least and largest score. The interval of scores or of their differences stays within
            it; equal ones may become any other.
    """
    values = [one.value for one in found if one.value is not None]
    if span is None or not values or of not in (VALUE, DIFFERENCE):
        return interval(values, guard=True)
    low, high = span if of is VALUE else (span[0] - span[1], span[1] - span[0])
    alike = max(values) - min(values) < 1e-12
    one = interval(values, guard=True, span=(low, high) if alike else None)
    if one.ends is None:
        return one
    return one._replace(low=max(low, one.ends[0]), high=min(high, one.ends[1]))
