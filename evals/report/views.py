"""Tables of a frame of samples: which columns, is views.yaml's.

One function, :func:`make`, makes each of them; what is not a grouping by method is below it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from buzz.errors import ConfigError
from evals.report.methods import called, place
from evals.report.table import NOT_RUN as EMPTY
from evals.report.table import Table
from evals.results.frame import (
    DIFFERENCE,
    MARK,
    NOT_RUN,
    NOTHING,
    RATIO,
    REFERENCE,
    TOLERANCE,
    VALUE,
    Estimate,
    Weights,
    estimate,
    interval,
    over,
    partner,
)
from evals.tasks.base import Task
from evals.tasks.build import build
from evals.tasks.longbench import averages

SPEC = yaml.safe_load(Path(__file__).with_name("views.yaml").read_text(encoding="utf-8"))
DISTURBED = "~"  # behind times of samples during which other processes kept the machine busy
MANY = 6  # rows up to which they are columns of a table of data sets
SHARED = ("model", "seed", "compress")  # what settings of one task may differ in, besides its own
Parts = dict[str, pd.DataFrame]  # a setting's samples by row


# What is of one method: the rows of a frame of one setting and row


def settings(rows: pd.DataFrame, by: str = "setting") -> dict[str, Parts]:
    """Samples by setting (or another column) and row, in the order in which tables show them."""

    def order(part: pd.DataFrame) -> tuple[Any, ...]:
        one = part.iloc[0]
        budget = 0.0 if unknown(one.budget) else float(one.budget)
        return one.task, one.model, str(one.seed), one.setting, budget, place(one.method), one.row

    found: dict[str, Parts] = {}
    for part in sorted((part for _, part in rows.groupby([by, "row"], sort=False)), key=order):
        found.setdefault(part[by].iloc[0], {})[part.row.iloc[0]] = part
    return found


def flat(found: Mapping[str, Parts]) -> list[pd.DataFrame]:
    """The samples of each row of all settings."""
    return [part for parts in found.values() for part in parts.values()]


def across_seeds(rows: pd.DataFrame) -> dict[str, Parts]:
    """As :func:`settings`, those that differ in the seed alone together, where there are some."""
    pools = {}
    for setting, one in rows.drop_duplicates("setting").set_index("setting").iterrows():
        told = {k: v for k, v in _flat(one).items() if k not in ("seed", "model.seed")}
        told |= {name: one[name] for name in ("task", "model", "compress")}
        pools[setting] = json.dumps(told, default=str, sort_keys=True)
    pooled = rows.assign(pool=rows.setting.map(pools)).sort_values("seed", kind="stable")
    pooled = pooled[pooled.groupby(["pool", "row"]).seed.transform("nunique") > 1]
    return settings(pooled, "pool")


def unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def finished(part: pd.DataFrame) -> bool:
    """Whether each of its samples was run."""
    return bool(len(part)) and not (part.status == NOT_RUN).any()


def ran(part: pd.DataFrame) -> pd.DataFrame:
    return part[part.status == "ok"]


def held(part: pd.DataFrame) -> float | None:
    """Entries over the budget, by its measure: 1.0 if it is met exactly."""
    share = part.held.astype(float).mean()
    return None if np.isnan(share) else float(share)


def mark(part: pd.DataFrame) -> str:
    """MARK if more is held than the budget, else nothing."""
    return MARK if (held(part) or 0) > 1 + TOLERANCE else ""


def marked(part: pd.DataFrame) -> str:
    """The row's name with its mark."""
    return f"{part.row.iloc[0]}{mark(part)}"


def budget_text(part: pd.DataFrame) -> str:
    """A budget, its measure if that is the mean, and MARK if more is held.

    A method without a budget has sizes of its own, the full cache has none.
    """
    one = part.iloc[0]
    if unknown(one.budget):
        return "-" if one.method == REFERENCE else "own"
    return f"{one.budget}{' mean' if one.budget_by == 'mean' else ''}{mark(part)}"


def status(part: pd.DataFrame) -> str:
    """complete, or what went wrong, with its reason."""
    if missing := int((part.status == NOT_RUN).sum()):
        return f"unfinished: {len(part) - missing} of {len(part)} samples"
    for name in ("failed", "oom"):
        if (bad := part[part.status == name]).size:
            reason = "out of memory" if unknown(bad.error.iloc[0]) else bad.error.iloc[0]
            return f"{name.upper()} in {len(bad)} of {len(part)} samples: {reason}"
    return "complete"


def count(part: pd.DataFrame) -> str:
    """Samples that ran; those out of memory, with the most bytes asked for; those that failed."""
    of = Counter(part.status)
    if of[NOT_RUN]:
        return f"{len(part) - of[NOT_RUN]} of {len(part)}"
    asked = part.asked_nbytes[part.status == "oom"].max()
    size = f" of {asked / 1e9:.1f} GB" if asked > 0 else ""
    oom = f" (+{of['oom']} oom{size})" if of["oom"] else ""
    return f"{of['ok']}{oom}" + (f" (+{of['failed']} FAILED)" if of["failed"] else "")


def score(
    part: pd.DataFrame,
    rows: pd.DataFrame,
    metric: str = "score",
    other: pd.DataFrame | None = None,
    of: Weights = VALUE,
) -> Estimate:
    """A method's score; where samples never differ they could be as any method's of the setting."""
    if part.empty or part.statistic.iloc[0] != "mean":
        return estimate(part, metric, other, of)
    found = rows[metric][rows.setting == part.setting.iloc[0]].astype(float)
    return estimate(part, metric, other, of, span=(found.min(), found.max()))


def summary(part: pd.DataFrame) -> dict[str, Any]:
    """What one method comes to, for objectives of sweeps and services that take results.

    Returns:
        score with its ends, means of all that was measured, of peaks and of what is allocated the
        most; counts.
    """
    answered, scored = ran(part), estimate(ran(part))
    numbers = answered.select_dtypes("number")
    found = numbers.mean().to_dict() | numbers.filter(regex="peak|allocated").max().to_dict()
    for name in answered.filter(regex=r"^scores\."):
        found[name] = estimate(answered, name).value
    found = {name: float(value) for name, value in found.items() if not unknown(value)}
    found |= {"score": scored.value, "score_low": scored.low, "score_high": scored.high}
    counts = {name: int((part.status == name).sum()) for name in ("oom", "failed", NOT_RUN)}
    return found | {"n": scored.n} | {k.replace(" ", "_"): v for k, v in counts.items()}


def labels(rows: pd.DataFrame) -> dict[str, str]:
    """Settings by name: the task, and what tells it from the other settings of the frame."""
    first, more = rows.drop_duplicates("setting"), differences(rows)
    varied = [name for name in SHARED if first[name].nunique() > 1]
    return {
        one.setting: " ".join(
            [one.task, *(f"{name}={one[name]}" for name in varied), more[one.setting]]
        )
        .replace("model=", "")
        .strip()
        for _, one in first.iterrows()
    }


def differences(rows: pd.DataFrame) -> dict[str, str]:
    """What tells apart settings of one task, model, seed and `compress`; nothing of others.

    Their other settings that differ; the folder's name where none does.
    """
    found: dict[str, str] = {}
    first = rows.drop_duplicates("setting").set_index("setting")
    for _, alike in first.groupby(["task", *SHARED], dropna=False):
        known = {key: _flat(one) for key, one in alike.iterrows()}
        names = dict.fromkeys(name for one in known.values() for name in one)
        differ = [n for n in names if len({str(one.get(n)) for one in known.values()}) > 1]
        texts = {k: " ".join(f"{n}={one.get(n)}" for n in differ) for k, one in known.items()}
        count = Counter(texts.values())
        copies = {key for key, text in texts.items() if len(alike) > 1 and count[text] > 1}
        found |= texts | {key: str(key) for key in copies}
    return found


def _flat(setting: pd.Series) -> dict[str, Any]:
    """The settings of its task, and of its model as `model.NAME`."""
    task, model = (
        one if isinstance(one, dict) else {}
        for one in (setting.task_settings, setting.model_settings)
    )
    return task | {f"model.{name}": value for name, value in model.items() if name != "name"}


# A table of methods


def make(view: str, rows: pd.DataFrame, metrics: Iterable[str] = (), **told: str) -> Table:
    """The table of views.yaml that has this name, of all methods of a frame.

    Args:
        metrics: of tasks, shown behind the score.
        told: title, note and name, where they are not the view's.
    """
    spec = SPEC["views"][view]
    across, by = spec.get("across"), spec.get("by")
    columns: dict[str, Any] = {}
    for column, how in spec["columns"].items():
        columns[column] = how
        if column == "score":
            columns |= {one: {"metric": f"scores.{one}", "interval": True} for one in metrics}
    others = {c["against"]: partner(rows, c["against"]) for c in columns.values() if "against" in c}
    named, more, pieces = labels(rows), differences(rows), []
    for setting, parts in (across_seeds(rows) if across else settings(rows)).items():
        for whole in parts.values():
            section = f"{named.get(setting, '')}  {whole.headline.iloc[0]}".strip()
            tokens = whole.prompt_tokens
            tokens = tokens if by == "prompt_tokens" else length_bin(tokens)
            bins = whole.groupby(tokens) if by and finished(whole) else [(None, whole)]
            pieces += [(section, length, whole, part) for length, part in bins]
    lines: list[dict[str, Any]] = []
    marks: dict[str, list[str]] = {column: [] for column in columns}
    for _, length, whole, part in pieces:
        answered, cells = ran(part) if finished(whole) else part.iloc[:0], {}
        for column, how in columns.items():
            found, disturbed = _column(how, answered, others, rows, across)
            cells |= _written(column, found, how)
            marks[column].append(DISTURBED if disturbed else "")
        line = head(whole, part, more) | ({by: length} if by else {}) | cells
        if "score" not in columns:
            del line["metric"]
        if across:
            line["seed"] = ", ".join(map(str, sorted(whole.seed.unique())))
        if spec.get("terminal"):
            line = {"n": count(whole), "row": marked(whole)} | line
        elif not by and not across:
            line["status"] = status(whole)
        lines.append(line)
    sections, shown = [section for section, *_ in pieces], [part for *_, part in pieces]
    note = f"{told.get('note', '')} {spec.get('note', '')}".strip()
    title = told.get("title", spec.get("title", view))
    heads = ["task", "model", "method"]
    narrow = spec.get("narrow", ())
    return table(told.get("name", view), title, lines, heads, note, shown, marks, sections, narrow)


def table(
    name: str,
    title: str,
    lines: Sequence[Mapping[str, Any]],
    heads: Sequence[str],
    note: str = "",
    parts: Iterable[pd.DataFrame] = (),
    *more: Any,
) -> Table:
    """Of lines by column, or of `heads` alone; the note says which `parts` hold too much."""
    frame = pd.DataFrame(lines, columns=None if lines else heads, dtype=object)
    return Table(name, title, frame, f"{note} {over_note(parts)}".strip(), *more)


def length_bin(tokens: pd.Series) -> pd.Series:
    """The power of two nearest to a prompt's length."""
    return (2 ** np.round(np.log2(tokens.astype(float).clip(lower=1)))).fillna(0).astype(int)


def head(whole: pd.DataFrame, part: pd.DataFrame, more: Mapping[str, str]) -> dict[str, Any]:
    """What a line is of; `more`: :func:`differences`."""
    one = whole.iloc[0]
    return {
        "task": one.task,
        "model": one.model,
        "seed": one.seed,
        "setting": more[one.setting],
        "method": one.label if not unknown(one.label) else one.row,
        "parameters": one.row.partition(",")[2],
        "compress": "" if one.compress == "prompt" or unknown(one.compress) else one.compress,
        "budget": budget_text(part if len(part) else whole),
        "metric": one.headline,
    }


def _column(
    how: Mapping[str, Any],
    part: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    rows: pd.DataFrame,
    across: str | None,
) -> tuple[list[Estimate], bool]:
    """A column's numbers for some samples, and whether they are times that others disturbed."""
    other = others[how["against"]].loc[part.index] if "against" in how else None
    disturbed = False
    if how.get("timed"):
        part = part[part.timed]
        if other is not None:
            other = other.loc[part.index]
            beside = other.timed.eq(True) & (other.machine == part.machine)
            part, other = part[beside], other[beside]
        sides = [part] if other is None else [part, other]
        loaded = any(side.loaded.eq(True).any() for side in sides)
        disturbed = loaded and how.get("stat") != "count"
    told = (how.get(key) for key in ("metric", "stat", "as"))
    told = [one if isinstance(one, list) else [one] for one in told]
    pieces = [part] if across is None else [one for _, one in part.groupby(across)]
    found = []
    for i in range(max(map(len, told))):  # what is told once is so of all
        metric, stat, kind = (one[min(i, len(one) - 1)] for one in told)
        cells = [
            _cell(metric, stat, kind, one, None if other is None else other.loc[one.index], rows)
            for one in pieces
            if metric in part and len(part)
        ]
        found.append(NOTHING if not cells else over(cells) if across else cells[0])
    return found, disturbed


def _cell(
    metric: str,
    stat: str | None,
    kind: str | None,
    part: pd.DataFrame,
    other: pd.DataFrame | None,
    rows: pd.DataFrame,
) -> Estimate:
    scored = metric == "score" or metric.startswith("scores.")
    if other is None:
        n = int(part[metric].notna().sum())
        if stat == "count":  # of what nobody measured the column is empty
            return NOTHING._replace(value=n or None, n=n)
        if stat in ("max", "median"):
            value = float(part[metric].astype(float).agg(stat)) if n else None
            return NOTHING._replace(value=value, n=n)
        return score(part, rows, metric) if scored else estimate(part, metric)
    if part.row.eq(REFERENCE).all():
        return NOTHING  # the full cache beside itself
    if kind in ("agreement", "prefix"):
        pairs = zip(part[metric], other[metric], strict=True)
        return interval([_alike(kind, own, full) for own, full in pairs])
    if kind in ("difference", "ratio"):
        of = DIFFERENCE if kind == "difference" else RATIO
        return score(part, rows, metric, other, of) if scored else estimate(part, metric, other, of)
    gains = part[metric].astype(float) - other[metric].astype(float)
    if kind in ("wins", "losses") and not part.higher_is_better.iloc[0]:
        gains = -gains
    n = int(gains.notna().sum())
    if kind == "count" or not n:
        return NOTHING._replace(value=n or None, n=n)
    counted = {"wins": gains > 0, "ties": gains == 0, "losses": gains < 0, "nearer": gains < 0}
    number = int(counted[str(kind)].sum())
    return NOTHING._replace(value=number / n if kind == "nearer" else number, n=n)


def _alike(kind: str, own: Any, full: Any) -> float:
    """The share of positions with the same token; or of the full answer before the first other."""
    if not (isinstance(own, list) and isinstance(full, list) and own and full):
        return np.nan
    same = [a == b for a, b in zip(own, full, strict=False)]
    if kind == "agreement":
        return sum(same) / max(len(own), len(full))
    return sum(takewhile(bool, same)) / len(full)


def _written(column: str, cells: Sequence[Estimate], how: Mapping[str, Any]) -> dict[str, Any]:
    """The column's cell, and those of its interval."""
    scale = how.get("scale", 1)
    values = [
        [None if value is None else value * scale if scale != 1 else value for value in cell[:3]]
        for cell in cells
    ]
    if form := how.get("form"):
        texts = ["-" if value is None else format(value, form) for value, _, _ in values]
        return {column: "-" if set(texts) == {"-"} else "/".join(texts)}
    ((value, low, high),) = values
    ends = {f"{column} low": low, f"{column} high": high} if how.get("interval") else {}
    return {column: value} | ends


def over_note(parts: Iterable[pd.DataFrame]) -> str:
    """What MARK means, and by how much each method that has it is over; nothing if none has."""
    over: dict[str, list[float]] = {}
    for part in parts:
        if len(part) and mark(part):
            name = f"{called(part.iloc[0].label)} @{budget_text(part)}"
            over.setdefault(name, []).append(held(part) or 0)
    if not over:
        return ""
    found = [
        f"{name} {' to '.join(dict.fromkeys(f'{end:.2f}x' for end in (min(of), max(of))))}"
        for name, of in over.items()
    ]
    return (
        f"{MARK} holds over {TOLERANCE:.0%} more than its budget, over what was decoded:"
        f" {', '.join(found)}."
    )


# Other tables


def sections(rows: pd.DataFrame) -> Iterator[Table]:
    """Scores by the kinds of tasks of views.yaml."""
    named = {task for one in SPEC["sections"].values() for task in one.get("tasks", ())}
    for name, one in SPEC["sections"].items():
        tasks = one.get("tasks")
        own = rows[rows.task.isin(tasks) if tasks else ~rows.task.isin(named)]
        told = {"name": name, "title": one["title"], "note": one.get("note", "")}
        if one.get("data_sets"):
            yield data_sets(own, **told)
        else:
            metrics = [m for m in one.get("metrics", ()) if f"scores.{m}" in own]
            yield make("scores", own, metrics, **told)


def data_sets(rows: pd.DataFrame, name: str, title: str, note: str) -> Table:
    """Data sets, the benchmark's averages, lengths, memory in rows; of many methods, in columns."""
    columns: dict[str, dict[str, Any]] = {}
    named, several, full = labels(rows), rows.setting.nunique() > 1, partner(rows)
    chosen = [part for part in flat(settings(rows)) if finished(part)]
    for part in chosen:
        answered = ran(part)
        means = {
            str(group): estimate(own).value for group, own in answered.groupby("group", sort=False)
        }
        known = {group: value for group, value in means.items() if value is not None}
        for kinds, found in averages(known).items() if means else ():
            means |= {f"{kinds}: {one}": value for one, value in found.items()}
        tokens, ratio = _lengths(answered, full)
        means |= {"answers: tokens": tokens, "answers: tokens / full": ratio}
        means["memory: KV MB"] = answered.kv_nbytes_mean.mean() / 1e6
        means["memory: KV allocated MB"] = answered.allocated_nbytes.max() / 1e6
        means["memory: held / budget"] = held(part)
        columns[marked(part) + (f" {named[part.setting.iloc[0]]}" if several else "")] = means
    names = dict.fromkeys(name for one in columns.values() for name in one)
    names = sorted(names, key=lambda name: ":" in name)  # averages and memory below the data sets
    lines: list[dict[str, Any]] = [
        {"run": of} | {n: one.get(n, EMPTY) for n in names} for of, one in columns.items()
    ]
    if len(columns) <= MANY:
        lines = [
            {"data set": n} | {of: one.get(n, EMPTY) for of, one in columns.items()} for n in names
        ]
    return table(name, title, lines, ["data set"], note, chosen)


def _lengths(part: pd.DataFrame, full: pd.DataFrame) -> list[float | None]:
    """How long answers are: in tokens, and over the full cache's to the same prompts."""
    others = {REFERENCE: full}
    hows = [SPEC["shared"][name] for name in ("answer", "answer_ratio")]
    return [_column(how, part, others, part, None)[0][0].value for how in hows]


def breakdowns(rows: pd.DataFrame) -> Iterator[Table]:
    """Scores by the samples' groups, and by what else their task breaks them down."""
    named = labels(rows)
    for setting, parts in settings(rows).items():
        found: dict[str, dict[str, dict[str, float]]] = {}
        for part in parts.values():
            for title, means in _broken_down(ran(part)).items():
                found.setdefault(title, {})[marked(part)] = means
        for title, columns in found.items():
            names = dict.fromkeys(name for means in columns.values() for name in means)
            lines = [{title: row} | {n: of.get(n) for n in names} for row, of in columns.items()]
            turned = [{title: n} | {row: of.get(n) for row, of in columns.items()} for n in names]
            wide = sum(len(n) + 2 for n in names) > sum(len(row) + 2 for row in columns)
            frame = pd.DataFrame(turned if wide else lines)
            yield Table(f"by_{title}_{setting}", f"{named[setting]} by {title}", frame)


def _broken_down(part: pd.DataFrame) -> dict[str, dict[str, float]]:
    if part.empty:
        return {}
    by_group = part[part.group != ""].groupby("group", sort=False)
    means = {str(name): estimate(own).value for name, own in by_group}
    found: dict[str, dict[str, Any]] = {part.grouped_by.iloc[0]: means}
    told = part.task_settings.iloc[0]
    if isinstance(told, dict):
        records: Any = [
            {k: v for k, v in line.items() if not unknown(v)} for line in part.to_dict("records")
        ]
        try:
            found |= build("task", told, Task).breakdown(records)
        except (ConfigError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            found["breakdown"] = {f"cannot be made: {error}": np.nan}
    return {title: rows for title, rows in found.items() if rows}


def families(rows: pd.DataFrame, parameter: str) -> list[dict[Any, pd.DataFrame]]:
    """Rows of one method, setting and budget that differ in one parameter alone, by its value.

    Sizes that a budget chose are no settings, whatever the configuration says.
    """
    found: dict[str, dict[Any, pd.DataFrame]] = {}
    for part in flat(settings(rows)):
        one, fixed = part.iloc[0], set(part.fixed.iloc[0])
        known = parameters_of(one)
        chosen = not unknown(one.budget) and parameter in {"window", "threshold"} - fixed
        if parameter in known and finished(part) and not chosen:
            told = [known | {parameter: None}, sorted(fixed - {parameter})]
            same = str([one.setting, one.method, one.budget, one.budget_by, *told])
            found.setdefault(same, {}).setdefault(known[parameter], part)

    def order(value: Any) -> tuple[bool, bool, Any]:
        return value is not None, isinstance(value, str), value

    several = [one for one in found.values() if len(one) > 1]
    return [{value: one[value] for value in sorted(one, key=order)} for one in several]


def parameters_of(one: pd.Series) -> dict[str, Any]:
    """A method's parameters and the cache's, as configured."""
    told = [known for known in (one.parameters, one.cache) if isinstance(known, dict)]
    return {key: value for known in told for key, value in sorted(known.items())}


PARAMETERS: tuple[str, ...] = ("history", "compact", "stride", "window", "sink", "threshold")
PARAMETERS += ("positions", "logn_base", "logn_clamp", "granularity", "page_score", "heads")


def ablations(rows: pd.DataFrame) -> Table:
    """Every parameter that was varied alone."""
    lines, parts, full, more = [], [], partner(rows), differences(rows)
    for parameter in PARAMETERS:
        for family in families(rows, parameter):
            for value, part in family.items():
                found, (tokens, ratio) = score(ran(part), rows), _lengths(ran(part), full)
                parts.append(part)
                lines.append(
                    {"parameter": parameter, "value": str(value), **head(part, part, more)}
                    | {"score": found.value, "score low": found.low, "score high": found.high}
                    | {"answer tokens": tokens, "answer / full": ratio}
                    | {"KV MB": ran(part).kv_nbytes_mean.mean() / 1e6, "held / budget": held(part)}
                    | {"n": found.n}
                )
    note = (
        "Groups of rows that differ in nothing else. Without a budget, other sizes also hold other"
        " memory: read KV MB beside the score."
    )
    heads = ["parameter", "value"]
    return table("ablations", "One parameter at a time", lines, heads, note, parts)


def overview(rows: pd.DataFrame) -> Table:
    """Every row, unfinished and failed ones too."""
    more = differences(rows)
    lines = [
        head(part, part, more)
        | {"n": len(ran(part)), "status": status(part), "machine": _listed(part.machine)}
        | {"revision": _listed(part.git_revision.dropna().astype(str).str[:12])}
        | {"folder": part.setting.iloc[0]}
        for part in flat(settings(rows))
    ]
    return table("runs", "Runs", lines, ["task", "method"], "", flat(settings(rows)))


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, values.dropna().unique()))


def notes(rows: pd.DataFrame) -> list[str]:
    """What a reader should know before comparing the rows."""
    found, named = [], labels(rows)
    for setting, parts in settings(rows).items():
        task = named[setting]
        for name, of in CONDITIONS.items():
            values = {row: of(ran(part)) for row, part in parts.items() if finished(part)}
            if len(set(values.values())) > 1:
                told = "; ".join(f"{row} {value}" for row, value in values.items())
                found.append(f"{task}: rows differ in {name}: {told}")
        budgets: dict[str, list[float]] = {}
        for row, part in parts.items():
            one, share = part.iloc[0], held(part)
            if mark(part):
                by = f"({one.budget_by}): not at equal memory"
                found.append(f"{MARK} {task}: {row} holds {share:.2f}x its budget {by}")
            if share:
                budgets.setdefault(f"{one.budget} ({one.budget_by})", []).append(share)
            if not finished(part):
                found.append(f"{task}, {row}: {status(part)}; without a score until it is finished")
            if (count := part.environment.nunique()) > 1:
                kinds = _listed(part.machine)
                found.append(f"{task}, {row}: samples ran in {count} environments, on {kinds}")
        timed = pd.concat([part[(part.status == "ok") & part.timed] for part in parts.values()])
        if timed.loaded.any():
            found.append(
                f"{task}: other processes disturbed {timed.loaded.sum()} of {len(timed)} timed"
                f" answers: timings marked {DISTURBED} are not to be relied on"
            )
        for budget, shares in budgets.items():
            if (ratio := max(shares) / min(shares)) > 1 + TOLERANCE:
                found.append(
                    f"{task}: rows of budget={budget} hold up to {ratio:.2f}x as much as others"
                )
        if REFERENCE not in parts:
            found.append(f"{task}: the full cache was not run; nothing is compared with it")
    return found


def _reasons(part: pd.DataFrame) -> str:
    counts = Counter(str(one) for one in part.stop_reason.dropna())
    return " ".join(f"{reason} {counts[reason]}" for reason in sorted(counts))


CONDITIONS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "samples": len,
    "truncated prompts": lambda part: int((part.truncated_tokens.fillna(0) > 0).sum()),
    "chat templates": lambda part: int(part.chat_template.eq(True).sum()),
    "stop reasons": _reasons,
}
