"""Tables of a frame of samples. views.yaml lists their columns.

:func:`make` makes the tables with a line per method. Other tables are below it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from buzz.errors import ConfigError
from evals.report.methods import called, place
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
    span_of,
)
from evals.tasks.base import Task
from evals.tasks.build import build
from evals.tasks.longbench import averages

SPEC = yaml.safe_load(Path(__file__).with_name("views.yaml").read_text(encoding="utf-8"))
DISTURBED = "~"  # behind times that other processes disturbed
MANY = 6  # up to so many rows are the columns of a table of data sets
SHARED = ("model", "seed", "compress")  # settings of every task
Parts = dict[str, pd.DataFrame]  # a setting's samples by row


# A part is the samples of one row: one setting and method.


def settings(rows: pd.DataFrame, by: str = "setting") -> dict[str, Parts]:
    """Samples by setting (or another column) and row, in the order of tables."""

    def order(part: pd.DataFrame) -> tuple[Any, ...]:
        one = part.iloc[0]
        budget = 0.0 if unknown(one.budget) else float(one.budget)
        setting = one.task, one.model, str(one.seed), str(one.task_settings), one.setting
        return *setting, budget, place(one.method), one.row

    found: dict[str, Parts] = {}
    for part in sorted((part for _, part in rows.groupby([by, "row"], sort=False)), key=order):
        found.setdefault(part[by].iloc[0], {})[part.row.iloc[0]] = part
    return found


def flat(found: Mapping[str, Parts]) -> list[pd.DataFrame]:
    """The parts of all settings."""
    return [part for parts in found.values() for part in parts.values()]


def across_seeds(rows: pd.DataFrame) -> dict[str, Parts]:
    """As :func:`settings`, with settings pooled that differ only in the seed; without others."""
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
    """Whether every sample of a part was run."""
    return bool(len(part)) and not (part.status == NOT_RUN).any()


def ran(part: pd.DataFrame) -> pd.DataFrame:
    """The samples that were answered."""
    return part[part.status == "ok"]


def held(part: pd.DataFrame) -> float | None:
    """Entries held over the budget, peak or mean as the budget says; 1.0: it is met exactly."""
    share = part.held.astype(float).mean()
    return None if np.isnan(share) else float(share)


def mark(part: pd.DataFrame) -> str:
    """MARK if the part holds more than its budget, else nothing."""
    return MARK if (held(part) or 0) > 1 + TOLERANCE else ""


def marked(part: pd.DataFrame) -> str:
    """The row's name with its mark."""
    return f"{part.row.iloc[0]}{mark(part)}"


def budget_text(part: pd.DataFrame) -> str:
    """A budget, with `mean` if it is one of the mean length, and MARK if the part holds more.

    Without a budget a method has its own sizes ("own"); the full cache has none ("-").
    """
    one = part.iloc[0]
    if unknown(one.budget):
        return "-" if one.method == REFERENCE else "own"
    return f"{one.budget}{' mean' if one.budget_by == 'mean' else ''}{mark(part)}"


def status(part: pd.DataFrame) -> str:
    """complete, or what went wrong and why."""
    if missing := int((part.status == NOT_RUN).sum()):
        return f"unfinished: {len(part) - missing} of {len(part)} samples"
    for name in ("failed", "oom"):
        if (bad := part[part.status == name]).size:
            reason = "out of memory" if unknown(bad.error.iloc[0]) else bad.error.iloc[0]
            return f"{name.upper()} in {len(bad)} of {len(part)} samples: {reason}"
    return "complete"


def count(part: pd.DataFrame) -> str:
    """How many samples were answered, were out of memory (and of what size), and failed."""
    of = Counter(part.status)
    if of[NOT_RUN]:
        return f"{len(part) - of[NOT_RUN]} of {len(part)}"
    asked = part.asked_nbytes[part.status == "oom"].max()
    size = f" of {asked / 1e9:.1f} GB" if asked > 0 else ""
    oom = f" (+{of['oom']} oom{size})" if of["oom"] else ""
    return f"{of['ok']}{oom}" + (f" (+{of['failed']} FAILED)" if of["failed"] else "")


def summary(part: pd.DataFrame) -> dict[str, Any]:
    """One part in numbers, for objectives of sweeps and for services that take results.

    Returns:
        The score with the ends of its interval; means of everything measured, but maxima of peaks
        and allocations; numbers of samples.
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
    found = {}
    for _, one in first.iterrows():
        told = [one.task, *(f"{name}={one[name]}" for name in varied), more[one.setting]]
        found[one.setting] = " ".join(filter(None, told)).replace("model=", "")
    return found


def differences(rows: pd.DataFrame) -> dict[str, str]:
    """By setting, what tells it from others of its task, model, seed and `compress`.

    That is the task's and the model's other settings, or the folder's name if they are equal. It
    is empty for the only setting of its kind.
    """
    found: dict[str, str] = {}
    first = rows.drop_duplicates("setting").set_index("setting")
    for _, alike in first.groupby(["task", *SHARED], dropna=False):
        known = {key: _flat(one) for key, one in alike.iterrows()}
        names = dict.fromkeys(name for one in known.values() for name in one)
        differ = [n for n in names if len({str(one.get(n)) for one in known.values()}) > 1]
        texts = {k: " ".join(f"{n}={one.get(n)}" for n in differ) for k, one in known.items()}
        count = Counter(texts.values())
        copies = {key for key, text in texts.items() if count[text] > 1}
        found |= texts | {key: str(key) for key in copies}
    return found


def _flat(setting: pd.Series) -> dict[str, Any]:
    """The task's settings, and the model's as `model.NAME`."""
    task, model = (
        one if isinstance(one, dict) else {}
        for one in (setting.task_settings, setting.model_settings)
    )
    return task | {f"model.{name}": value for name, value in model.items() if name != "name"}


# Tables with a line per method


def make(view: str, rows: pd.DataFrame, metrics: Iterable[str] = (), **told: str) -> Table:
    """Makes a table of views.yaml of all rows of a frame.

    Args:
        metrics: further metrics of the task, shown behind the score.
        told: title and name in place of the view's; a note before it.
    """
    spec = SPEC["views"][view]
    parts = []
    for own in (across_seeds(rows) if "across" in spec else settings(rows)).values():
        chosen = [part for row, part in own.items() if row != spec.get("without")]
        pieces = [one for part in chosen for one in split(part, spec.get("by"))]
        parts += [({}, piece) for _, piece in sorted(pieces, key=lambda one: one[0])]
    return filled(view, rows, parts, metrics, **told)


def split(part: pd.DataFrame, by: str | None) -> list[tuple[int, pd.DataFrame]]:
    """A part by the lengths of its prompts, if the view says so and the part is finished."""
    whole = by is None or not finished(part)
    return [(0, part)] if whole else list(part.groupby(lengths(part, by)))


def lengths(part: pd.DataFrame, by: str = "prompt tokens") -> pd.Series:
    """Lengths of prompts: exact by `prompt_tokens`, else to the nearest power of two."""
    tokens = part.prompt_tokens
    if by == "prompt_tokens":
        return tokens
    return (2 ** np.round(np.log2(tokens.astype(float).clip(lower=1)))).fillna(0).astype(int)


def filled(
    view: str,
    rows: pd.DataFrame,
    parts: Sequence[tuple[dict[str, Any], pd.DataFrame]],
    metrics: Iterable[str] = (),
    **told: str,
) -> Table:
    """As :func:`make`, of some parts, each with the first cells of its line."""
    spec, named, apart = SPEC["views"][view], labels(rows), differences(rows)
    across, by = spec.get("across"), spec.get("by")
    columns: dict[str, Any] = {}
    for column, how in spec["columns"].items():
        columns[column] = how
        if column == "score":
            columns |= {one: {"metric": f"scores.{one}", "interval": True} for one in metrics}
    others = cache(partial(partner, rows))
    lines, sections = [], []
    marks: dict[str, list[str]] = {column: [] for column in columns}
    for first, part in parts:
        line, done = first | head(part, apart), finished(part)
        if "score" not in columns:
            del line["metric"]
        if across:
            line["seed"] = ", ".join(map(str, sorted(part.seed.unique())))
        name, seed = named[part.setting.iloc[0]], f" seed={part.seed.iloc[0]}"
        name = name.replace(seed, f" seeds={line['seed']}") if across else name
        section = f"{name}  {part.headline.iloc[0]}"
        if by:
            line[by] = lengths(part, by).iloc[0] if done else None
            section += f", {line[by]:,.0f} tokens" if done else ""
        answered = ran(part) if done else part.iloc[:0]
        for column, how in columns.items():
            found, disturbed = _column(how, answered, others, rows, across)
            line |= _written(column, found, how)
            marks[column].append(DISTURBED if disturbed else "")
        if spec.get("terminal"):
            line = {"n": count(part), "row": marked(part)} | line
        elif not by and not across:
            line["status"] = status(part)
        lines.append(line)
        sections.append(section.strip())
    note = f"{told.get('note', '')} {spec.get('note', '')}".strip()
    name, title = told.get("name", view), told.get("title", spec.get("title", view))
    more = {"marks": marks, "sections": sections, "narrow": spec.get("narrow", ())}
    return table(name, title, lines, [part for _, part in parts], note, **more)


def table(
    name: str,
    title: str,
    lines: Sequence[Mapping[str, Any]],
    parts: Iterable[pd.DataFrame],
    note: str = "",
    **more: Any,
) -> Table:
    """A table of lines, with some headings if there are none. The note names parts with MARK."""
    heads = None if lines else ["task", "model", "method"]
    frame = pd.DataFrame(lines, columns=heads, dtype=object)
    return Table(name, title, frame, f"{note} {over_note(parts)}".strip(), **more)


def head(part: pd.DataFrame, apart: Mapping[str, str]) -> dict[str, Any]:
    """The cells that say what a line is of; `apart` comes from :func:`differences`."""
    one = part.iloc[0]
    return {
        "task": one.task,
        "model": one.model,
        "seed": one.seed,
        "setting": apart[one.setting],
        "method": one.label if not unknown(one.label) else one.row,
        "parameters": one.row.partition(",")[2],
        "compress": "" if one.compress == "prompt" or unknown(one.compress) else one.compress,
        "budget": budget_text(part),
        "metric": one.headline,
    }


def _column(
    how: Mapping[str, Any],
    part: pd.DataFrame,
    others: Callable[[str], pd.DataFrame],
    rows: pd.DataFrame,
    across: str | None = None,
) -> tuple[list[Estimate], bool]:
    """A column's numbers for some samples, and whether other processes disturbed their times.

    Args:
        how: the column as in views.yaml.
        others: :func:`partner` of `rows` for a method.
        across: see :func:`view`.
    """
    other = others(how["against"]).loc[part.index] if "against" in how else None
    disturbed = False
    if how.get("timed"):
        both = part.timed
        if other is not None:
            both = both & other.timed.eq(True) & (other.machine == part.machine)
            other = other[both]
        part = part[both]
        loaded = part.loaded.any() or (other is not None and other.loaded.eq(True).any())
        disturbed = loaded and how.get("stat") != "count"
    told = (how.get(key) for key in ("metric", "stat", "as"))
    told = [one if isinstance(one, list) else [one] for one in told]
    pieces = [part] if across is None else [one for _, one in part.groupby(across)]
    found = []
    for i in range(max(map(len, told))):  # one value stands for all
        metric, stat, kind = (one[min(i, len(one) - 1)] for one in told)
        cells = [
            _cell(metric, stat, kind, one, None if other is None else other.loc[one.index], rows)
            for one in pieces
            if metric in part and len(part)
        ]
        within = span_of(part, metric, rows) if across and metric in part else None
        of = KINDS.get(kind, RATIO)
        found.append(NOTHING if not cells else over(cells, of, within) if across else cells[0])
    return found, disturbed


KINDS: dict[str | None, Weights] = {None: VALUE, "difference": DIFFERENCE, "ratio": RATIO}


def _cell(
    metric: str,
    stat: str | None,
    kind: str | None,
    part: pd.DataFrame,
    other: pd.DataFrame | None,
    rows: pd.DataFrame,
) -> Estimate:
    if other is None:
        n = int(part[metric].notna().sum())
        if stat == "count":  # of what nobody measured the column is empty
            return NOTHING._replace(value=n or None, n=n)
        if stat in ("max", "median"):
            value = float(part[metric].astype(float).agg(stat)) if n else None
            return NOTHING._replace(value=value, n=n)
        return estimate(part, metric, every=rows)
    if part.row.eq(REFERENCE).all():
        return NOTHING  # the full cache compared with itself
    if kind in ("agreement", "prefix"):
        pairs = zip(part[metric], other[metric], strict=True)
        return interval([_alike(kind, own, full) for own, full in pairs])
    if kind in KINDS:
        return estimate(part, metric, other, KINDS[kind], rows)
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
    """The share of positions with equal tokens (agreement), or of the full cache's answer up to
    the first other token (prefix).
    """
    if not (isinstance(own, list) and isinstance(full, list) and own and full):
        return np.nan
    same = [a == b for a, b in zip(own, full, strict=False)]
    if kind == "agreement":
        return sum(same) / max(len(own), len(full))
    return sum(takewhile(bool, same)) / len(full)


def _written(column: str, cells: Sequence[Estimate], how: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a column and its interval."""
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
    """What MARK means, and by how much each part with it is over; nothing if no part has it."""
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
        f"{MARK} holds over {TOLERANCE:.0%} more than its budget while decoding:"
        f" {', '.join(found)}."
    )


# Other tables


def sections(rows: pd.DataFrame) -> Iterator[Table]:
    """A table of scores for each section of views.yaml."""
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
    """Scores by data set, averages, lengths and memory; MANY methods are lines, fewer columns."""
    columns: dict[str, dict[str, Any]] = {}
    named, several = labels(rows), rows.setting.nunique() > 1
    more = SPEC["views"]["data_sets"]["columns"]
    others = cache(partial(partner, rows))
    chosen = [part for part in flat(settings(rows)) if finished(part)]
    for part in chosen:
        answered = ran(part)
        means = {
            str(group): estimate(own).value for group, own in answered.groupby("group", sort=False)
        }
        known = {group: value for group, value in means.items() if value is not None}
        for kinds, found in averages(known).items() if means else ():
            means |= {f"{kinds}: {one}": value for one, value in found.items()}
        for column, how in more.items():
            means |= _written(column, _column(how, answered, others, rows)[0], how)
        columns[marked(part) + (f" {named[part.setting.iloc[0]]}" if several else "")] = means
    names = dict.fromkeys(name for one in columns.values() for name in one)
    names = sorted(names, key=lambda name: ":" in name)  # averages and memory below the data sets
    every = {of: dict.fromkeys(names, NOT_RUN) | one for of, one in columns.items()}
    many = len(columns) > MANY
    frame = crossed(every, "run" if many else "data set", turned=many)
    return Table(name, title, frame, f"{note} {over_note(chosen)}".strip())


def breakdowns(rows: pd.DataFrame) -> Iterator[Table]:
    """Scores by the samples' groups, and the task's own breakdowns."""
    named = labels(rows)
    for setting, parts in settings(rows).items():
        found: dict[str, dict[str, dict[str, float]]] = {}
        for part in filter(finished, parts.values()):
            for title, means in _broken_down(ran(part)).items():
                found.setdefault(title, {})[marked(part)] = means
        for title, columns in found.items():
            names = dict.fromkeys(name for means in columns.values() for name in means)
            wide = sum(len(n) + 2 for n in names) > sum(len(row) + 2 for row in columns)
            frame = crossed(columns, title, turned=not wide)
            yield Table(f"by_{title}_{setting}", f"{named[setting]} by {title}", frame)


def crossed(columns: Mapping[str, Mapping[str, Any]], head: str, turned: bool) -> pd.DataFrame:
    """A frame of cells by column and line; `head` is the heading of the lines' names.

    Args:
        turned: whether columns are lines instead.
    """
    frame = pd.DataFrame(columns, dtype=object)
    return (frame.T if turned else frame).rename_axis(head).reset_index()


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
    """Families of parts that differ only in one parameter, each by that parameter's value.

    A size that the budget chose is no value of a parameter, whatever the configuration says.
    """
    found: dict[str, dict[Any, pd.DataFrame]] = {}
    for part in flat(settings(rows)):
        one, fixed = part.iloc[0], set(part.fixed.iloc[0])
        known = parameters_of(one)
        if parameter in known and finished(part) and parameter not in of_budget(one):
            told = [known | {parameter: None}, sorted(fixed - {parameter})]
            same = str([one.setting, one.method, one.budget, one.budget_by, *told])
            found.setdefault(same, {}).setdefault(known[parameter], part)

    def order(value: Any) -> tuple[bool, bool, Any]:
        return value is not None, isinstance(value, str), value

    several = [one for one in found.values() if len(one) > 1]
    return [{value: one[value] for value in sorted(one, key=order)} for one in several]


def of_budget(one: pd.Series) -> set[str]:
    """Parameters that a row's budget sets, whatever was configured."""
    return set() if unknown(one.budget) else {"window", "threshold"}.difference(one.fixed)


def parameters_of(one: pd.Series) -> dict[str, Any]:
    """The configured parameters of a row's method and cache."""
    told = [known for known in (one.parameters, one.cache) if isinstance(known, dict)]
    return {key: value for known in told for key, value in sorted(known.items())}


SEVERAL = 6  # rows that a note lists one by one
PARAMETERS: tuple[str, ...] = ("history", "compact", "stride", "window", "sink", "threshold")
PARAMETERS += ("positions", "logn_base", "logn_clamp", "dtype")
PARAMETERS += ("granularity", "page_score", "heads")


def ablations(rows: pd.DataFrame) -> Table:
    """A line for each value of every parameter that was varied alone."""
    parts = [
        ({"parameter": name, "value": str(value)}, part)
        for name in PARAMETERS
        for family in families(rows, name)
        for value, part in family.items()
    ]
    return filled("ablations", rows, parts)


def overview(rows: pd.DataFrame) -> Table:
    """A line for every row, also for unfinished and failed ones."""
    apart = differences(rows)
    lines = [
        head(part, apart)
        | {"n": len(ran(part)), "status": status(part), "machine": _listed(part.machine)}
        | {"revision": _listed(part.git_revision.dropna().astype(str).str[:12])}
        | {"folder": part.setting.iloc[0]}
        for part in flat(settings(rows))
    ]
    return table("runs", "Runs", lines, flat(settings(rows)))


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, values.dropna().unique()))


def notes(rows: pd.DataFrame) -> list[str]:
    """Differences and faults of which a reader must know before comparing rows."""
    found, named = [], labels(rows)
    for setting, parts in settings(rows).items():
        task = named[setting]
        for name, of in CONDITIONS.items():
            values = {row: of(ran(part)) for row, part in parts.items() if finished(part)}
            if len({str(value) for value in values.values()}) > 1:
                found.append(f"{task}: rows differ in {name}: {_told(values)}")
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


def _told(values: Mapping[str, Any]) -> str:
    """Each row's value; of many rows the full cache's and the range of the others'."""
    if len(values) <= SEVERAL:
        return "; ".join(f"{row} {value}" for row, value in values.items())
    counts = {
        row: value if isinstance(value, Counter) else Counter({"": value})
        for row, value in values.items()
    }
    others = [count for row, count in counts.items() if row != REFERENCE]
    ranges = []
    for reason in sorted(set().union(*others)):
        low, high = min(c[reason] for c in others), max(c[reason] for c in others)
        ranges.append(f"{reason} {low}-{high}".strip() if low < high else f"{reason} {low}".strip())
    own = [f"{REFERENCE} {values[REFERENCE]}"] if REFERENCE in values else []
    return "; ".join([*own, f"{len(others)} others {' '.join(ranges)}"])


class Reasons(Counter[str]):
    """Counts of reasons, which read `eos 3 length 17`."""

    def __str__(self) -> str:
        return " ".join(f"{reason} {self[reason]}" for reason in sorted(self))


def _reasons(part: pd.DataFrame) -> Reasons:
    return Reasons(str(one) for one in part.stop_reason.dropna())


CONDITIONS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "samples": len,
    "truncated prompts": lambda part: int((part.truncated_tokens.fillna(0) > 0).sum()),
    "chat templates": lambda part: int(part.chat_template.eq(True).sum()),
    "stop reasons": _reasons,
}
