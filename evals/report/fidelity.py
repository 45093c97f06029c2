"""What eviction costs on one model: divergence from the full cache, by data set, method and budget.

    python -m evals.report.fidelity runs=results/fidelity  # of what +experiment=fidelity wrote
    python -m evals.report.fidelity                        # again, from results/embedded alone

Writes OUT/samples.csv.gz (numbers of every prompt, nobody's texts), OUT/fidelity.csv, tables into
OUT/tables and figures into PICTURES (docs/img). Runs of other methods on the same answers may lie
beside each other: they are put together, prompt by prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from buzz import Budget, BuzzPolicy
from buzz.errors import ConfigError
from evals.report.drawing import RC, legend, panels, plt
from evals.report.forms import Table
from evals.report.methods import CONTRASTED, RIVAL, style_of
from evals.results.equal_memory import MARK, TOLERANCE
from evals.results.records import RunFolder
from evals.results.runs import compression
from evals.results.statistics import bootstrap

FORKS, SAMPLES, SUMMARY = "forks.jsonl", "samples.csv.gz", "fidelity.csv"
SAME = ["task", "sample", "budget", "budget_by"]  # of comparisons that are paired
BUDGET = 0.25  # there
OVER = (
    f"{MARK}: held more than {TOLERANCE:.0%} above the budget on average, while the full cache's"
    " answer was read, as methods do that evict after the prompt alone."
)


def collect(folders: Sequence[Path]) -> pd.DataFrame:
    """Every comparison of some runs: a row for each prompt, method and budget.

    Raises:
        ConfigError: there is none, or runs beside each other compared with different answers.
    """
    rows, names = [], ", ".join(map(str, folders))
    for folder in map(RunFolder, folders):
        config = yaml.safe_load((folder.path / "config.yaml").read_text())
        for record in folder.read(FORKS).values():
            if record["status"] == "ok":
                rows += _rows(record, config)
    if not rows:
        raise ConfigError("runs", names, "no comparison is there; run +experiment=fidelity first")
    frame = pd.DataFrame(rows)
    answers = frame.groupby(["task", "sample"])["answer"].nunique()
    if (answers > 1).any():
        task, sample = answers.index[answers > 1][0]
        raise ConfigError("runs", names, f"two answers to {task} {sample}: keep runs apart")
    frame = frame.drop_duplicates([*SAME, "method"], keep="last")
    return frame.sort_values([*SAME[:2], "budget", "method"], ignore_index=True)


def _rows(record: dict[str, Any], config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    compressed = "-".join(map(str, compression(config).values()))  # never beside whole prompts
    task = record["group"] or config["task"]["name"]
    shared = {
        "task": f"{task}-{compressed}" if compressed else task,
        "sample": record["id"],
        "prompt_tokens": record["prompt_tokens"],
        "context_tokens": record.get("context_tokens", record["prompt_tokens"]),
        "answer_tokens": record["answer_tokens"],
        "answer": record["answer_sha256"],
        "full_score": record.get("full_score"),
        **{f"copied_{name}": value for name, value in record["copied"].items()},
    }
    for fork in record["forks"]:
        yield shared | {name: value for name, value in fork.items() if name != "kl_tokens"}


def summarize(samples: pd.DataFrame) -> pd.DataFrame:
    """Means over prompts with 95% bootstrap intervals, and the paired difference to H2O.

    Answers of one token, which nothing could change, have no divergence; n counts the others.
    """
    rivals = samples[samples.method == RIVAL].dropna(subset="kl")
    rows = []
    for (task, method, budget, by), every in samples.groupby(
        ["task", "method", "budget", "budget_by"], sort=False
    ):
        group = every.dropna(subset="kl")
        theirs = rivals[(rivals.task == task) & (rivals.budget == budget)]
        theirs = theirs[theirs.budget_by == by][["sample", "kl"]]
        pairs = group.merge(theirs, on="sample", suffixes=("", "_rival"))
        gains = [] if method == RIVAL else (pairs.kl - pairs.kl_rival).tolist()
        low, high = bootstrap([group.kl.tolist()]) or (None, None)
        gain_low, gain_high = bootstrap([gains]) or (None, None)
        context = group.get("context_tokens", group.prompt_tokens)  # in older files all of it
        held = (group.entries_mean / (context * budget)).mean()
        rows.append(
            {
                "task": task,
                "method": method,
                "budget": budget,
                "budget_by": by,
                "n": len(group),
                **{name: every[name].mean() for name in ("score", "full_score") if name in every},
                "answers": every.score.count() if "score" in every else 0,
                "kl": group.kl.mean(),
                "kl_low": low,
                "kl_high": high,
                "kl_median": group.kl.median(),
                "top1": group.top1.mean(),
                "entries_mean": group.entries_mean.mean(),
                "entries_peak": group.entries_peak.mean(),
                "held_over_budget": held,
                "evictions": group.evictions.mean(),
                f"kl_less_{RIVAL}": np.mean(gains) if gains else None,
                f"kl_less_{RIVAL}_low": gain_low,
                f"kl_less_{RIVAL}_high": gain_high,
            }
        )
    return pd.DataFrame(rows).sort_values(["task", "budget", "kl"])


def tables(summary: pd.DataFrame) -> list[Table]:
    """One per data set: methods by rising divergence, at each budget."""
    found = []
    for task, group in summary.groupby("task", sort=True):
        frame = pd.DataFrame(
            {
                "budget": group.budget,
                "method": [_marked(row) for row in group.itertuples()],
                "KL": group.kl,
                "KL low": group.kl_low,
                "KL high": group.kl_high,
                "median": group.kl_median,
                "same token": group.top1,
                "KL - H2O": group[f"kl_less_{RIVAL}"],
                "KL - H2O low": group[f"kl_less_{RIVAL}_low"],
                "KL - H2O high": group[f"kl_less_{RIVAL}_high"],
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
            f" with its 95% interval. {OVER}"
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
    for how, group in scored.groupby(split[1].fillna("prompt")):
        columns = split[0][group.index]
        own = group.assign(column=columns)
        over = own.groupby("method").held_over_budget.mean() > 1 + TOLERANCE
        wide = own.pivot_table("score", "method", "column")
        wide.index = pd.Index([f"{name}{MARK if over[name] else ''}" for name in wide.index])
        full = own.groupby("column").full_score.first()
        wide = pd.concat([full.to_frame("full").T, wide])
        wide.insert(0, "mean", wide.mean(axis=1))
        frame = wide.sort_values("mean", ascending=False).rename_axis("method").reset_index()
        counts = ", ".join(f"{n}" for n in sorted(group.answers.unique()))
        budgets = ", ".join(f"{budget:g}" for budget in sorted(group.budget.unique()))
        title = "Own answers" + ("" if how == "prompt" else f", compress={how}")
        note = (
            f"Scores of own answers; budget {budgets} of what is compressed; n = {counts} a column."
            f" {OVER}"
        )
        found.append(Table(f"answers_{how}", title, frame, note))
    return found


def _marked(row: Any) -> str:
    return f"{row.method}{MARK if row.held_over_budget > 1 + TOLERANCE else ''}"


def draw(samples: pd.DataFrame, summary: pd.DataFrame, out: Path) -> list[Path]:
    """A figure of KL against memory for each data set, and one of KL against the source's place."""
    paths = []
    with plt.rc_context(RC):
        for task, group in _swept(summary).groupby("task", sort=True):
            figure, axes = panels(2, 4.4, 3.6)
            lengths = samples[samples.task == task].prompt_tokens.mean()
            for method, line in group.groupby("method", sort=False):
                _draw_method(axes, str(method), line.sort_values("budget"), lengths)
            for axis, what in zip(axes, ("mean, 95% interval", "median"), strict=True):
                axis.set(xscale="log", yscale="log", xlabel="entries held, of the prompt")
                axis.set_ylabel(f"KL to full, {what} (nats)")
                ticks = sorted(group.budget.unique())
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
                axis.xaxis.set_minor_formatter(lambda value, _: "")
            legend(figure, axes)
            figure.suptitle(f"{task}, n = {group.n.max()}", y=0.0, va="top")
            paths.append(_save(figure, out / f"fidelity_{task}.png"))
        if (path := _draw_sources(samples, out)) is not None:
            paths.append(path)
    return paths


def _draw_method(axes: Sequence[Any], method: str, line: pd.DataFrame, prompt: float) -> None:
    label, color, marker = style_of(method)
    style = {"color": color, "marker": marker, "ms": 4, "lw": 1, "label": label}
    at = line.entries_mean / prompt
    axes[0].plot(at, line.kl, **style)
    axes[0].vlines(at, line.kl_low, line.kl_high, color=color, lw=1, alpha=0.5)
    axes[1].plot(at, line.kl_median, **style)


def _draw_sources(samples: pd.DataFrame, out: Path) -> Path | None:
    """KL of each prompt by where the answer's longest match begins, in BUZZ's windows."""
    chosen = _sources(samples)
    tasks = sorted(chosen.task.unique())
    if not tasks:
        return None
    figure, axes = panels(len(tasks), 3.6, 3.2)
    for axis, task in zip(axes, tasks, strict=True):
        for method, group in chosen[chosen.task == task].groupby("method", sort=False):
            label, color, marker = style_of(str(method))
            style = {"color": color, "marker": marker, "s": 12, "alpha": 0.7, "label": label}
            axis.scatter(group.windows, group.kl, **style)
        axis.axvline(1, color="black", lw=0.7, ls=":")
        axis.set(xscale="log", yscale="log", title=task, ylabel="KL to full (nats)")
    figure.supxlabel("distance of the answer's source from the prompt's end, in BUZZ's windows")
    legend(figure, axes)
    return _save(figure, out / "sources.png")


def _swept(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of data sets that were measured at several budgets."""
    return frame[frame.groupby("task").budget.transform("nunique") > 1]


def _sources(samples: pd.DataFrame) -> pd.DataFrame:
    """Prompts whose answer has a source, and how far before the end, in BUZZ's windows."""
    chosen = _swept(samples)
    chosen = chosen[(chosen.budget == BUDGET) & chosen.kl.notna()]
    chosen = chosen[chosen.copied_distance.notna() & chosen.method.isin(CONTRASTED)]
    windows = [_window(tokens) for tokens in chosen.prompt_tokens]
    return chosen.assign(windows=chosen.copied_distance / windows)


def sources(samples: pd.DataFrame) -> list[Table]:
    """KL where an answer's longest match begins inside BUZZ's window, and where it does not."""
    chosen = _sources(samples)
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


def _window(prompt: int) -> int:
    policy, _ = Budget(BUDGET).policy(BuzzPolicy(), prompt)
    assert isinstance(policy, BuzzPolicy)
    return policy.window


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def shown(folders: Sequence[Path]) -> str:
    """The tables of some runs, as Markdown."""
    summary = summarize(collect(folders))
    return "\n".join(table.markdown() for table in tables(summary) + answers(summary))


def build(out: Path, pictures: Path, runs: Path | None = None) -> list[Path]:
    """Writes everything; of no `runs`, from the numbers that are in `out`.

    Returns:
        The figures.

    Raises:
        ConfigError: there are no numbers.
    """
    stored = out / SAMPLES
    if runs is not None:
        samples = collect(sorted(path.parent for path in runs.glob(f"*/{FORKS}")))
        out.mkdir(parents=True, exist_ok=True)
        compression = {"method": "gzip", "mtime": 0}  # equal numbers are equal files
        samples.to_csv(stored, index=False, float_format="%.5g", compression=compression)
    elif not stored.exists():
        raise ConfigError("out", str(out), f"has no {SAMPLES}; give runs=FOLDER")
    samples = pd.read_csv(stored, dtype={"sample": str})
    summary = summarize(samples)
    summary.to_csv(out / SUMMARY, index=False, float_format="%.5g")
    (out / "tables").mkdir(exist_ok=True)
    for table in tables(_swept(summary)) + answers(summary) + sources(samples):
        (out / "tables" / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    return draw(samples, summary, pictures)


def main(arguments: Sequence[str]) -> int:
    options = {"runs": "", "out": "results/embedded", "pictures": "docs/img"}
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise ConfigError(name, value, f"give NAME=FOLDER, NAME of {', '.join(options)}")
            options[name] = value
        out, pictures, runs = (Path(options[name]) for name in ("out", "pictures", "runs"))
        build(out, pictures, runs if options["runs"] else None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"fidelity: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
