"""The terminal table of finished runs: `python -m evals.table RUN_DIR...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from buzz.errors import ConfigError
from evals.compare import REFERENCE, compare, differing
from evals.equal_memory import MARK, TOLERANCE, is_over
from evals.records import RunFolder

Summary = dict[str, Any]


def read_summary(folder: Path) -> Summary:
    """A finished run's summary.

    Raises:
        ConfigError: the folder holds none, an early version wrote it, or the run failed.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ConfigError("run", str(folder), "no summary.json: not a finished run's folder")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["status"] != "complete":
        raise ConfigError("run", str(folder), f"the run failed: {summary['error']}")
    if "parameters" not in summary:
        raise ConfigError("run", str(folder), "an early version's summary; run it again")
    return summary


def find_reference(setting: str, folders: Iterable[Path]) -> Path | None:
    """The folder, among `folders`, of the finished full-cache run of a setting.

    Of several the one with plain attention: full cache with log n scaling is a method of its own.
    """
    found = []
    for path in sorted(folders):
        if (path / "summary.json").is_file():
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            if summary["status"] != "complete" or "parameters" not in summary:  # early
                continue
            if summary["method"] == REFERENCE and summary["setting"] == setting:
                found.append((summary["cache"]["logn_base"] is not None, path))
    return min(found)[1] if found else None


@dataclass(frozen=True)
class Setting:
    """Runs of one task, model and seed, and the full-cache run that they are compared with."""

    folders: list[Path]
    rows: list[Summary]
    reference: Path | None

    @classmethod
    def of(cls, folders: Sequence[Path]) -> list[Setting]:
        """The runs by setting, both in the order given."""
        settings: dict[str, list[tuple[Path, Summary]]] = {}
        for folder in dict.fromkeys(folders):
            summary = read_summary(folder)
            settings.setdefault(summary["setting"], []).append((folder, summary))
        return [
            cls(
                folders=[folder for folder, _ in runs],
                rows=[summary for _, summary in runs],
                reference=find_reference(name, runs[0][0].resolve().parent.iterdir()),
            )
            for name, runs in settings.items()
        ]

    @property
    def names(self) -> list[str]:
        """The rows' methods, with the settings that tell those of one method apart."""
        known = [
            {"budget": r["budget"], "budget_by": r.get("budget_by")} | r["parameters"] | r["cache"]
            for r in self.rows
        ]
        names = []
        for row, own in zip(self.rows, known, strict=True):
            pairs = zip(self.rows, known, strict=True)
            alike = [other for r, other in pairs if r["method"] == row["method"]]
            varying = [key for key in own if any(other[key] != own[key] for other in alike)]
            names.append(" ".join([row["method"], *(f"{key}={own[key]}" for key in varying)]))
        return names

    def against_full(self) -> list[dict[str, Any] | None]:
        """Per run, its comparison with the full cache; None for the full cache itself."""
        if self.reference is None:
            return [None] * len(self.rows)
        full = RunFolder(self.reference).read()
        compared: list[dict[str, Any] | None] = []
        for folder, row in zip(self.folders, self.rows, strict=True):
            run = RunFolder(folder)
            own = row["method"] == REFERENCE and folder.resolve() == self.reference
            compared.append(
                None if own else compare(run.read(), full, row, run.read("fidelity.jsonl"))
            )
        return compared

    def notes(self) -> list[str]:
        """What a reader should know before comparing the rows."""
        rows = dict(zip(self.names, self.rows, strict=True))
        if self.reference and self.reference not in [f.resolve() for f in self.folders]:
            rows[f"earlier {REFERENCE}"] = read_summary(self.reference)
        task = self.rows[0]["task"]
        notes = [
            f"{task}: rows differ in {condition}: {'; '.join(values)}"
            for condition, values in differing(rows).items()
        ]
        for name, row in zip(self.names, self.rows, strict=True):
            if is_over(row.get("budget_held")):
                notes.append(
                    f"{MARK} {task}: {name} holds {row['budget_held']:.2f}x its budget"
                    f" ({row['budget_by']}): not at equal memory"
                )
        for budget, by in dict.fromkeys((row["budget"], row.get("budget_by")) for row in self.rows):
            held = [
                row["kv_entries_mean"] if budget is None else row.get("budget_held")
                for row in self.rows
                if (row["budget"], row.get("budget_by")) == (budget, by)
                and row["method"] != REFERENCE
                and row["n"]
            ]
            known = [share for share in held if share]
            if known and max(known) > (1 + TOLERANCE) * min(known):
                given = "no budget" if budget is None else f"budget={budget} ({by})"
                ratio = max(known) / min(known)
                notes.append(f"{task}: rows of {given} hold up to {ratio:.2f}x as much as others")
        return notes


def tables(folders: Sequence[Path]) -> list[Table | str]:
    """All runs' scores and costs; what sets them off from full cache; breakdowns; notes."""
    settings = Setting.of(folders)
    parts: list[Table | str] = [_title(settings), _costs(settings, _labels(settings))]
    compared = [setting.against_full() for setting in settings]
    if any(row is not None for rows in compared for row in rows):
        parts += [
            _heading(f"against {REFERENCE}"),
            _against_full(settings, _labels(settings), compared),
        ]
    parts += [part for setting in settings for part in _breakdowns(setting)]
    return parts + [note for setting in settings for note in setting.notes()]


def _labels(settings: list[Setting]) -> list[str]:
    """The settings' names: the task, and whatever else tells them apart."""
    rows = [setting.rows[0] for setting in settings]
    varying = [key for key in ("model", "seed") if len({row[key] for row in rows}) > 1]
    return [" ".join(str(row[key]) for key in ("task", *varying)) for row in rows]


def _heading(text: str) -> str:
    return f"\n[bold]{text}[/]"


def _title(settings: list[Setting]) -> str:
    rows = [setting.rows[0] for setting in settings]
    models, seeds = (dict.fromkeys(str(row[key]) for row in rows) for key in ("model", "seed"))
    return f"[bold]{', '.join(models)}, seed {', '.join(seeds)}[/]"


def _costs(settings: list[Setting], labels: list[str]) -> Table:
    table = _table(
        "score",
        "95% CI",
        "budget",
        "KV entries\nmean/peak",
        "KV MB\nmean/peak/alloc",
        f"KV\n/{REFERENCE}",
        "TTFT\ns",
        "decode\ntok/s",
        f"tok/s\n/{REFERENCE}",
        "n",
    )
    for setting, label in zip(settings, labels, strict=True):
        full = None if setting.reference is None else read_summary(setting.reference)
        _section(table, label, setting.rows[0]["headline"])
        for name, row in zip(setting.names, setting.rows, strict=True):
            entries = _number(row["kv_entries_mean"], ".0f")
            kinds = ("kv_nbytes_mean", "kv_nbytes_peak", "allocated_nbytes")
            sizes = [_number(row[kind], ".1f", 1e-6) for kind in kinds]
            mark = MARK if is_over(row.get("budget_held")) else ""
            table.add_row(
                name,
                _score(row["score"]),
                _range(row["score_ci95"], _form(row["score"])),
                _number(row["budget_entries"], ".0f") + mark,
                f"{entries}/{_number(row['kv_entries_peak'], 'd')}",
                "/".join(sizes),
                _ratio(row, full, "kv_nbytes_mean"),
                _number(row["ttft_s"], ".2f"),
                _number(row["decode_tokens_per_s"], ".1f"),
                _ratio(row, full, "decode_tokens_per_s"),
                f"{row['n']}{_missing(row)}",
            )
    return table


def _missing(row: Summary) -> str:
    """The samples that were out of memory, with the most bytes that one asked for, or failed."""
    asked = row.get("oom_asked_nbytes")
    size = f" of {_number(asked, '.1f', 1e-9)} GB" if asked else ""
    oom = f" (+{row['oom']} oom{size})" if row["oom"] else ""
    failed = row.get("failed", 0)  # not in early summaries
    return oom + (f" (+{failed} FAILED)" if failed else "")


def _against_full(
    settings: list[Setting], labels: list[str], compared: list[list[dict[str, Any] | None]]
) -> Table:
    table = _table(
        f"score\n-{REFERENCE}",
        "95% CI",
        f"score\n/{REFERENCE}",
        "win/tie/loss",
        "same\ntokens",
        "same\nprefix",
        "KL\nnats",
        "same\ntop-1",
        "n",
    )
    for setting, label, rows in zip(settings, labels, compared, strict=True):
        _section(table, label, setting.rows[0]["headline"])
        for name, row, other in zip(setting.names, setting.rows, rows, strict=True):
            if other is None:
                continue
            table.add_row(
                name,
                _number(other["difference"], "+" + _form(row["score"])),
                _range(other["difference_ci95"], "+" + _form(row["score"])),
                _number(other["relative"], ".2f"),
                f"{other['wins']}/{other['ties']}/{other['losses']}",
                _number(other["agreement"], ".2f"),
                _number(other["prefix"], ".2f"),
                _number(other["kl_to_full"], ".3f") + _of_fewer(other),
                _number(other["top1_to_full"], ".2f"),
                str(other["n"]),
            )
    return table


def _of_fewer(other: dict[str, Any]) -> str:
    """Of how many samples the distance is known, if not of all."""
    known = other.get("kl_n", other["n"])  # not in early summaries
    return f" (n={known})" if 0 < known < other["n"] else ""


def _breakdowns(setting: Setting) -> list[Table | str]:
    """A heading and a table per breakdown, methods side by side."""
    columns = [
        {row["grouped_by"]: {name: group["score"] for name, group in row["groups"].items() if name}}
        | row["breakdown"]
        for row in setting.rows
    ]
    parts: list[Table | str] = []
    for title in dict.fromkeys(title for column in columns for title in column):
        names = list(dict.fromkeys(n for column in columns for n in column.get(title, {})))
        if not names:
            continue
        parts.append(_heading(f"{setting.rows[0]['task']} by {title}"))
        table = _table(*(name.replace(" ", "\n") for name in setting.names))
        for name in names:
            table.add_row(name, *(_score(column.get(title, {}).get(name)) for column in columns))
        parts.append(table)
    return parts


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _section(table: Table, label: str, headline: str) -> None:
    """A line before the section's rows: the task, and what its score is."""
    table.add_section()
    table.add_row(f"[bold]{label}[/]", f"[bold]{headline}[/]")


def _form(score: float | None) -> str:
    """The number format that suits a score of this size."""
    size = abs(score or 0)
    return ".3f" if size <= 1 else ".2f" if size < 1e5 else ".3g"


def _score(score: float | None) -> str:
    return _number(score, _form(score))


def _range(interval: Sequence[float] | None, form: str) -> str:
    return "-" if interval is None else "..".join(format(value, form) for value in interval)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale if scale != 1 else value, form)


def _ratio(row: Summary, full: Summary | None, name: str) -> str:
    if full is None or row[name] is None or not full[name]:
        return "-"
    return f"{row[name] / full[name]:.2f}"


class TableCallback(Callback):
    """Prints the table when a run is over; of a sweep :class:`evals.sweep.SweepCallback` does."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        single = config.hydra.mode is not RunMode.MULTIRUN
        if single and job_return.status is JobStatus.COMPLETED:
            self.folders += map(Path, job_return.return_value)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        print_tables(self.folders)


def print_tables(folders: Sequence[Path]) -> None:
    """Prints all tables of finished runs."""
    console = Console()
    # A narrow terminal wraps what a narrow table would cut off; a file takes lines of any length.
    console = Console(width=max(console.width, 120) if console.is_terminal else 200)
    for part in tables(folders):
        console.print(part, highlight=False)


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("usage: python -m evals.table RUN_DIR...", file=sys.stderr)
        return 2
    try:
        print_tables([Path(argument) for argument in arguments])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
