"""Tables of stored numbers: published ones, the old benchmark's, the embedded model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report.table import Table
from evals.report.views import SPEC, flat, settings
from evals.results.frame import NOT_RUN, REFERENCE, estimate
from evals.tasks.longbench import averages

AVERAGES = {"average_en": "English", "average_zh": "Chinese"}

RATIOS = (("prefill_s", "stock"), ("peak_bytes", "stock"), ("decode_ms", "stock"))
RATIOS += (("decode_ms", "full"),)
TOLD = ("device", "threads", "torch", "transformers", "model", "dtype", "new_tokens", "repeats")


def benchmarks(folder: Path) -> Iterator[Table]:
    """A table for each CSV of the benchmark, with ratios of methods at equal prompt and batch."""
    for path in sorted(folder.glob("*.csv")):
        lines = pd.read_csv(path)
        same = [name for name in ("prompt", "batch") if name in lines]
        for name, beside in RATIOS:
            if name in lines:
                other = lines[lines.method == beside].drop_duplicates(same)
                of = lines[same].merge(other[[*same, name]], on=same, how="left")[name]
                place = lines.columns.get_loc(name) + 1
                lines.insert(place, f"{name.split('_')[0]} / {beside}", lines[name] / of.to_numpy())
        about = path.with_suffix(".json")
        told = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        known = [f"{key} {told[key]}" for key in TOLD if told.get(key) is not None]
        note = "Medians over repeats; stock: transformers' own cache; full: this project's. "
        title = f"Benchmark: {path.stem}"
        yield Table(f"bench_{path.stem}", title, lines.astype(object), note + ", ".join(known))


def published(folder: Path, rows: pd.DataFrame) -> Iterator[Table]:
    """Published numbers with their sources, beside measured ones of the same model."""
    for stem, told in SPEC["published"].items():
        if not (path := folder / f"{stem}.csv").exists():
            continue
        lines = pd.read_csv(path)
        for column in {"source", "setting"}.intersection(lines):
            lines[column] = lines[column].where(lines[column] != "same").ffill()
        own = rows[rows.task == told.get("task")]
        for name, method in told.get("beside", {}).items():
            found = [_measured(own, told, method, line) for line in lines.to_dict("records")]
            place = lines.columns.get_loc(name) + 1
            shown = [NOT_RUN if value is None else value for value in found]
            lines.insert(place, f"{name} measured", pd.Series(shown, dtype=object))
            known = pd.Series(found, dtype=float) - told.get("scale", 1) * lines[name]
            lines.insert(place + 1, f"{name} difference", known)
        yield Table(f"published_{stem}", told["title"], lines.astype(object), told.get("note", ""))


def _measured(
    rows: pd.DataFrame, told: dict[str, Any], method: str, line: dict[str, Any]
) -> float | None:
    """The measured number of the method's row with the most samples; None if it was not run."""
    entries, group = (line.get(told.get(key)) for key in ("entries", "group"))
    method = REFERENCE if entries == REFERENCE else method
    own = rows[(rows.status == "ok") & (rows.label == method)]
    if method != REFERENCE:
        own = own[own.budget == (int(entries) if entries else told["budget"])]
    ending = SPEC["checkpoints"].get(line.get("model", told.get("model")))
    paths = own.model_settings.map(lambda one: str((one or {}).get("name_or_path", "")).lower())
    own = own[paths.astype(str).str.rstrip("/").str.endswith(f"/{ending}")]
    if own.empty:
        return None
    part = max(flat(settings(own)), key=len)
    if group in AVERAGES:
        means = {name: estimate(one).value or 0.0 for name, one in part.groupby("group")}
        return averages(means)["average"].get(AVERAGES[group]) if means else None
    return estimate(part[part.group == group] if group else part, told["metric"]).value


def evidence(folder: Path) -> Iterator[Table]:
    """The committed distances of the embedded model to the full cache."""
    if (path := folder / "fidelity.csv").exists():
        lines = pd.read_csv(path).rename(
            columns=lambda name: name.replace("_low", " low").replace("_high", " high")
        )
        note = (
            "KL divergence of the next-token distribution from the full cache's in nats per token,"
            " on the full cache's answers, with 95% bootstrap intervals over prompts."
        )
        yield Table("embedded_fidelity", "SmolLM2-135M: distance to the full cache", lines, note)
