"""Tables of runs: scores, memory and speed, ablations, claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from evals.report.chosen import families
from evals.report.forms import NOT_RUN, Table, frame_of
from evals.report.kinds import kind
from evals.report.marks import (
    budget_text,
    growth,
    held,
    label,
    over_note,
    thins_only_the_prompt,
    varied,
)
from evals.report.methods import place
from evals.report.quality import mean_allocated
from evals.report.verdicts import PROCESSES, UNEQUAL, Judged
from evals.results.compare import REFERENCE, compare
from evals.results.equal_memory import MARK, TOLERANCE, held_over_budget
from evals.results.runs import Run, compression, length_bin, reference_of
from evals.results.schema import Record
from evals.tasks.base import Section

GROWTH = "growth"
MANY = 6  # runs up to which they are columns
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


def ordered(runs: Iterable[Run]) -> list[Run]:
    """By task, model, budget and method."""

    def key(run: Run) -> tuple[Any, ...]:
        sizes = [float(v) for v in run.parameters.values() if isinstance(v, int | float)]
        size = float(run.budget or 0), place(run.method), sizes
        return run.task, run.model, run.setting, *size, run.name

    return sorted(runs, key=key)


def _with_interval(name: str, value: Any, interval: Any) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {name: value, f"{name} low": low, f"{name} high": high}


def _head(run: Run, runs: Sequence[Run], share: float | None) -> dict[str, Any]:
    alike = [other for other in runs if other.setting == run.setting]
    return {
        "task": run.task,
        "model": run.model,
        "method": run.method,
        "settings": varied(run, alike),
        **({"compress": run.compress} if any(_split(other) for other in runs) else {}),
        "budget": budget_text(run, share),
    }


def _split(run: Run) -> bool:
    """Whether the context is compressed before its question is read."""
    return bool(compression(run.config))


def scores(name: str, title: str, runs: Sequence[Run], metrics: Sequence[str], text: str) -> Table:
    """One row per run: metrics with intervals, KV memory, difference to the full cache."""
    rows = []
    grows = any(map(thins_only_the_prompt, runs))
    for run in ordered(runs):
        row = _head(run, runs, held(run))
        if run.scored:
            full = reference_of(run, runs)
            row |= _with_interval("score", run.score(), run.score_interval())
            for metric in metrics:
                row |= _with_interval(metric, *run.metric(metric))
            row |= _difference(run, full)
            if any(other.fidelity for other in runs):
                row |= _with_interval("KL to full", *run.kl()) | {"KL n": run.kl_n}
            theirs = full.ran if full else []
            row |= _memory(run, run.ran)
            row |= {"KV / full": _quotient(run, "kv_nbytes_mean", run.ran, theirs)}
            row |= _budget(run, run.ran, grows)
        rows.append(row | {"n": len(run.ran), "status": run.status})
    return Table(name, title, frame_of(rows), _notes(text, _shares(runs), grows))


def _difference(run: Run, full: Run | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if full and run.method != REFERENCE and run.summary["statistic"] == "mean":
        found = compare(run.by_id, full.by_id, run.summary, {})
    ends = found.get("difference_ci95")
    return _with_interval("score - full", found.get("difference"), ends)


def _memory(run: Run, own: Sequence[Record]) -> dict[str, Any]:
    """KV bytes of samples: held, on average and at most, and allocated."""
    return {
        "KV MB": _scaled(run.mean("kv_nbytes_mean", own), 1e-6),
        "KV peak MB": max(record["kv_nbytes_peak"] for record in own) / 1e6,
        "KV allocated MB": _scaled(mean_allocated(own), 1e-6),
    }


def _budget(run: Run, own: Sequence[Record], grows: bool) -> dict[str, Any]:
    """What samples held over their budget; of methods whose cache grows, by how many entries."""
    return {"held / budget": held_over_budget(own)} | ({GROWTH: growth(run, own)} if grows else {})


Shares = Sequence[tuple[Run, float | None]]


def _shares(runs: Iterable[Run]) -> Shares:
    return [(run, held(run)) for run in runs]


def _notes(text: str, rows: Shares, grows: bool = False) -> str:
    """A table's note, with what its marks and columns of memory mean."""
    parts = [text]
    if any(share is not None for _, share in rows):
        parts.append("held / budget: the most entries, under budget_by=mean the mean.")
    if grows:
        parts.append(f"{GROWTH}: entries held at an answer's end beyond the budget.")
    return " ".join(filter(None, [*parts, over_note(rows)]))


def section(of: Section, runs: Sequence[Run]) -> Table:
    """The table of all tasks that name a section."""
    own = [run for run in runs if kind(run).section.name == of.name]
    if of.averages:
        return data_sets(of, own)
    return scores(of.name, of.title, own, of.columns, of.note)


def data_sets(of: Section, runs: Sequence[Run]) -> Table:
    """Data sets, the benchmark's own averages and memory in rows; of many runs, in columns."""
    assert of.averages is not None
    chosen = [run for run in ordered(runs) if run.scored]
    grows = any(map(thins_only_the_prompt, chosen))
    columns: dict[str, dict[str, float | None]] = {}
    for run in chosen:
        groups = dict.fromkeys(record["group"] for record in run.ran)
        means = {group: run.score([group]) for group in groups}
        for kinds, found in of.averages({k: v for k, v in means.items() if v is not None}).items():
            means |= {f"{kinds}: {name}": value for name, value in found.items()}
        cost = _memory(run, run.ran) | _budget(run, run.ran, grows)
        means |= {f"memory: {name}": value for name, value in cost.items()}
        name = label(run, chosen)  # runs of other samples or seeds may share it
        columns[name if name not in columns else f"{name} {run.name[-8:]}"] = means
    names = sorted(
        dict.fromkeys(name for column in columns.values() for name in column),
        key=lambda name: ":" in name,
    )
    if len(columns) > MANY:
        rows = [{"run": key} | {n: c.get(n, NOT_RUN) for n in names} for key, c in columns.items()]
    else:
        rows = [
            {"data set": n} | {key: c.get(n, NOT_RUN) for key, c in columns.items()} for n in names
        ]
    return Table(of.name, of.title, frame_of(rows), _notes(of.note, _shares(chosen), grows))


def costs(runs: Sequence[Run]) -> Table:
    """Memory and speed by prompt length: one row per method, budget and power of two of tokens."""
    rows, shown = [], []
    chosen = [r for r in ordered(runs) if r.scored and r.config["task"].get("tokens") is None]
    grows = any(map(thins_only_the_prompt, chosen))
    for run in chosen:
        full = reference_of(run, runs)
        full = full if full and full.machine == run.machine else None
        bins: dict[int, list[Record]] = {}
        for record in run.ran:
            bins.setdefault(length_bin(record["prompt_tokens"]), []).append(record)
        for tokens, records in bins.items():
            ids = {record["id"] for record in records}
            theirs = [record for record in full.ran if record["id"] in ids] if full else []
            share = held_over_budget(records)
            shown.append((run, share))
            row = {
                "model": run.model,
                "prompt tokens": tokens,
                **{k: v for k, v in _head(run, runs, share).items() if k not in ("model",)},
                "batch": records[0]["batch_size"],
                **_memory(run, records),
                "KV / full": _quotient(run, "kv_nbytes_mean", records, theirs),
                **_budget(run, records, grows),
                "memory peak MB": max(record["memory_peak_nbytes"] for record in records) / 1e6,
                "TTFT s": run.mean("ttft_s", records),
                **(_of_question(run, records) if any(map(_split, runs)) else {}),
                "decode tok/s": run.mean("decode_tokens_per_s", records),
                "tok/s / full": _quotient(run, "decode_tokens_per_s", records, theirs),
                "ITL p50 ms": run.mean("itl_p50_ms", records),
                "n": len(records),
                "machine": run.machine,
            }
            rows.append(row)
    rows.sort(key=lambda r: (r["model"], r["machine"], r["prompt tokens"], r["task"]))
    text = "Prompt lengths to the nearest power of two. Memory peak includes the model."
    note = _notes(text, shown, grows)
    return Table("costs", "Memory and speed by prompt length", frame_of(rows), note)


def _of_question(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """What of a prompt's cost comes with the question, where its context is compressed before."""
    found = {"question s": run.mean("question_s", records)}
    for part in ("context", "question"):
        peaks = [r[name] for r in records if (name := f"{part}_peak_nbytes") in r]
        found[f"{part} peak MB"] = _scaled(max(peaks, default=None), 1e-6)
    return found


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _quotient(run: Run, name: str, own: Sequence[Record], full: Sequence[Record]) -> float | None:
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
    text = (
        "Groups of runs that differ in nothing else. Local maxima: buzz by accumulated attention,"
        " buzz_fast by one step's, buzz_strided none. Without a budget, other sizes also hold other"
        " memory: read KV MB beside the score."
    )
    return Table("ablations", "Ablations", frame_of(rows), _notes(text, _shares(runs)))


def _rules(runs: Sequence[Run]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.scored and run.method.startswith("buzz"):
            shape = {k: v for k, v in run.parameters.items() if k != "history"}
            history = run.parameters.get("history", "strided")
            budget = (run.budget, run.config.get("budget_by"))
            key = f"{run.setting} {budget} {sorted(shape.items(), key=str)} {history}"
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
        "budget": budget_text(run, held(run)),
        "others": " ".join(f"{key}={parameters[key]}" for key in fixed if key in parameters),
        "value": str(value),
        "metric": run.summary["headline"],
        **_with_interval("score", run.score(), run.score_interval()),
        **_memory(run, run.ran),
        **_budget(run, run.ran, any(map(thins_only_the_prompt, family))),
        "n": len(run.ran),
    }


def claims(judged: Sequence[Judged]) -> Table:
    rows = []
    for one in judged:
        m = one.measured
        rows.append(
            {
                "claim": one.claim.statement,
                "number": one.claim.unit,
                "bar": one.claim.bar_text,
                **_with_interval("measured", m.value if m else NOT_RUN, m.interval if m else None),
                "n": m.n if m else 0,
                "processes": m.processes if m and m.processes is not None else "",
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
        " else, or too few samples. Intervals of scores count one more sample on either side, as"
        " far out as any seen; those of timings are over processes, of which a verdict needs"
        f" {PROCESSES}. {UNEQUAL}: bytes held, as measured, differ by more than {TOLERANCE:.0%};"
        " behind it the ratio. Memory is judged by the bytes that are allocated. Models below 1B"
        " parameters or of random weights speak for themselves alone. Only BUZZ with the paper's"
        " parameters counts, except for sensitivity."
    )
    if any(one.measured and MARK in one.measured.of for one in judged):
        note += f" {MARK} holds over {TOLERANCE:.0%} more than its budget."
    return Table("claims", "Claim by claim", frame_of(rows), note)


def overview(runs: Sequence[Run]) -> Table:
    """Every run, failed ones too."""
    rows = [
        _head(run, runs, held(run))
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
    return Table("runs", "Runs", frame_of(rows), over_note(_shares(runs)))
