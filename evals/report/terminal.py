"""The terminal table of finished runs: `python -m evals.report RUN_DIR...`.

With `--paired METHOD`, how that method differs from the others of its budget, sample by sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from buzz.errors import ConfigError
from evals.report.beside import Setting, Summary
from evals.results.compare import REFERENCE, paired
from evals.results.equal_memory import MARK, is_over
from evals.results.runs import DISTURBED, Run, compression, differing_settings

WIDEST = 120  # characters of a table; a narrower terminal wraps


def tables(folders: Sequence[Path]) -> list[Table | str]:
    """All runs' scores and costs; what sets them off from full cache; breakdowns; notes.

    Raises:
        ConfigError: there is no finished run among them.
    """
    return _tables(*Setting.and_others(folders))


def _tables(settings: list[Setting], others: list[Run]) -> list[Table | str]:
    if not settings:
        raise ConfigError("run", others[0].places, others[0].status)
    parts: list[Table | str] = [_title(settings), _costs(settings, _labels(settings))]
    compared = [setting.against_full() for setting in settings]
    if any(row is not None for rows in compared for row in rows):
        parts += [
            _heading(f"against {REFERENCE}"),
            _against_full(settings, _labels(settings), compared),
        ]
    parts += [part for setting in settings for part in _breakdowns(setting)]
    notes = [note for setting in settings for note in setting.notes()]
    notes += [f"not shown: {run.places}: {run.status}" for run in others]
    return parts + [escape(note) for note in notes]


def paired_table(folders: Sequence[Path], method: str) -> Table:
    """A method less each other one of the same budget, over the samples that both have.

    Raises:
        ConfigError: the folders hold no two runs to compare.
    """
    settings = Setting.of(folders)
    table = _table("less", "score", "95% CI", "n", "KL, nats", "95% CI", "n")
    for setting, label in zip(settings, _labels(settings), strict=True):
        _section(table, label, setting.rows[0]["headline"])
        rows = list(zip(setting.names, setting.runs, setting.rows, strict=True))
        for name, run, row in rows:
            for theirs, other, _ in rows:
                if run.method != method or other.method == method:
                    continue
                if other.method != REFERENCE and other.budget != run.budget:
                    continue
                both = paired(run.by_id, other.by_id, row, run.fidelity, other.fidelity)
                form = "+" + _form(row["score"])
                table.add_row(
                    name,
                    theirs,
                    _number(both["difference"], form),
                    _range(both["difference_ci95"], form),
                    str(both["n"]),
                    _number(both["kl"], "+.3f"),
                    _range(both["kl_ci95"], "+.3f"),
                    str(both["kl_n"]),
                )
    if table.row_count == len(settings):  # nothing but headings
        raise ConfigError("--paired", method, "name a method that others were run beside")
    return table


def _labels(settings: list[Setting]) -> list[str]:
    """The settings' names: the task, and whatever else tells them apart."""
    rows = [setting.rows[0] for setting in settings]
    varying = [key for key in ("model", "seed") if len({row[key] for row in rows}) > 1]
    labels = [
        " ".join([*(str(row[key]) for key in ("task", *varying)), *_compressed(setting)])
        for row, setting in zip(rows, settings, strict=True)
    ]
    apart: dict[int, list[str]] = {}
    for label in set(labels):
        alike = [i for i, other in enumerate(labels) if other == label]
        differing_in = differing_settings([settings[i].runs[0].config for i in alike])
        for name, values in differing_in.items():
            for i, value in zip(alike, values, strict=True):
                apart.setdefault(i, []).append(f"{name.removeprefix('task.')}={value}")
    return [" ".join([label, *apart.get(i, [])]) for i, label in enumerate(labels)]


def _compressed(setting: Setting) -> list[str]:
    """What of the prompts is compressed, if not all."""
    run = setting.runs[0]
    return [f"compress={run.compress}"] if compression(run.config) else []


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
        _section(table, label, setting.rows[0]["headline"])
        for name, run, row in zip(setting.names, setting.runs, setting.rows, strict=True):
            full, near = setting.beside(run)
            entries = _number(row["kv_entries_mean"], ".0f")
            kinds = ("kv_nbytes_mean", "kv_nbytes_peak", "allocated_nbytes")
            sizes = [_number(row[kind], ".1f", 1e-6) for kind in kinds]
            mark = MARK if is_over(row.get("budget_held")) else ""
            table.add_row(
                name,
                _score(row["score"]),
                _range(row["score_ci95"], _form(row["score"])),
                _number(row["budget_entries"], ".0f") + mark,
                f"{entries}/{_number(row['kv_entries_peak'], '.0f')}",
                "/".join(sizes),
                _ratio(row, full, "kv_nbytes_mean"),
                _timing(_number(row["ttft_s"], ".2f"), row) + _of_question(row),
                _timing(_number(row["decode_tokens_per_s"], ".1f"), row),
                _timing(_ratio(row, near, "decode_tokens_per_s"), row, near),
                f"{row['n']}{_missing(row)}",
            )
    return table


def _missing(row: Summary) -> str:
    """The samples that were out of memory, with the most bytes that one asked for, or failed."""
    asked = row.get("oom_asked_nbytes")
    size = f" of {_number(asked, '.1f', 1e-9)} GB" if asked else ""
    oom = f" (+{row['oom']} oom{size})" if row["oom"] else ""
    return oom + (f" (+{row['failed']} FAILED)" if row["failed"] else "")


def _of_question(row: Summary) -> str:
    """What of the time to the first token passed from the question on."""
    return f" ({row['question_s']:.2f})" if row.get("question_s") else ""


def _timing(cell: str, *rows: Summary | None) -> str:
    """A timing, marked if the machine was busy with other things meanwhile."""
    disturbed = cell != "-" and any(row and row["loaded"] for row in rows)
    return cell + DISTURBED * disturbed


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
        if not any(rows):  # the full cache alone, or not there
            continue
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
    return f" (n={other['kl_n']})" if 0 < other["kl_n"] < other["n"] else ""


def _breakdowns(setting: Setting) -> list[Table | str]:
    """A heading and tables per breakdown; methods are columns, or rows where that is narrower."""
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
        cells = [[_score(column.get(title, {}).get(name)) for name in names] for column in columns]
        turned = [list(row) for row in zip(*cells, strict=True)]
        ways = ((names, setting.names, turned), (setting.names, names, cells))
        parts += _parts(*min(ways, key=lambda way: sum(_widths(way[1], way[2]))))
    return parts


def _widths(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    """Characters of each column, headings broken at spaces."""
    parts = [[*head.split(), *(row[i] for row in cells)] for i, head in enumerate(heads)]
    return [1 + max(map(len, column)) for column in parts]


def _parts(
    names: Sequence[str], heads: Sequence[str], cells: Sequence[Sequence[str]]
) -> Iterator[Table]:
    """One table, or several below each other if it is wider than a terminal."""
    room = WIDEST - max(map(len, names))
    widths = _widths(heads, cells)
    first = 0
    while first < len(heads):
        end = first + 1
        while end < len(heads) and sum(widths[first : end + 1]) <= room:
            end += 1
        table = _table(*(head.replace(" ", "\n") for head in heads[first:end]))
        for name, row in zip(names, cells, strict=True):
            table.add_row(name, *row[first:end])
        yield table
        first = end


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _section(table: Table, label: str, headline: str) -> None:
    """A line before the section's rows: the task, and what its score is."""
    table.add_section()
    table.add_row(f"[bold]{escape(label)}[/]", f"[bold]{escape(headline)}[/]")


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


def print_tables(folders: Sequence[Path]) -> list[Run]:
    """Prints all tables of finished runs, and which others there are; these."""
    console = _console()
    settings, others = Setting.and_others(folders)
    for part in _tables(settings, others):
        console.print(part, highlight=False)
    return others


def _console() -> Console:
    """A narrow terminal wraps what a narrow table would cut off; a file takes any length."""
    console = Console()
    return Console(width=max(console.width, WIDEST) if console.is_terminal else 200)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if folders were left out, 2 if there is nothing to show."""
    parser = argparse.ArgumentParser("python -m evals.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument("--paired", metavar="METHOD", help="less the others, sample by sample")
    given = parser.parse_args(arguments)
    try:
        if given.paired:
            _console().print(paired_table(given.folders, given.paired), highlight=False)
            return 0
        return 1 if print_tables(given.folders) else 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
