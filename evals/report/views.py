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
from evals.report.methods import place
from evals.report.table import NOT_RUN as EMPTY
from evals.report.table import Table
from evals.results.frame import (
    DIFFERENCE,
    MARK,
    NOT_RUN,
    RATIO,
    REFERENCE,
    TOLERANCE,
    VALUE,
    Estimate,
    Weights,
    estimate,
    interval,
    partner,
)
from evals.tasks.base import Task
from evals.tasks.build import build
from evals.tasks.longbench import averages

SPEC = yaml.safe_load(Path(__file__).with_name("views.yaml").read_text(encoding="utf-8"))
DISTURBED = "~"  # behind times of samples during which other processes kept the machine busy
MANY = 6  # rows up to which they are columns of a table of data sets
Key = tuple[str, str]  # setting and row


# What is of one method: the rows of a frame of one setting and row


def groups(rows: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """Samples by setting and row, in the order in which tables show them."""
    found = {key: part for key, part in rows.groupby(["setting", "row"], sort=False)}

    def order(key: Any) -> tuple[Any, ...]:
        one = found[key].iloc[0]
        budget = 0.0 if unknown(one.budget) else float(one.budget)
        return one.task, one.model, str(one.seed), one.setting, budget, place(one.method), one.row

    return {key: found[key] for key in sorted(found, key=order)}


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


def count(part: pd.DataFrame) -> str:
    """Samples that ran; those out of memory, with the most bytes asked for; those that failed."""
    bad = {name: part[part.status == name] for name in ("oom", "failed", NOT_RUN)}
    if len(bad[NOT_RUN]):
        return f"{len(part) - len(bad[NOT_RUN])} of {len(part)}"
    asked = bad["oom"].asked_nbytes.max()
    size = f" of {asked / 1e9:.1f} GB" if asked > 0 else ""
    oom = f" (+{len(bad['oom'])} oom{size})" if len(bad["oom"]) else ""
    return f"{len(ran(part))}{oom}" + (
        f" (+{len(bad['failed'])} FAILED)" if len(bad["failed"]) else ""
    )


def by_setting(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    found: dict[str, list[pd.DataFrame]] = {}
    for (setting, _), part in groups(rows).items():
        found.setdefault(setting, []).append(part)
    return {setting: pd.concat(parts) for setting, parts in found.items()}


def summary(part: pd.DataFrame) -> dict[str, Any]:
    """What one method comes to, for objectives of sweeps and services that take results.

    Returns:
        score with its ends, means of all that was measured, of peaks and of what is allocated the
        most; counts.
    """
    answered, scored = ran(part), estimate(ran(part))
    numbers = answered.select_dtypes("number").columns
    means = {name: answered[name].mean() for name in numbers}
    means |= {
        name: answered[name].max() for name in numbers if "peak" in name or "allocated" in name
    }
    names = [name for name in answered if name.startswith("scores.")]
    means |= {name: estimate(answered, name).value for name in names}
    found = {name: float(value) for name, value in means.items() if not unknown(value)}
    ends = {"score": scored.value, "score_low": scored.low, "score_high": scored.high}
    counts = {name: int((part.status == name).sum()) for name in ("oom", "failed", NOT_RUN)}
    return found | ends | {"n": scored.n} | {k.replace(" ", "_"): v for k, v in counts.items()}


def labels(rows: pd.DataFrame) -> dict[str, str]:
    """The settings by what tells them apart: the task, and what else differs."""
    first = rows.drop_duplicates("setting").set_index("setting")
    apart = [name for name in ("model", "seed", "compress") if first[name].nunique() > 1]
    found = {
        key: " ".join([one.task, *(f"{name}={one[name]}" for name in apart)]).replace("model=", "")
        for key, one in first.iterrows()
    }
    for label, count in Counter(found.values()).items():
        alike = [key for key, other in found.items() if other == label]
        if count > 1:
            flat = {key: _flat(first.loc[key]) for key in alike}
            names = dict.fromkeys(name for one in flat.values() for name in one)
            for name in names:
                if len({str(one.get(name)) for one in flat.values()}) > 1:
                    for key in alike:
                        found[key] += f" {name}={flat[key].get(name)}"
    several = {label for label, count in Counter(found.values()).items() if count > 1}
    return {key: f"{key}" if label in several else label for key, label in found.items()}


def _flat(setting: pd.Series) -> dict[str, Any]:
    task, model = (
        {} if unknown(setting[name]) else setting[name]
        for name in ("task_settings", "model_settings")
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
    columns: dict[str, Any] = {}
    for column, how in spec["columns"].items():
        columns[column] = how
        if column == "score":
            columns |= {one: {"metric": f"scores.{one}", "interval": True} for one in metrics}
    others = {c["against"]: partner(rows, c["against"]) for c in columns.values() if "against" in c}
    by, lines, sections = spec.get("by", []), [], []
    marks: dict[str, list[str]] = {}
    over: list[pd.DataFrame] = []
    named = labels(rows)
    for key, whole in (across_seeds if spec.get("across") else groups)(rows).items():
        done = finished(whole)
        tokens = whole.prompt_tokens
        tokens = tokens if by == ["prompt_tokens"] else length_bin(tokens)
        bins = whole.groupby(tokens) if by and done else [(None, whole)]
        for value, part in bins:
            line = head(whole, part) | dict(zip(by, [value], strict=False))
            if spec.get("across"):
                line["seed"] = ", ".join(map(str, sorted(whole.seed.unique())))
            answered = ran(part) if done else part.iloc[:0]
            for column, how in columns.items():
                cells, disturbed = _column(how, answered, others, rows, spec.get("across"))
                line |= _named(column, cells, how)
                marks.setdefault(column, []).append(DISTURBED if disturbed else "")
            if spec.get("terminal"):
                line = {"n": count(whole), "row": f"{key[1]}{mark(whole)}"} | line
            elif not by and not spec.get("across"):
                line |= {"status": status(whole)}
            sections.append(f"{named.get(key[0], '')}  {whole.headline.iloc[0]}".strip())
            lines.append(line)
            over.append(part)
    text = " ".join(filter(None, [told.get("note", ""), spec.get("note", ""), over_note(over)]))
    title = told.get("title", spec.get("title", view))
    frame = pd.DataFrame(
        lines, columns=None if lines else ["task", "model", "method"], dtype=object
    )
    return Table(told.get("name", view), title, frame, text, marks, sections)


def across_seeds(rows: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    """Samples by method, those of settings that differ in the seed alone together, if there are."""
    found: dict[Any, list[pd.DataFrame]] = {}
    for (_, row), part in groups(rows).items():
        one = part.iloc[0]
        told = {k: v for k, v in _flat(one).items() if k not in ("seed", "model.seed")}
        same = json.dumps([one.task, one.model, one.compress, told], default=str, sort_keys=True)
        found.setdefault((same, row), []).append(part)
    joined = {key: pd.concat(same) for key, same in found.items() if len(same) > 1}
    return {key: part for key, part in joined.items() if part.seed.nunique() > 1}


def length_bin(tokens: pd.Series) -> pd.Series:
    """The power of two nearest to a prompt's length."""
    return (2 ** np.round(np.log2(tokens.astype(float).clip(lower=1)))).fillna(0).astype(int)


def head(whole: pd.DataFrame, part: pd.DataFrame) -> dict[str, Any]:
    """What a line is of."""
    one = whole.iloc[0]
    return {
        "task": one.task,
        "model": one.model,
        "seed": one.seed,
        "method": one.label if not unknown(one.label) else one.row,
        "settings": one.row.partition(",")[2],
        "compress": "" if one.compress == "prompt" or unknown(one.compress) else one.compress,
        "budget": budget_text(part if len(part) else whole),
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
    if how.get("timed"):
        part = part[part.timed]
        if other is not None:
            other = other.loc[part.index]
            beside = other.timed.eq(True) & (other.machine == part.machine)
            part, other = part[beside], other[beside]
    told = (how.get(key) for key in ("metric", "stat", "as"))
    metrics, stats, kinds = (one if isinstance(one, list) else [one] for one in told)
    count = max(map(len, (metrics, stats, kinds)))
    parts = [part] if across is None else [one for _, one in part.groupby(across)]
    found = []
    for i in range(count):
        metric, stat, kind = (one[min(i, len(one) - 1)] for one in (metrics, stats, kinds))
        known = metric in part and len(part)
        cells = [
            _cell(metric, stat, kind, p, None if other is None else other.loc[p.index], rows)
            for p in parts
            if known
        ]
        if across and cells:
            values = [np.nan if one.value is None else one.value for one in cells]
            cells = [interval(values, guard=True)]
        found.append(cells[0] if cells else Estimate(None, None, None, 0))
    loaded = bool(len(part)) and (
        part.loaded.any() or (other is not None and other.loaded.eq(True).any())
    )
    return found, bool(how.get("timed") and how.get("stat") != "count" and loaded)


def _cell(
    metric: str,
    stat: str | None,
    kind: str | None,
    part: pd.DataFrame,
    other: pd.DataFrame | None,
    rows: pd.DataFrame,
) -> Estimate:
    scored = metric == "score" or metric.startswith("scores.")
    if other is not None and part.row.eq(REFERENCE).all():
        return Estimate(None, None, None, 0)  # the full cache beside itself
    if kind in ("agreement", "prefix") and other is not None:
        shares = [_alike(kind, a, b) for a, b in zip(part[metric], other[metric], strict=True)]
        return interval(shares)
    if kind in ("difference", "ratio"):
        of = DIFFERENCE if kind == "difference" else RATIO
        return score(part, rows, metric, other, of) if scored else estimate(part, metric, other, of)
    values = part[metric].astype(float)
    if other is not None:
        gains = values - other[metric].astype(float)
        if kind in ("wins", "losses") and not part.higher_is_better.iloc[0]:
            gains = -gains
        n = int(gains.notna().sum())
        counted = {"wins": gains > 0, "ties": gains == 0, "losses": gains < 0, "nearer": gains < 0}
        if kind == "count" or not n:
            return Estimate(n or None, None, None, n)
        number = int(counted[str(kind)].sum())
        return Estimate(number / n if kind == "nearer" else number, None, None, n)
    n = int(values.notna().sum())
    if stat == "count":  # of what nobody measured the column is empty
        return Estimate(n or None, None, None, n)
    if stat in ("max", "median"):
        return Estimate(float(values.agg(stat)) if n else None, None, None, n)
    return score(part, rows, metric) if scored else estimate(part, metric)


def _alike(kind: str, own: Any, full: Any) -> float:
    """The share of positions with the same token; or of the full answer before the first other."""
    if not (isinstance(own, list) and isinstance(full, list) and own and full):
        return np.nan
    pairs = zip(own, full, strict=False)
    if kind == "agreement":
        return sum(a == b for a, b in pairs) / max(len(own), len(full))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(full)


def _named(column: str, cells: Sequence[Estimate], how: Mapping[str, Any]) -> dict[str, Any]:
    scale = how.get("scale", 1)
    values = [
        [None if value is None else value * scale if scale != 1 else value for value in cell[:3]]
        for cell in cells
    ]
    if form := how.get("form"):
        texts = ["-" if value is None else format(value, form) for value, _, _ in values]
        return {column: "-" if set(texts) == {"-"} else "/".join(texts)}
    ((value, low, high),) = values
    return {column: value} | (
        {f"{column} low": low, f"{column} high": high} if how.get("interval") else {}
    )


def over_note(parts: Iterable[pd.DataFrame]) -> str:
    """What MARK means, and by how much each method that has it is over; nothing if none has."""
    over: dict[str, list[float]] = {}
    for part in parts:
        if len(part) and mark(part):
            name = f"{part.iloc[0].label} @{budget_text(part)}"
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
        metrics = [m for m in one.get("metrics", ()) if f"scores.{m}" in own]
        yield (
            data_sets(own, **told) if one.get("data_sets") else make("scores", own, metrics, **told)
        )


def data_sets(rows: pd.DataFrame, name: str, title: str, note: str) -> Table:
    """Data sets, the benchmark's own averages and memory in rows; of many methods, in columns."""
    columns: dict[str, dict[str, Any]] = {}
    named, several = labels(rows), rows.setting.nunique() > 1
    chosen = {key: part for key, part in groups(rows).items() if finished(part)}
    for (setting, row), part in chosen.items():
        answered = ran(part)
        means = {
            str(group): estimate(own).value for group, own in answered.groupby("group", sort=False)
        }
        for kinds, found in (
            averages({k: v for k, v in means.items() if v is not None}).items() if means else ()
        ):
            means |= {f"{kinds}: {one}": value for one, value in found.items()}
        means["memory: KV MB"] = answered.kv_nbytes_mean.mean() / 1e6
        means["memory: KV allocated MB"] = answered.allocated_nbytes.max() / 1e6
        means |= {"memory: held / budget": held(part)}
        of = f"{row}{mark(part)}" + (f" {named[setting]}" if several else "")
        columns[of] = means
    names = sorted(
        dict.fromkeys(n for one in columns.values() for n in one), key=lambda n: ":" in n
    )
    if len(columns) > MANY:
        lines = [
            {"run": key} | {n: one.get(n, EMPTY) for n in names} for key, one in columns.items()
        ]
    else:
        lines = [
            {"data set": n} | {key: one.get(n, EMPTY) for key, one in columns.items()}
            for n in names
        ]
    frame = pd.DataFrame(lines, columns=None if lines else ["data set"], dtype=object)
    return Table(name, title, frame, f"{note} {over_note(chosen.values())}".strip())


def breakdowns(rows: pd.DataFrame) -> Iterator[Table]:
    """Scores by the samples' groups, and by what else their task breaks them down."""
    named = labels(rows)
    for setting, whole in by_setting(rows).items():
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (_, row), part in groups(whole).items():
            for title, means in _broken_down(ran(part)).items():
                found.setdefault(title, {})[f"{row}{mark(part)}"] = means
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
    found: dict[str, dict[str, Any]] = {part.grouped_by.iloc[0]: means} if means else {}
    told = part.task_settings.iloc[0]
    if isinstance(told, dict):
        try:
            found |= build("task", told, Task).breakdown(records(part))
        except (ConfigError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            found["breakdown"] = {f"cannot be made: {error}": np.nan}
    return {title: rows for title, rows in found.items() if rows}


def records(part: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as records: without what they do not have."""
    lines = part.to_dict("records")
    return [
        {k: v for k, v in line.items() if isinstance(v, list | dict) or not unknown(v)}
        for line in lines
    ]


def families(rows: pd.DataFrame, parameter: str) -> list[dict[Any, pd.DataFrame]]:
    """Rows of one method, setting and budget that differ in one parameter alone, by its value.

    Sizes that a budget chose are no settings, whatever the configuration says.
    """
    found: dict[str, dict[Any, pd.DataFrame]] = {}
    for (setting, _), part in groups(rows).items():
        one = part.iloc[0]
        known = settings_of(one)
        if parameter not in known or not finished(part) or left_to_budget(one, parameter):
            continue
        told = [known | {parameter: None}, sorted(set(one.fixed or ()) - {parameter})]
        same = [setting, one.method, one.budget, one.budget_by, *told]
        found.setdefault(str(same), {}).setdefault(known[parameter], part)

    def order(value: Any) -> tuple[bool, bool, Any]:
        return value is not None, isinstance(value, str), value

    several = [one for one in found.values() if len(one) > 1]
    return [{value: one[value] for value in sorted(one, key=order)} for one in several]


def settings_of(one: pd.Series) -> dict[str, Any]:
    """A method's parameters and the cache's, as configured."""
    told = [known for known in (one.parameters, one.cache) if isinstance(known, dict)]
    return {key: value for known in told for key, value in sorted(known.items())}


def left_to_budget(one: pd.Series, parameter: str) -> bool:
    fixed = one.fixed if isinstance(one.fixed, list) else []
    return (
        not unknown(one.budget) and parameter in ("window", "threshold") and parameter not in fixed
    )


PARAMETERS: tuple[str, ...] = ("history", "compact", "stride", "window", "sink", "threshold")
PARAMETERS += ("positions", "logn_base", "logn_clamp")


def ablations(rows: pd.DataFrame) -> Table:
    """Every parameter that was varied alone."""
    lines, over = [], []
    for parameter in PARAMETERS:
        for family in families(rows, parameter):
            for value, part in family.items():
                found, one = score(ran(part), rows), part.iloc[0]
                over.append(part)
                lines.append(
                    {"parameter": parameter, "value": str(value), **head(part, part)}
                    | {"score": found.value, "score low": found.low, "score high": found.high}
                    | {"KV MB": ran(part).kv_nbytes_mean.mean() / 1e6, "held / budget": held(part)}
                    | {"metric": one.headline, "n": found.n}
                )
    note = (
        "Groups of rows that differ in nothing else. Without a budget, other sizes also hold other"
        " memory: read KV MB beside the score."
    )
    frame = pd.DataFrame(lines, columns=None if lines else ["parameter", "value"], dtype=object)
    return Table("ablations", "One parameter at a time", frame, f"{note} {over_note(over)}".strip())


def overview(rows: pd.DataFrame) -> Table:
    """Every row, unfinished and failed ones too."""
    lines = [
        head(part, part)
        | {
            "n": len(ran(part)),
            "status": status(part),
            "machine": ", ".join(map(str, part.machine.dropna().unique())),
            "revision": ", ".join(str(one)[:12] for one in part.git_revision.dropna().unique()),
            "folder": setting,
        }
        for (setting, _), part in groups(rows).items()
    ]
    frame = pd.DataFrame(lines, columns=None if lines else ["task", "method"], dtype=object)
    return Table("runs", "Runs", frame, over_note(groups(rows).values()))


def notes(rows: pd.DataFrame) -> list[str]:
    """What a reader should know before comparing the rows."""
    found, named = [], labels(rows)
    for setting, whole in by_setting(rows).items():
        task, parts = named[setting], groups(whole)
        for name, of in CONDITIONS.items():
            values = {row: of(ran(part)) for (_, row), part in parts.items() if finished(part)}
            if len(set(values.values())) > 1:
                told = "; ".join(f"{row} {value}" for row, value in values.items())
                found.append(f"{task}: rows differ in {name}: {told}")
        budgets: dict[str, list[float]] = {}
        for (_, row), part in parts.items():
            one, share = part.iloc[0], held(part)
            if mark(part):
                by = f"({one.budget_by}): not at equal memory"
                found.append(f"{MARK} {task}: {row} holds {share:.2f}x its budget {by}")
            if share:
                budgets.setdefault(f"{one.budget} ({one.budget_by})", []).append(share)
            if not finished(part):
                found.append(f"{task}, {row}: {status(part)}; without a score until it is finished")
            if part.environment.nunique() > 1:
                kinds = ", ".join(map(str, part.machine.dropna().unique()))
                count = part.environment.nunique()
                found.append(f"{task}, {row}: samples ran in {count} environments, on {kinds}")
        timed = ran(whole)[ran(whole).timed]
        if timed.loaded.any():
            found.append(
                f"{task}: other processes disturbed {timed.loaded.sum()} of {len(timed)} timed"
                f" answers: timings marked {DISTURBED} are not to be relied on"
            )
        for budget, shares in budgets.items():
            if max(shares) > (1 + TOLERANCE) * min(shares):
                ratio = max(shares) / min(shares)
                found.append(
                    f"{task}: rows of budget={budget} hold up to {ratio:.2f}x as much as others"
                )
        if not (whole.row == REFERENCE).any():
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
