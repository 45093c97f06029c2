"""What eviction costs on one model: divergence from the full cache, by data set, method and budget.

    python -m evals.report.fidelity runs=results/fidelity  # of what +experiment=fidelity wrote
    python -m evals.report.fidelity                        # again, all that results/embedded has
    python -m evals.report.fidelity runs=results/more beside=results/embedded  # more prompts

Writes OUT/samples.csv.gz (numbers of every prompt, nobody's texts), OUT/environment.json,
OUT/fidelity.csv, tables into OUT/tables and figures into PICTURES (docs/img). Runs of other methods
or prompts may lie beside each other, and `beside` earlier numbers: they are put together, prompt by
prompt, where the full cache's answers are the same.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from buzz.errors import ConfigError
from evals.report import fidelity_tables as tables
from evals.report.fidelity_figures import draw
from evals.report.methods import RIVAL
from evals.results.records import RunFolder
from evals.results.runs import compression
from evals.results.statistics import bootstrap

FORKS, SAMPLES, SUMMARY = "forks.jsonl", "samples.csv.gz", "fidelity.csv"
OUT, PICTURES = Path("results/embedded"), Path("docs/img")
SAME = ["task", "sample", "budget", "budget_by"]  # of comparisons that are paired


def collect(folders: Sequence[Path], earlier: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every comparison of some runs: a row for each prompt, method and budget.

    Args:
        earlier: numbers to put them beside; what was measured again takes the place of these.

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
    frame = pd.concat([*([] if earlier is None else [earlier]), pd.DataFrame(rows)])
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
                **_answers(every),
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
                f"nearer_than_{RIVAL}": np.mean(np.less(gains, 0)) if gains else None,
            }
        )
    return pd.DataFrame(rows).sort_values(["task", "budget", "kl"])


def _answers(samples: pd.DataFrame) -> dict[str, Any]:
    """How many answers were scored, and their score as a part of the full cache's."""
    known = ["score", "full_score"]
    pairs = samples.reindex(columns=known).dropna().to_numpy()
    found: dict[str, Any] = {"answers": len(pairs), "of_full": None}
    ends = (
        bootstrap([pairs], of=lambda means: means[..., 0] / means[..., 1]) if len(pairs) else None
    )
    if ends:  # the full cache scores in every resample
        found["of_full"] = float(np.divide(*pairs.mean(axis=0)))
    return found | dict(zip(("of_full_low", "of_full_high"), ends or (None, None), strict=True))


def shown(folders: Sequence[Path]) -> str:
    """The tables of some runs, as Markdown."""
    summary = summarize(collect(folders))
    found = tables.divergence(summary) + tables.answers(summary)
    return "\n".join(table.markdown() for table in found)


def gather(out: Path, runs: Path, beside: Path | None = None) -> None:
    """The numbers of `runs`, and of `beside` before them, and their environments, into `out`.

    Raises:
        ConfigError: there are none.
    """
    folders = sorted(path.parent for path in runs.glob(f"*/{FORKS}"))
    samples = collect(folders, None if beside is None else stored(beside, "beside"))
    known = [
        RunFolder(folder).environments() for folder in [*([beside] if beside else []), *folders]
    ]
    out.mkdir(parents=True, exist_ok=True)
    same = {"method": "gzip", "mtime": 0}  # equal numbers are equal files
    samples.to_csv(out / SAMPLES, index=False, float_format="%.5g", compression=same)
    RunFolder(out).write("environment.json", list(dict(ChainMap(*known)).values()))


def stored(folder: Path, field: str = "out") -> pd.DataFrame:
    """The numbers that a folder has."""
    if not (folder / SAMPLES).exists():
        raise ConfigError(field, str(folder), f"has no {SAMPLES}; give runs=FOLDER")
    return pd.read_csv(folder / SAMPLES, dtype={"sample": str})


def build(out: Path, pictures: Path) -> list[Path]:
    """Summary, tables and figures of the numbers that are in `out`.

    Returns:
        The figures.

    Raises:
        ConfigError: there are no numbers.
    """
    samples = stored(out)
    summary = summarize(samples)
    summary.to_csv(out / SUMMARY, index=False, float_format="%.5g")
    (out / "tables").mkdir(exist_ok=True)
    for table in tables.every(samples, summary):
        (out / "tables" / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    return draw(samples, summary, pictures)


def main(arguments: Sequence[str]) -> int:
    options = {"runs": "", "beside": "", "out": "", "pictures": ""}
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise ConfigError(name, value, f"give NAME=FOLDER, NAME of {', '.join(options)}")
            options[name] = value
        if not any(options.values()):
            return _again()
        out, pictures = Path(options["out"] or OUT), Path(options["pictures"] or PICTURES)
        if options["runs"]:
            beside = Path(options["beside"]) if options["beside"] else None
            gather(out, Path(options["runs"]), beside)
        build(out, pictures)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"fidelity: {out}")
    return 0


def _again() -> int:
    """All that is committed, each folder's pictures in one of their own."""
    for file in sorted(OUT.rglob(SAMPLES)):
        build(file.parent, PICTURES / file.parent.relative_to(OUT))
        print(f"fidelity: {file.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
