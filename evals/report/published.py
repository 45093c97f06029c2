"""Published numbers (results/paper/*.csv, each with its source) beside those measured here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report.forms import NOT_PUBLISHED, NOT_RUN, Table, frame_of
from evals.report.marks import held, mark, over_note
from evals.results.runs import Run
from evals.tasks.longbench import averages

# A model as publications call it: how its checkpoint's name ends.
CHECKPOINTS = {
    "Llama2-7B-chat-4k": "llama-2-7b-chat-hf",
    "Llama-2-7B": "llama-2-7b-hf",
    "Llama-2-13B": "llama-2-13b-hf",
    "Llama-3-8B": "meta-llama-3-8b",
    "Llama-3-8B-Instruct": "meta-llama-3-8b-instruct",
    "Mistral-7B-Instruct-v0.2": "mistral-7b-instruct-v0.2",
    "Qwen2-7B-Instruct": "qwen2-7b-instruct",
    "InternLM2.5-7B-1M": "internlm2_5-7b-chat-1m",
}
AVERAGES = {"average_en": "English", "average_zh": "Chinese"}
CHAT = "Llama2-7B-chat-4k"


def tables(runs: Sequence[Run], folder: Path) -> list[Table]:
    """Every published table, with what was measured of it and the difference."""
    return [
        longbench(runs, _read(folder / "longbench_llama2_7b_chat_4k.csv"), _kernels(folder)),
        h2o_xsum(runs, _read(folder / "h2o_xsum_rouge2.csv")),
        other_means(runs, _read(folder / "longbench_means_other_models.csv")),
        headlines(_read(folder / "headlines.csv")),
    ]


def is_model(run: Run, published: str) -> bool:
    """Whether a run's checkpoint is the one that a publication names."""
    name = str(run.config["model"].get("name_or_path") or "").rstrip("/").lower()
    return name.rpartition("/")[2] == CHECKPOINTS[published]


def longbench(runs: Sequence[Run], published: pd.DataFrame, kernels: pd.DataFrame) -> Table:
    """The benchmark's own row of the full cache; BUZZ's has not been found."""
    of = [r for r in runs if r.task == "longbench" and r.scored and is_model(r, CHAT)]
    full = _only(of, "full")
    buzz = _only(of, "buzz")
    rows = []
    for line in published.itertuples(index=False):
        name = line.dataset
        rerun = [kernels[name].iloc[i] for i in range(len(kernels))] if name in kernels else []
        rows.append(
            {"data set": name, "metric": line.metric}
            | _beside("full cache", line.score, _score(full, name))
            | {"others' reruns": " / ".join(f"{value:.2f}" for value in rerun) or "-"}
            | _beside(f"BUZZ{_mark(buzz)}", None, _score(buzz, name))
            | {"n": _count(full, name), "source": line.source}
        )
    text = (
        "Llama2-7B-chat, prompts cut to 3,500 tokens. Others' reruns: flash attention / SDPA, cache"
        " method not stated there; they show how far such numbers move: up to 3 points a set, 9 on"
        " code, 6 on TriviaQA, 2 in the mean."
    )
    title = "LongBench, published and measured"
    return Table("published_longbench", title, frame_of(rows), _note(text, [buzz]))


def h2o_xsum(runs: Sequence[Run], published: pd.DataFrame) -> Table:
    """ROUGE-2 on XSUM by entries held."""
    rows, shown = [], []
    for line in published.itertuples(index=False):
        found = [r for r in runs if r.task == "xsum" and r.scored and is_model(r, line.model)]
        if line.kv_entries == "full":
            run = _only(found, "full")
        else:
            run = _only([r for r in found if r.budget == int(line.kv_entries)], "h2o")
        value = None if run is None else run.metric("rouge2")[0]
        shown.append(run)
        rows.append(
            {"model": line.model, "KV entries": f"{line.kv_entries}{_mark(run)}"}
            | _beside("ROUGE-2", 100 * line.rouge2, value)
            | {"n": len(run.ran) if run else 0, "source": line.source}
        )
    text = "H2O, half heavy and half recent. Published as shares, here times 100."
    title = "H2O on XSUM, published and measured"
    return Table("published_h2o_xsum", title, frame_of(rows), _note(text, shown))


def other_means(runs: Sequence[Run], published: pd.DataFrame) -> Table:
    """LongBench means of other models, at 6.9% of the prompt."""
    rows, shown = [], []
    for line in published.to_dict("records"):
        for method in ("full", "streaming_llm", "h2o", "buzz"):
            found = [r for r in runs if r.task == "longbench" and r.scored]
            found = [r for r in found if is_model(r, line["model"])]
            run = _only([r for r in found if r.budget == 0.069 or r.method == "full"], method)
            shown.append(run)
            rows.append(
                {"model": line["model"], "method": f"{method}{_mark(run)}"}
                | _beside("mean", line.get(method), _score(run, "overall"))
                | {"n": len(run.ran) if run else 0, "source": line["source"]}
            )
    text = "Compare the order of methods, not the numbers. Measured at budget=0.069."
    title = "LongBench means of other models, published and measured"
    return Table("published_other_models", title, frame_of(rows), _note(text, shown))


def headlines(published: pd.DataFrame) -> Table:
    note = "BUZZ's are judged in the table of claims; the others' are against other baselines."
    return Table("published_headlines", "Published headlines", published, note)


def _mark(run: Run | None) -> str:
    return "" if run is None else mark(run)


def _note(text: str, runs: Iterable[Run | None]) -> str:
    over = over_note((run, held(run)) for run in runs if run is not None)
    return " ".join(filter(None, [text, over]))


def _beside(name: str, published: float | None, measured: float | None) -> dict[str, Any]:
    known = published is not None and measured is not None
    return {
        f"{name} published": NOT_PUBLISHED if published is None else float(published),
        f"{name} measured": NOT_RUN if measured is None else measured,
        f"{name} difference": measured - published if known else None,
    }


def _score(run: Run | None, name: str) -> float | None:
    """Of a LongBench data set, or one of the benchmark's averages."""
    if run is None:
        return None
    means = {group: run.score([group]) for group in {record["group"] for record in run.ran}}
    known = {group: value for group, value in means.items() if value is not None}
    return (known | averages(known)["average"]).get(AVERAGES.get(name, name))


def _count(run: Run | None, name: str) -> int:
    return 0 if run is None else sum(record["group"] == name for record in run.ran)


def _only(runs: Sequence[Run], method: str) -> Run | None:
    """The method's run with the most samples."""
    found = [run for run in runs if run.method == method]
    return max(found, key=lambda run: len(run.ran), default=None)


def _kernels(folder: Path) -> pd.DataFrame:
    return _read(folder / "longbench_llama2_7b_rerun_by_kernel.csv")


def _read(path: Path) -> pd.DataFrame:
    """A CSV whose `source` says `same` where it is that of the line above."""
    frame = pd.read_csv(path)
    for column in {"source", "setting"}.intersection(frame.columns):
        frame[column] = frame[column].where(frame[column] != "same").ffill()
    return frame
