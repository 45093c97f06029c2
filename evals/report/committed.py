"""Numbers that are committed: of every prompt, nobody's texts; with their tables and figures.

    python -m evals.report embedded runs=results/runs out=results/embedded  # of runs with kl=true
    python -m evals.report embedded                        # again, all that results/embedded has
    python -m evals.report embedded runs=results/more beside=results/embedded  # more prompts

Writes OUT/samples.csv.gz, OUT/environment.json, OUT/fidelity.csv, tables into OUT/tables and
figures into PICTURES (docs/img).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from buzz.errors import ConfigError
from evals.report.embedded import every, summarize
from evals.report.embedded_figures import draw
from evals.results.folder import SettingFolder
from evals.results.frame import REFERENCE, STORED, load, partner

OUT, PICTURES = Path("results/embedded"), Path("docs/img")
SAMPLES = "samples.csv.gz"
SAME = ["task", "sample", "budget", "budget_by"]  # of comparisons that are paired


def gather(out: Path, runs: Path, beside: Path | None = None) -> None:
    """The numbers of `runs`, and of `beside` before them, and their environments, into `out`.

    Raises:
        ConfigError: there are none, or runs beside each other compared with different answers.
    """
    rows = load(runs)
    full = partner(rows).score
    chosen = rows[rows.kl_to_full.notna() & (rows.row != REFERENCE)] if len(rows) else rows
    if chosen.empty:
        raise ConfigError("runs", str(runs), "no distance is there; run with kl=true first")
    named = chosen.group.where(chosen.group != "", chosen.task)
    if chosen.seed.nunique() > 1:
        named += "-seed-" + chosen.seed.astype(str)
    how = chosen.compress.str.replace(" ", "-").where(chosen.compress != "prompt", "")
    found = chosen.drop(columns="task").assign(
        task=named + how.map(lambda told: f"-{told}" if told else ""), full_score=full[chosen.index]
    )
    names = {column: name for name, column in STORED.items()}
    found = found.drop(columns="method").rename(columns={**names, "label": "method"})
    lasting = [
        *("task", "prompt_tokens", "context_tokens", "answer_tokens", "full_score", "method")
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
    return pd.read_csv(folder / SAMPLES, dtype={"sample": str})


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
    for table in every(rows, summary):
        (out / "tables" / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    return draw(rows, summary, spread, pictures)


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
