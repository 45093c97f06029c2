"""Tables of what eviction costs: of each data set, beside H2O, of own answers, by their source."""

from __future__ import annotations

import pandas as pd

from buzz import Budget, BuzzPolicy
from evals.report.forms import Table
from evals.report.methods import CONTRASTED, RIVAL
from evals.results.equal_memory import MARK, TOLERANCE

BUDGET = 0.25  # at which an answer's source is looked at
ENOUGH = 20  # answers, for the interval of a ratio
OVER = (
    f"{MARK}: held more than {TOLERANCE:.0%} above the budget on average, while the full cache's"
    " answer was read, as methods do that evict after the prompt alone."
)


def every(samples: pd.DataFrame, summary: pd.DataFrame) -> list[Table]:
    several = swept(summary)
    return [
        *divergence(several),
        *contrasts(summary if several.empty else several),
        *answers(summary),
        *quality(summary),
        *sources(samples),
    ]


def divergence(summary: pd.DataFrame) -> list[Table]:
    """One per data set: methods by rising divergence, at each budget."""
    found = []
    for task, group in summary.groupby("task", sort=True):
        frame = pd.DataFrame(
            {
                "budget": group.budget,
                "method": [marked(row.method, row.held_over_budget) for row in group.itertuples()],
                "KL": group.kl,
                "KL low": group.kl_low,
                "KL high": group.kl_high,
                "median": group.kl_median,
                "same token": group.top1,
                "KL - H2O": group[f"kl_less_{RIVAL}"],
                "KL - H2O low": group[f"kl_less_{RIVAL}_low"],
                "KL - H2O high": group[f"kl_less_{RIVAL}_high"],
                "nearer": group[f"nearer_than_{RIVAL}"],
                "entries": group.entries_mean,
                "evictions": group.evictions,
                "n": group.n,
            }
        )
        if "score" in group and group.score.notna().any():
            frame.insert(2, "score", group.score)
            frame.insert(3, "full's score", group.full_score)
        note = (
            "KL(full || method) in nats a token on the full cache's own answer, mean over prompts"
            " with its 95% interval; nearer: the part of prompts on which it is less than H2O's."
            f" {OVER}"
        )
        found.append(Table(f"fidelity_{task}", str(task), frame, note))
    return found


def answers(summary: pd.DataFrame) -> list[Table]:
    """Scores of the methods' own answers: a table for each kind of compression, a column a task."""
    if "score" not in summary or not summary.score.notna().any():
        return []
    scored = summary[summary.score.notna()]
    split = scored.task.str.extract(r"^(.+?)(?:-(context|stream.*))?$")
    found = []
    for (how, budget), group in scored.groupby([split[1].fillna("prompt"), scored.budget]):
        own = group.assign(column=split[0][group.index])
        over = own.groupby("method").held_over_budget.mean()
        wide = own.pivot_table("score", "method", "column")
        wide.index = pd.Index([marked(str(name), over[name]) for name in wide.index])
        full = own.groupby("column").full_score.first()
        wide = pd.concat([full.to_frame("full").T, wide])
        wide.insert(0, "mean", wide.mean(axis=1))
        frame = wide.sort_values("mean", ascending=False).rename_axis("method").reset_index()
        counts = ", ".join(f"{n}" for n in sorted(group.answers.unique()))
        name = f"answers_{how}_{budget:g}"
        title = f"Own answers, budget {budget:g}" + ("" if how == "prompt" else f", compress={how}")
        note = f"Scores of own answers; budget of what is compressed; n = {counts} a column. {OVER}"
        found.append(Table(name, title, frame, note))
    return found


def quality(summary: pd.DataFrame) -> list[Table]:
    """Scores of own answers as a part of the full cache's, where there are enough of them."""
    scored = summary[summary.of_full.notna() & (summary.answers >= ENOUGH)]
    rows = [
        {"task": row.task, "budget": row.budget}
        | {"method": marked(row.method, row.held_over_budget)}
        | {"of full": row.of_full, "of full low": row.of_full_low, "of full high": row.of_full_high}
        | {"held": row.held_over_budget * row.budget, "n": row.answers}
        for row in scored.sort_values(
            ["task", "budget", "of_full"], ascending=[1, 1, 0]
        ).itertuples()
    ]
    note = (
        "Score of own answers over the full cache's on the same prompts, with its 95% interval;"
        f" held: entries on average, as a part of what is compressed. {OVER}"
    )
    return [Table("quality", "Quality kept", pd.DataFrame(rows), note)] if rows else []


def marked(method: str, held: float) -> str:
    return f"{method}{MARK if held > 1 + TOLERANCE else ''}"


def contrasts(summary: pd.DataFrame) -> list[Table]:
    """KL less H2O's of every method, a column for each data set and budget, the lowest first."""
    name = f"kl_less_{RIVAL}"
    rows = summary[summary.method != RIVAL].dropna(subset=name)
    if rows.empty:
        return []
    columns = {}
    for (task, budget), group in rows.groupby(["task", "budget"], sort=True):
        indexed, column = group.set_index("method"), f"{task}, {budget:g}"
        for end in ("", "_low", "_high"):
            columns[f"{column}{end.replace('_', ' ')}"] = indexed[f"{name}{end}"]
    wide = pd.DataFrame(columns)
    wide["evictions"] = rows.groupby("method").evictions.mean()
    wide["held"] = rows.groupby("method").held_over_budget.mean()
    counts = rows.groupby("method").n.agg(["min", "max"])
    wide["n"] = [f"{a}" if a == b else f"{a} to {b}" for a, b in counts.to_numpy()]
    means = wide[[column for column in columns if not column.endswith((" low", " high"))]]
    measured = means.notna().sum(axis=1)  # methods of every column first
    by = pd.DataFrame({"measured": -measured, "mean": means.mean(axis=1)})
    wide = wide.loc[by.sort_values(["measured", "mean"]).index]
    wide.index = pd.Index([marked(str(m), held) for m, held in wide["held"].items()])
    note = (
        "KL less H2O's on the same prompts, mean with its 95% interval; below 0 is nearer to the"
        " full cache. Evictions of an answer and memory held, as a part of the budget, are means"
        f" over all columns; n: prompts of a column. {OVER}"
    )
    frame = wide.rename_axis("method").reset_index()
    return [Table("contrasts", "Beside H2O", frame, note)]


def swept(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of data sets that were measured at several budgets."""
    return frame[frame.groupby("task").budget.transform("nunique") > 1]


def sourced(samples: pd.DataFrame) -> pd.DataFrame:
    """Prompts whose answer has a source, and how far before the end, in BUZZ's windows."""
    chosen = swept(samples)
    chosen = chosen[(chosen.budget == BUDGET) & chosen.kl.notna()]
    chosen = chosen[chosen.copied_distance.notna() & chosen.method.isin(CONTRASTED)]
    windows = [window_of(tokens) for tokens in chosen.prompt_tokens]
    return chosen.assign(windows=chosen.copied_distance / windows)


def sources(samples: pd.DataFrame) -> list[Table]:
    """KL where an answer's longest match begins inside BUZZ's window, and where it does not."""
    chosen = sourced(samples)
    if chosen.empty:
        return []
    where = chosen.windows.le(1).map({True: "inside", False: "outside"})
    groups = chosen.assign(source=where).groupby(["task", "source", "method"])
    frame = groups.kl.agg(["mean", "median", "count"]).reset_index()
    frame = frame.rename(columns={"mean": "KL", "count": "n", "source": "begins"})
    note = (
        f"Budget {BUDGET:g}. Where in the prompt the longest run of the answer's tokens begins that"
        " stands there: inside BUZZ's window or not."
    )
    return [Table("sources", "Where an answer comes from", frame, note)]


def window_of(prompt: int) -> int:
    policy, _ = Budget(BUDGET).policy(BuzzPolicy(), prompt)
    assert isinstance(policy, BuzzPolicy)
    return policy.window
