"""The terminal table of finished runs: `python -m evals.table RUN_DIR...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from buzz.errors import ConfigError

REFERENCE = "full"  # the method that ratios are taken to

Summary = dict[str, Any]


def read_summary(folder: Path) -> Summary:
    """A finished run's summary.

    Raises:
        ConfigError: the folder holds none, or the run failed.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ConfigError("run", str(folder), "no summary.json: not a finished run's folder")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["status"] != "complete":
        raise ConfigError("run", str(folder), f"the run failed: {summary['error']}")
    return summary


def find_reference(summary: Summary, runs: Iterable[Path]) -> Summary | None:
    """The full-cache run, among the folders `runs`, of the same task, model, seed and device."""
    for path in sorted(runs):
        if (path / "summary.json").is_file():
            other = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            if other.get("method") == REFERENCE and other["setting"] == summary["setting"]:
                return other
    return None


def tables(folders: Sequence[Path]) -> list[Table]:
    """One table per setting (task, model, seed), the methods in the order given."""
    settings: dict[str, list[Summary]] = {}
    for folder in folders:
        summary = read_summary(folder)
        settings.setdefault(summary["setting"], []).append(summary)
    neighbours = [path for folder in folders[:1] for path in folder.resolve().parent.iterdir()]
    return [_table(summaries, neighbours) for summaries in settings.values()]


def _table(summaries: list[Summary], neighbours: list[Path]) -> Table:
    first = summaries[0]
    own = [summary for summary in summaries if summary["method"] == REFERENCE]
    full = own[0] if own else find_reference(first, neighbours)
    table = Table(
        title=f"{first['task']} on {first['model']}, seed {first['seed']}",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        first["headline"],
        "budget",
        "KV entries\nmean/peak",
        "KV MB\nmean/peak",
        f"KV\n/{REFERENCE}",
        "TTFT\ns",
        "decode\ntok/s",
        f"tok/s\n/{REFERENCE}",
        "n",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        entries = f"{_number(row['kv_entries_mean'], '.0f')}/{_number(row['kv_entries_peak'], 'd')}"
        sizes = [_number(row[f"kv_nbytes_{kind}"], ".1f", 1e-6) for kind in ("mean", "peak")]
        table.add_row(
            row["method"],
            _number(row["score"], ".3f" if (row["score"] or 0) <= 1 else ".2f"),
            _number(row["budget_entries"], ".0f"),
            entries,
            "/".join(sizes),
            _ratio(row, full, "kv_nbytes_mean"),
            _number(row["ttft_s"], ".2f"),
            _number(row["decode_tokens_per_s"], ".1f"),
            _ratio(row, full, "decode_tokens_per_s"),
            f"{row['n']}" + (f" (+{row['oom']} oom)" if row["oom"] else ""),
        )
    return table


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale if scale != 1 else value, form)


def _ratio(row: Summary, full: Summary | None, name: str) -> str:
    if full is None or row[name] is None or not full[name]:
        return "-"
    return f"{row[name] / full[name]:.2f}"


class TableCallback(Callback):
    """Prints the table when a run, or all runs of a multirun, are over.

    It sees the jobs of launchers that work in this process; after others, use the module's command.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status is JobStatus.COMPLETED and job_return.return_value is not None:
            self.folders.append(Path(job_return.return_value))

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        _print(self.folders)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _print(self.folders)


def _print(folders: Sequence[Path]) -> None:
    console = Console()
    if not console.is_terminal:  # a file takes lines of any length
        console = Console(width=200)
    for table in tables(folders):
        console.print(table)


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("usage: python -m evals.table RUN_DIR...", file=sys.stderr)
        return 2
    try:
        _print([Path(argument) for argument in arguments])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
