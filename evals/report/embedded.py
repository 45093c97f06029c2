"""What eviction costs on one model, in numbers of every prompt that are committed, nobody's texts.

    python -m evals.report embedded runs=results/runs out=results/embedded  # of runs with kl=true
    python -m evals.report embedded                        # again, all that results/embedded has
    python -m evals.report embedded runs=results/more beside=results/embedded  # more prompts

Writes OUT/samples.csv.gz, OUT/environment.json, OUT/fidelity.csv, tables into OUT/tables and
figures into PICTURES (docs/img).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from buzz import Budget, BuzzPolicy
from buzz.errors import ConfigError
from evals.report import serving
from evals.report.methods import CONTRASTED, RIVAL
from evals.report.table import Table
from evals.results.folder import SettingFolder
from evals.results.frame import (
    DIFFERENCE,
    MARK,
    NOTHING,
    RATIO,
    REFERENCE,
    STORED,
    TOLERANCE,
    estimate,
    load,
    partner,
)

OUT, PICTURES = Path("results/embedded"), Path("docs/img")
SAMPLES = "samples.csv.gz"
SAME = ["task", "sample", "budget", "budget_by"]  # of comparisons that are paired
BUDGET = 0.25  # at which an answer's source is looked at
ENOUGH = 20  # answers, for the interval of a ratio, or for a sign test
OVER = (
    f"{MARK}: held more than {TOLERANCE:.0%} above the budget on average, while the full cache's"
    " answer was read, as methods do that evict after the prompt alone."
)


def gather(out: Path, runs: Path, beside: Path | None = None) -> None:
    """The numbers of `runs`, and of `beside` before them, and their environments, into `out`.

    Raises:
        ConfigError: there are none, or runs beside each other compared with different answers.
    """
    rows = load(runs)
    full = partner(rows).score
    known = rows.kl_to_full.notna() | rows.score.notna() if len(rows) else []
    chosen = rows[known & (rows.row != REFERENCE)] if len(rows) else rows
    if chosen.empty:
        raise ConfigError("runs", str(runs), "no method's records are there; run some first")
    named = chosen.group.where(chosen.group != "", chosen.task)
    if chosen.seed.nunique() > 1:
        chosen = chosen.assign(id=chosen.seed.astype(str) + "/" + chosen.id)
    how = chosen.compress.str.replace(" ", "-").where(chosen.compress != "prompt", "")
    found = chosen.drop(columns="task").assign(
        task=named + how.map(lambda told: f"-{told}" if told else ""), full_score=full[chosen.index]
    )
    budgeted = (found.budget_entries / found.budget).astype(float)  # tokens that a share is of
    found["context_tokens"] = found.prompt_tokens.where(found.compress == "prompt", budgeted)
    found["method"] = found.row.str.replace(r"@[^,]*", "", regex=True)  # with what constrains it
    found = found.rename(columns={column: name for name, column in STORED.items()})
    if len(models := found.model.unique()) > 1:
        remedy = f"is of several models ({', '.join(models)}): keep their runs apart"
        raise ConfigError("runs", str(runs), remedy)
    lasting = [
        *("model", "task", "prompt_tokens", "context_tokens", "answer_tokens", "full_score"),
        "method",
    ]
    lasting += ["budget", "budget_by", "kl_median", "evictions", "score", *STORED]
    lasting += [name for name in found if name.startswith("copied_")]
    found = found[[name for name in dict.fromkeys(lasting) if name in found]]
    if beside is not None:
        found = pd.concat([_stored(beside, "beside"), found])
    apart = found.groupby(["task", "sample"])["answer"].nunique()
    if (apart > 1).any():
        task, sample = apart.index[apart > 1][0]
        raise ConfigError("runs", str(runs), f"two answers to {task} {sample}: keep runs apart")
    found = found.drop_duplicates([*SAME, "method"], keep="last")
    found = found.sort_values([*SAME[:2], "budget", "method"], ignore_index=True)
    known: dict[str, Any] = {}
    for path in runs.rglob("setting.yaml"):
        known |= SettingFolder(path.parent).environments
    out.mkdir(parents=True, exist_ok=True)
    same = {"method": "gzip", "mtime": 0}  # equal numbers are equal files
    found.to_csv(out / SAMPLES, index=False, float_format="%.5g", compression=same)
    (out / "environment.json").write_text(json.dumps(list(known.values()), indent=1) + "\n")


def _stored(folder: Path, field: str = "out") -> pd.DataFrame:
    if not (folder / SAMPLES).exists():
        raise ConfigError(field, str(folder), f"has no {SAMPLES}; give runs=FOLDER")
    return pd.read_csv(folder / SAMPLES, dtype={"sample": str, "answer": str})


def build(out: Path, pictures: Path) -> list[Path]:
    """Summary, tables and figures of the numbers that are in `out`; the figures.

    Raises:
        ConfigError: there are no numbers.
    """
    _stored(out)
    rows = load(out)
    spread = rows[rows.setting.str.contains("-spread=")]
    rows = rows[~rows.setting.str.contains("/|-spread=")]
    summary = summarize(rows)
    summary.to_csv(out / "fidelity.csv", index=False, float_format="%.5g")
    (out / "tables").mkdir(exist_ok=True)
    served = not serving.constrained(rows).empty
    for table in serving.tables(rows) if served else every(rows, summary):
        (out / "tables" / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    if served:
        return serving.draw(rows, pictures)
    from evals.report.embedded_figures import draw  # with matplotlib, which is slow to import

    several = swept(summary.dropna(subset="kl"))
    return draw(rows, several, sourced(rows), spread, pictures)


def main(runs: str = "", out: str = "", beside: str = "", pictures: str = "") -> None:
    """Without any folder: all that is committed, each folder's pictures in one of their own."""
    if not any((runs, out, beside, pictures)):
        for file in sorted(OUT.rglob(SAMPLES)):
            build(file.parent, PICTURES / file.parent.relative_to(OUT))
            print(f"embedded: {file.parent}")
        return
    where = Path(out or OUT)
    if runs:
        gather(where, Path(runs), Path(beside) if beside else None)
    build(where, Path(pictures or PICTURES))
    print(f"embedded: {where}")


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over prompts with 95 % bootstrap intervals, and the paired difference to H2O.

    Answers of one token, which nothing could change, have no divergence; n counts the others.
    Intervals are of what was seen: they have no width where samples never differ.
    """
    own, full, rival = rows[rows.method != REFERENCE], partner(rows), partner(rows, RIVAL)
    lines = []
    keys = ["setting", "label", "budget", "budget_by"]
    for (task, method, budget, by), every in own.groupby(keys, sort=False):
        group = every.dropna(subset="kl_to_full")
        full_score, theirs = full.score[every.index].astype(float), rival.loc[group.index]
        kl = estimate(group, "kl_to_full", guard=False)
        less, nearer = NOTHING, None
        if method != RIVAL:
            less = estimate(group, "kl_to_full", theirs, DIFFERENCE, guard=False)
            nearer = (
                np.mean((group.kl_to_full - theirs.kl_to_full).dropna() < 0) if less.n else None
            )
        of = estimate(every, "score", full.loc[every.index], RATIO, guard=False)
        lines.append(
            {
                **{"task": task, "method": method, "budget": budget, "budget_by": by},
                **{"n": len(group), "score": every.score.mean(), "full_score": full_score.mean()},
                **{"answers": of.n, "of_full": of.value if of.ends else None},
                **{"of_full_low": of.low, "of_full_high": of.high},
                **{"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high},
                **{"kl_median": group.kl_to_full.median(), "top1": group.top1_to_full.mean()},
                "entries_mean": group.kv_entries_mean.mean(),
                "entries_peak": group.kv_entries_peak.mean(),
                **{"held_over_budget": group.held.mean(), "evictions": group.evictions.mean()},
                **{f"kl_less_{RIVAL}": less.value, f"kl_less_{RIVAL}_low": less.low},
                **{f"kl_less_{RIVAL}_high": less.high, f"nearer_than_{RIVAL}": nearer},
            }
        )
    found = pd.DataFrame(lines).sort_values(["task", "budget", "kl"])
    return found if found.score.notna().any() else found.drop(columns="score")


# Tables


def every(rows: pd.DataFrame, summary: pd.DataFrame) -> list[Table]:
    several = swept(summary)
    found = divergence(several) + contrasts(summary if several.empty else several)
    return found + signs(rows) + answers(summary) + quality(summary) + sources(rows)


def swept(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of data sets that were measured at several budgets."""
    return frame[frame.groupby("task").budget.transform("nunique") > 1]


def _with_ends(group: pd.DataFrame, columns: dict[str, str]) -> dict[str, Any]:
    ends = ("", "_low", "_high")
    return {
        f"{of}{end.replace('_', ' ')}": group[f"{name}{end}"]
        for name, of in columns.items()
        for end in ends
    }


def divergence(summary: pd.DataFrame) -> list[Table]:
    """One per data set: methods by rising divergence, at each budget."""
    note = (
        "KL(full || method) in nats a token on the full cache's own answer, mean over prompts"
        " with its 95% interval; nearer: the part of prompts on which it is less than H2O's."
        f" {OVER}"
    )
    found = []
    for task, group in summary.groupby("task", sort=True):
        told = {"budget": group.budget, "method": _marked(group.method, group.held_over_budget)}
        if "score" in group and group.score.notna().any():
            told |= {"score": group.score, "full's score": group.full_score}
        told |= _with_ends(group, {"kl": "KL"})
        told |= {"median": group.kl_median, "same token": group.top1}
        told |= _with_ends(group, {f"kl_less_{RIVAL}": "KL - H2O"})
        told |= {"nearer": group[f"nearer_than_{RIVAL}"], "entries": group.entries_mean}
        frame = pd.DataFrame(told | {"evictions": group.evictions, "n": group.n})
        found.append(Table(f"fidelity_{task}", str(task), frame, note))
    return found


def _marked(methods: pd.Series, held: pd.Series) -> list[str]:
    return [
        f"{name}{MARK if share > 1 + TOLERANCE else ''}"
        for name, share in zip(methods, held, strict=True)
    ]


def contrasts(summary: pd.DataFrame) -> list[Table]:
    """KL less H2O's of every method, a column for each data set and budget, the lowest first."""
    name = f"kl_less_{RIVAL}"
    rows = summary[summary.method != RIVAL].dropna(subset=name)
    if rows.empty:
        return []
    columns: dict[str, Any] = {}
    for (task, budget), group in rows.groupby(["task", "budget"], sort=True):
        columns |= _with_ends(group.set_index("method"), {name: f"{task}, {budget:g}"})
    by_method = rows.groupby("method")
    wide = pd.DataFrame(columns)
    wide["evictions"], wide["held"] = by_method.evictions.mean(), by_method.held_over_budget.mean()
    counts = by_method.n.agg(["min", "max"])
    wide["n"] = [f"{a}" if a == b else f"{a} to {b}" for a, b in counts.to_numpy()]
    means = wide[[column for column in columns if not column.endswith((" low", " high"))]]
    by = pd.DataFrame({"lacking": means.isna().sum(axis=1), "mean": means.mean(axis=1)})
    wide = wide.loc[by.sort_values(["lacking", "mean"]).index]
    wide.insert(0, "method", _marked(wide.index.to_series(), wide["held"]))
    note = (
        "KL less H2O's on the same prompts, mean with its 95% interval; below 0 is nearer to the"
        " full cache. Evictions of an answer and memory held, as a part of the budget, are means"
        f" over all columns; n: prompts of a column. {OVER}"
    )
    return [Table("contrasts", "Beside H2O", wide.reset_index(drop=True), note)]


def signs(rows: pd.DataFrame) -> list[Table]:
    """Sign tests of KL beside H2O's, as means are made by a few prompts; corrected over methods.

    The p of Holm (1979) is that of "no method of this data set and budget differs".
    """
    beside = partner(rows, RIVAL).kl_to_full.astype(float)
    less = (rows.kl_to_full.astype(float) - beside)[rows.label != RIVAL].dropna()
    every = rows.loc[less.index].assign(less=less)
    lines = []
    for (task, budget), group in every.groupby(["setting", "budget"]):
        own = []
        for method, d in group.groupby("label").less:
            nearer, n = int((d < 0).sum()), int((d != 0).sum())
            if len(d) >= ENOUGH:
                own.append([method, d.median(), nearer, len(d), sign_test(nearer, n)])
        own.sort(key=lambda line: line[-1])
        corrected = np.maximum.accumulate([line[-1] * (len(own) - i) for i, line in enumerate(own)])
        for line, p in zip(own, corrected, strict=True):
            lines.append([task, budget, *line, min(1.0, p)])
    if not lines:
        return []
    columns = ["task", "budget", "method", "median", "nearer", "n", "p", "p, Holm"]
    note = (
        "KL less H2O's on the same prompts: its median, on how many prompts it is below 0, the sign"
        " test's p, and p corrected for all methods of the data set and budget (Holm)."
    )
    return [Table("signs", "Sign tests beside H2O", pd.DataFrame(lines, columns=columns), note)]


def sign_test(fewer: int, n: int) -> float:
    """The chance of a split of `n` as uneven as this, or more, if both signs are as likely."""
    tail = sum(math.comb(n, k) for k in range(min(fewer, n - fewer) + 1))
    return min(1.0, 2 * tail / 2**n)


def answers(summary: pd.DataFrame) -> list[Table]:
    """Scores of the methods' own answers: a table for each kind of compression, a column a task."""
    if "score" not in summary:
        return []
    scored = summary[summary.score.notna()]
    split = scored.task.str.extract(r"^(.+?)(?:-(context|stream.*))?$")
    found = []
    for (how, budget), group in scored.groupby([split[1].fillna("prompt"), scored.budget]):
        own = group.assign(column=split[0][group.index])
        wide = own.pivot_table("score", "method", "column")
        wide.index = pd.Index(
            _marked(wide.index.to_series(), own.groupby("method").held_over_budget.mean())
        )
        wide = pd.concat([own.groupby("column").full_score.first().to_frame("full").T, wide])
        wide.insert(0, "mean", wide.mean(axis=1))
        frame = wide.sort_values("mean", ascending=False).rename_axis("method").reset_index()
        counts = ", ".join(f"{n}" for n in sorted(group.answers.unique()))
        title = f"Own answers, budget {budget:g}" + ("" if how == "prompt" else f", compress={how}")
        note = f"Scores of own answers; budget of what is compressed; n = {counts} a column. {OVER}"
        found.append(Table(f"answers_{how}_{budget:g}", title, frame, note))
    return found


def quality(summary: pd.DataFrame) -> list[Table]:
    """Scores of own answers as a part of the full cache's, where there are enough of them."""
    scored = summary[summary.of_full.notna() & (summary.answers >= ENOUGH)]
    scored = scored.sort_values(["task", "budget", "of_full"], ascending=[True, True, False])
    if scored.empty:
        return []
    told = {"task": scored.task, "budget": scored.budget}
    told |= {"method": _marked(scored.method, scored.held_over_budget)}
    told |= _with_ends(scored, {"of_full": "of full"})
    part = scored.held_over_budget * scored.budget.where(scored.budget < 1)
    frame = pd.DataFrame(told | {"held": part, "n": scored.answers})
    note = (
        "Score of own answers over the full cache's on the same prompts, with its 95% interval;"
        f" held: entries on average, as a part of what is compressed. {OVER}"
    )
    return [Table("quality", "Quality kept", frame, note)]


def sourced(rows: pd.DataFrame) -> pd.DataFrame:
    """Prompts whose answer has a source, and how far before the end, in BUZZ's windows."""
    chosen = swept(rows[rows.method != REFERENCE].assign(task=rows.setting))
    chosen = chosen[(chosen.budget == BUDGET) & chosen.label.isin(CONTRASTED)]
    if "copied_distance" not in chosen:
        return chosen.iloc[:0].assign(windows=[])
    chosen = chosen[chosen.copied_distance.notna() & chosen.kl_to_full.notna()]
    policies = (Budget(BUDGET).policy(BuzzPolicy(), int(n))[0] for n in chosen.prompt_tokens)
    windows = np.array([policy.window for policy in policies], dtype=float)
    return chosen.assign(windows=chosen.copied_distance / windows)


def sources(rows: pd.DataFrame) -> list[Table]:
    """KL where an answer's longest match begins inside BUZZ's window, and where it does not."""
    chosen = sourced(rows)
    if chosen.empty:
        return []
    where = chosen.windows.le(1).map({True: "inside", False: "outside"}).rename("begins")
    groups = chosen.groupby(["task", where, "label"]).kl_to_full
    frame = groups.agg(["mean", "median", "count"]).reset_index()
    frame = frame.rename(columns={"mean": "KL", "count": "n", "label": "method"})
    note = (
        f"Budget {BUDGET:g}. Where in the prompt the longest run of the answer's tokens begins that"
        " stands there: inside BUZZ's window or not."
    )
    return [Table("sources", "Where an answer comes from", frame, note)]
