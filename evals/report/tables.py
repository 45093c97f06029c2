"""Tables of runs, and what they look like as Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report.claims import Judged, families
from evals.report.runs import (
    REFERENCE,
    Run,
    bootstrap,
    length_bin,
    pairs,
    reference_of,
    settings_text,
)
from evals.tasks.longbench import averages

NOT_RUN, NOT_PUBLISHED = "not run", "not published here"
# The order of methods; any other comes last.
METHODS = (
    "full",
    "local",
    "streaming_llm",
    "h2o",
    "tova",
    "snapkv",
    "buzz",
    "buzz_strided",
    "buzz_fast",
)
LONG = 45  # characters of a cell that may wrap
FACTORS = {
    "history": "How old history is thinned",
    "compact": "One eviction per step, or until it fits",
    "stride": "Stride",
    "window": "Window",
    "sink": "Sink",
    "threshold": "Threshold",
    "positions": "Positions of kept entries",
    "logn_base": "log n scaling",
    "logn_clamp": "log n scaling, never below 1",
}


@dataclass(frozen=True)
class Table:
    """A table of raw values; `X low` and `X high` are the ends of the 95% interval of column X.

    Attributes:
        name: the files' stem.
        note: what a reader must know.
    """

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""

    def shown(self) -> pd.DataFrame:
        """The frame as text, with intervals behind their values."""
        if self.frame.empty:
            return pd.DataFrame({"": [NOT_RUN]})
        columns = {}
        for name in self.frame.columns:
            if name.endswith((" low", " high")):
                continue
            values = [text(value) for value in self.frame[name]]
            if f"{name} low" in self.frame:
                ends = zip(self.frame[f"{name} low"], self.frame[f"{name} high"], strict=True)
                values = [
                    value if pd.isna(low) else f"{value} [{text(low)}, {text(high)}]"
                    for value, (low, high) in zip(values, ends, strict=True)
                ]
            columns[name] = values
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        if len(self.sources) == 1:
            del shown["source"]
        return pd.DataFrame(shown)

    @property
    def sources(self) -> list[str]:
        """What the column `source` says, if there is one."""
        return list(dict.fromkeys(self.frame["source"])) if "source" in self.frame else []

    @property
    def notes(self) -> str:
        """The note, and the source where there is a single one."""
        single = self.sources if len(self.sources) == 1 else []
        return " ".join([self.note, *(f"Source: {source}." for source in single)]).strip()

    def markdown(self) -> str:
        shown = self.shown()

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"

        rows = [line(shown.columns), "|" + " --- |" * len(shown.columns)]
        rows += [line(row) for row in shown.itertuples(index=False)]
        return (
            f"## {self.title}\n\n"
            + "\n".join(rows)
            + (f"\n\n{self.notes}\n" if self.notes else "\n")
        )

    def latex(self) -> str:
        """A booktabs table."""
        shown = self.shown()
        body = [" & ".join(map(_latex, row)) + r" \\" for row in shown.itertuples(index=False)]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_latex(self.title)}. {_latex(self.notes)}}}",
                rf"\begin{{tabular}}{{{'l' * len(shown.columns)}}}",
                r"\toprule",
                " & ".join(map(_latex, shown.columns)) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        shown = self.shown()

        def row(cells: Iterable[str], tag: str) -> str:
            kinds = (f"{tag} class=long" if len(c) > LONG else tag for c in cells)
            filled = zip(kinds, cells, strict=True)
            return "<tr>" + "".join(f"<{k}>{html.escape(c)}</{tag}>" for k, c in filled) + "</tr>"

        body = "".join(row(cells, "td") for cells in shown.itertuples(index=False))
        return f"<table><thead>{row(shown.columns, 'th')}</thead><tbody>{body}</tbody></table>"

    def write(self, folder: Path) -> None:
        """NAME.md, NAME.tex and NAME.csv (raw values)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        self.frame.to_csv(folder / f"{self.name}.csv", index=False)


def text(value: Any) -> str:
    """A cell: numbers to about three digits, nothing as a dash."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        size = abs(value)
        form = (
            ".3f"
            if size < 10
            else ".2f"
            if size < 100
            else ".1f"
            if size < 1000
            else ",.0f"
            if size < 1e6
            else ".3g"
        )
        return format(value, form)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _latex(value: str) -> str:
    escapes = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
    return "".join(escapes.get(c, c) for c in value)


def ordered(runs: Iterable[Run]) -> list[Run]:
    """By task, model, budget and method."""

    def key(run: Run) -> tuple[Any, ...]:
        place = METHODS.index(run.method) if run.method in METHODS else len(METHODS)
        sizes = [float(v) for v in run.parameters.values() if isinstance(v, int | float)]
        return (run.task, run.model, run.setting, float(run.budget or 0), place, sizes, run.name)

    return sorted(runs, key=key)


def _with_interval(name: str, value: Any, interval: Any) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {name: value, f"{name} low": low, f"{name} high": high}


def budget_text(run: Run) -> str | float:
    """A run's budget; a method without one has sizes of its own, the full cache has none."""
    return "-" if run.method == REFERENCE else "own" if run.budget is None else run.budget


def _head(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    alike = [other for other in runs if other.setting == run.setting]
    return {
        "task": run.task,
        "model": run.model,
        "method": run.method,
        "settings": settings_text(run, alike),
        "budget": budget_text(run),
    }


def scores(name: str, title: str, runs: Sequence[Run], metrics: Sequence[str], note: str) -> Table:
    """One row per run: metrics with intervals, KV memory, difference to the full cache."""
    rows = []
    for run in ordered(runs):
        row = _head(run, runs)
        if run.scored:
            full = reference_of(run, runs)
            row |= _with_interval("score", run.score(), run.score_interval())
            for metric in metrics:
                row |= _with_interval(metric, *run.metric(metric))
            row |= _difference(run, full)
            if any(other.fidelity for other in runs):
                row |= _with_interval("KL to full", *run.kl()) | {"KL n": run.kl_n}
            row |= _memory(run, full)
        rows.append(row | {"n": len(run.ran), "status": run.status})
    return Table(name, title, pd.DataFrame(rows), note)


def _difference(run: Run, full: Run | None) -> dict[str, Any]:
    if full is None or run.method == REFERENCE or run.summary["statistic"] != "mean":
        return _with_interval("score - full", None, None)
    headline = run.summary["headline"]
    groups = list(pairs(run, full, lambda r: [r["scores"][headline]]).values())
    if not groups:
        return _with_interval("score - full", None, None)
    means = [[sum(c) / len(c) for c in zip(*group, strict=True)] for group in groups]
    value = sum(own - theirs for own, theirs in means) / len(means)
    return _with_interval("score - full", value, bootstrap(groups, lambda m: m[:, 0] - m[:, 1]))


def _memory(run: Run, full: Run | None) -> dict[str, Any]:
    own = run.mean("kv_nbytes_mean")
    theirs = full.mean("kv_nbytes_mean") if full else None
    return {
        "KV MB": own / 1e6 if own is not None else None,
        "KV peak MB": max(record["kv_nbytes_peak"] for record in run.ran) / 1e6,
        "KV / full": own / theirs if own is not None and theirs else None,
    }


def summarization(runs: Sequence[Run]) -> Table:
    return scores(
        "summarization",
        "Summaries of news: CNN/DailyMail and XSUM",
        [run for run in runs if run.task in ("cnn_dailymail", "xsum")],
        ("rouge1", "rouge2", "rougeL", "pkg_rougeL"),
        "ROUGE F-measure, 0 to 100; rouge1, rouge2, rougeL by rouge-score with stemming, pkg_rougeL"
        " by the package rouge. Intervals: 95% bootstrap over samples.",
    )


def qa(runs: Sequence[Run]) -> Table:
    return scores(
        "nq10",
        "Questions over ten documents (10-QA)",
        [run for run in runs if run.task == "nq10"],
        ("best_subspan", "exact_match", "f1", "strict_match"),
        "Shares from 0 to 1. best_subspan is the data's owners' metric, strict_match BUZZ's.",
    )


def perplexity(runs: Sequence[Run]) -> Table:
    return scores(
        "wikitext",
        "Wikitext perplexity",
        [run for run in runs if run.task == "wikitext"],
        ("token_perplexity", "word_perplexity"),
        "Lower is better. Intervals of the score: bootstrap over the text's blocks.",
    )


def retrieval(runs: Sequence[Run]) -> Table:
    return scores(
        "other_tasks",
        "Passkeys and other tasks",
        [run for run in runs if run.task not in KNOWN],
        (),
        "An interval of no width means that every sample scored the same, not certainty. KL to"
        " full: divergence, in nats a token, of the next-token distribution from the full cache's,"
        " on the full cache's own answers.",
    )


KNOWN = ("cnn_dailymail", "xsum", "nq10", "wikitext", "longbench")


def longbench(runs: Sequence[Run]) -> Table:
    """Data sets in rows, runs in columns; then the benchmark's own averages."""
    chosen = [run for run in ordered(runs) if run.task == "longbench" and run.scored]
    columns: dict[str, dict[str, float | None]] = {}
    for run in chosen:
        groups = dict.fromkeys(record["group"] for record in run.ran)
        means = {group: run.score([group]) for group in groups}
        for kind, found in averages({k: v for k, v in means.items() if v is not None}).items():
            means |= {f"{kind}: {name}": value for name, value in found.items()}
        name = label(run, chosen)  # runs of other samples or seeds may share it
        columns[name if name not in columns else f"{name} {run.name[-8:]}"] = means
    names = sorted(
        dict.fromkeys(name for column in columns.values() for name in column),
        key=lambda name: ":" in name,
    )
    frame = pd.DataFrame(
        [{"data set": n} | {key: c.get(n, NOT_RUN) for key, c in columns.items()} for n in names]
    )
    note = "Scores 0 to 100 by the benchmark's own metrics; averages as in its own tables."
    return Table("longbench", "LongBench", frame, note)


def label(run: Run, runs: Sequence[Run]) -> str:
    """A run's method, budget and what else tells it from `runs`."""
    parts = [run.method]
    if run.budget is not None:
        parts.append(f"@{run.budget}")
    parts.append(settings_text(run, [other for other in runs if other.setting == run.setting]))
    if len({other.model for other in runs}) > 1:
        parts.append(f"({run.model})")
    return " ".join(filter(None, parts))


def costs(runs: Sequence[Run]) -> Table:
    """Memory and speed by prompt length: one row per method, budget and power of two of tokens."""
    rows = []
    for run in (
        run for run in ordered(runs) if run.scored and run.config["task"].get("tokens") is None
    ):
        full = reference_of(run, runs)
        full = full if full and full.machine == run.machine else None
        bins: dict[int, list[dict[str, Any]]] = {}
        for record in run.ran:
            bins.setdefault(length_bin(record["prompt_tokens"]), []).append(record)
        for tokens, records in bins.items():
            ids = {record["id"] for record in records}
            theirs = [record for record in full.ran if record["id"] in ids] if full else []
            row = {
                "model": run.model,
                "prompt tokens": tokens,
                **{k: v for k, v in _head(run, runs).items() if k not in ("model",)},
                "batch": records[0]["batch_size"],
                "KV MB": _scaled(run.mean("kv_nbytes_mean", records), 1e-6),
                "KV peak MB": max(record["kv_nbytes_peak"] for record in records) / 1e6,
                "KV / full": _quotient(run, "kv_nbytes_mean", records, theirs),
                "memory peak MB": max(record["memory_peak_nbytes"] for record in records) / 1e6,
                "TTFT s": run.mean("ttft_s", records),
                "decode tok/s": run.mean("decode_tokens_per_s", records),
                "tok/s / full": _quotient(run, "decode_tokens_per_s", records, theirs),
                "ITL p50 ms": run.mean("itl_p50_ms", records),
                "n": len(records),
                "machine": run.machine,
            }
            rows.append(row)
    rows.sort(key=lambda r: (r["model"], r["machine"], r["prompt tokens"], r["task"]))
    note = "Prompt lengths to the nearest power of two. Memory peak includes the model."
    return Table("costs", "Memory and speed by prompt length", pd.DataFrame(rows), note)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _quotient(
    run: Run, name: str, own: list[dict[str, Any]], full: list[dict[str, Any]]
) -> float | None:
    mine, theirs = run.mean(name, own), run.mean(name, full)
    return mine / theirs if mine is not None and theirs else None


def ablations(runs: Sequence[Run]) -> Table:
    """Score rules beside each other, then every parameter that was varied alone."""
    rows = []
    for same in _rules(runs):
        rows += [_ablation("local maxima", run.method, run, same) for run in ordered(same)]
    for factor, title in FACTORS.items():
        for family in families(runs, factor):
            rows += [_ablation(title, run.parameters[factor], run, family) for run in family]
    note = (
        "Groups of runs that differ in nothing else. Local maxima: buzz by accumulated attention,"
        " buzz_fast by one step's, buzz_strided none. Without a budget, other sizes also hold other"
        " memory: read KV MB beside the score."
    )
    return Table("ablations", "Ablations", pd.DataFrame(rows), note)


def _rules(runs: Sequence[Run]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.scored and run.method.startswith("buzz"):
            shape = {k: v for k, v in run.parameters.items() if k != "history"}
            history = run.parameters.get("history", "strided")
            key = f"{run.setting} {run.budget} {sorted(shape.items(), key=str)} {history}"
            found.setdefault(key, []).append(run)
    return [group for group in found.values() if len({run.method for run in group}) > 1]


def _ablation(factor: str, value: Any, run: Run, family: Sequence[Run]) -> dict[str, Any]:
    fixed = [key for key in ("sink", "window", "stride", "threshold") if FACTORS[key] != factor]
    parameters = run.parameters
    return {
        "factor": factor,
        "task": run.task,
        "model": run.model,
        "method": run.method,
        "budget": budget_text(run),
        "others": " ".join(f"{key}={parameters[key]}" for key in fixed if key in parameters),
        "value": str(value),
        "metric": run.summary["headline"],
        **_with_interval("score", run.score(), run.score_interval()),
        "KV MB": _scaled(run.mean("kv_nbytes_mean"), 1e-6),
        "n": len(run.ran),
    }


def claims(judged: Sequence[Judged]) -> Table:
    rows = []
    for one in judged:
        m = one.measured
        sign = "≥" if one.claim.at_least else "≤"
        rows.append(
            {
                "claim": one.claim.statement,
                "number": one.claim.unit,
                "bar": f"{sign} {one.claim.bar:g}",
                **_with_interval("measured", m.value if m else NOT_RUN, m.interval if m else None),
                "n": m.n if m else 0,
                "of": m.of if m else "",
                "model": m.model if m else "",
                "machine": m.machine if m else "",
                "verdict": one.verdict,
                "source of the claim": one.claim.source,
            }
        )
    note = (
        "holds: the whole 95% interval is on the right side of the bar (and quality is kept, where"
        " the claim says so); does not hold: it is wholly on the other side; undecided: anything"
        " else, or too few samples. Only BUZZ with the paper's parameters counts, except for"
        " sensitivity."
    )
    return Table("claims", "Claim by claim", pd.DataFrame(rows), note)


def overview(runs: Sequence[Run]) -> Table:
    """Every run, failed ones too."""
    rows = [
        _head(run, runs)
        | {
            "seed": run.config["seed"],
            "n": len(run.ran),
            "status": run.status,
            "notes": "; ".join(run.notes),
            "machine": run.machine,
            "revision": str(run.environment.get("git_revision") or "-")[:12],
            "folder": run.name,
        }
        for run in ordered(runs)
    ]
    return Table("runs", "Runs", pd.DataFrame(rows))


OWN: tuple[Callable[[Sequence[Run]], Table], ...] = (
    summarization,
    qa,
    perplexity,
    longbench,
    retrieval,
    costs,
    ablations,
)
