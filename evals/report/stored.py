"""Numbers on file that are no runs: what `make bench` measured, what results/embedded holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report.forms import Table, frame_of

# Columns of the benchmark's files: name here, unit. Files of other days have not all of them.
MEASURED = {
    "prefill_s": ("prefill s", 1),
    "prefill_s_spread": ("prefill spread", 1),
    "peak_bytes": ("peak MB", 1e-6),
    "kv_bytes": ("KV MB", 1e-6),
    "kv_allocated_bytes": ("KV allocated MB", 1e-6),
    "decode_ms": ("decode ms/step", 1),
    "decode_ms_spread": ("decode spread", 1),
    "tokens_per_s": ("tokens/s", 1),
    "eviction_share": ("eviction % of decode", 100),
}
RATIOS = (("prefill_s", "stock"), ("peak_bytes", "stock"), ("decode_ms", "stock"))
RATIOS += (("decode_ms", "full"),)
FIDELITY = {  # columns of results/embedded/fidelity.csv
    "task": "data set",
    "budget": "budget",
    "method": "method",
    "kl": "KL",
    "kl_low": "KL low",
    "kl_high": "KL high",
    "kl_median": "median",
    "top1": "same token",
    "kl_less_h2o": "KL - h2o",
    "kl_less_h2o_low": "KL - h2o low",
    "kl_less_h2o_high": "KL - h2o high",
    "held_over_budget": "held / budget",
    "evictions": "evictions",
    "n": "n",
}


def benchmarks(folder: Path) -> list[Table]:
    """Every CSV of scripts/bench.py, with ratios between rows of one prompt and batch."""
    return [_benchmark(path) for path in sorted(folder.glob("*.csv"))]


def _benchmark(path: Path) -> Table:
    measured = pd.read_csv(path).astype(object)
    lines = [row.dropna().to_dict() for _, row in measured.iterrows()]
    about = path.with_suffix(".json")
    setting = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    device = setting.get("device", path.stem)
    what = path.stem.removeprefix(re.sub("[^a-z0-9]", "-", device.lower())).strip("-")
    return Table(
        f"bench_{path.stem}",
        f"Benchmark: {device}{f', {what}' if what else ''}",
        frame_of(_benchmark_row(line, lines) for line in lines),
        "Medians over repeats; spread: largest over smallest. stock: transformers' own cache; full:"
        f" this project's. {_told(setting)}".strip(),
    )


def _benchmark_row(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    batch = int(line["batch"]) if "batch" in line else line.get("asked_batch")
    row = {"prompt tokens": line["prompt"], "batch": batch, "method": line["method"]}
    for key, (name, scale) in MEASURED.items():
        row[name] = line[key] * scale if key in line else None
        for _, beside in (pair for pair in RATIOS if pair[0] == key):
            other = _other(line, lines, beside)
            known = key in line and key in other
            row[f"{name.split()[0]} / {beside}"] = line[key] / other[key] if known else None
    return row | {"failed": line.get("failed", "")}


def _other(line: dict[str, Any], lines: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """A method's row of the same prompt and batch; empty if there is none."""
    same = [one for one in lines if all(one.get(k) == line.get(k) for k in ("prompt", "batch"))]
    return next((one for one in same if one["method"] == method), {})


def _told(setting: dict[str, Any]) -> str:
    told = ("threads", "torch", "transformers", "model", "dtype", "new_tokens", "repeats")
    known = [f"{key} {setting[key]}" for key in told if setting.get(key) is not None]
    return f"{', '.join(known)}." if known else ""


def evidence(folder: Path) -> list[Table]:
    """What eviction costs on the embedded model, as committed; nothing where there is no file."""
    path = folder / "fidelity.csv"
    if not path.exists():
        return []
    measured = pd.read_csv(path)
    chosen = measured[list(FIDELITY)].rename(columns=FIDELITY)
    note = (
        "Divergence of the next-token distribution from the full cache's, nats a token, while both"
        " read the full cache's answers, with 95% bootstrap intervals over prompts; KL - h2o: over"
        " the same prompts. docs/results.md says how it is made."
    )
    title = "SmolLM2-135M: distance to the full cache"
    return [Table("embedded_fidelity", title, chosen, note)]
