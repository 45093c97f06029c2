"""The terminal's tables: all rows, differences to the full cache, breakdowns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape

from buzz.errors import ConfigError
from evals.report import views
from evals.report.table import HEADS, WIDEST, Table
from evals.results.frame import DIFFERENCE, REFERENCE, estimate, load, partner


def print_tables(folders: Sequence[Path]) -> list[str]:
    """Prints all tables of some settings' folders.

    Returns:
        What of the folders was left out, with the reason.

    Raises:
        ConfigError: a folder does not exist, or there is nothing to show.
    """
    rows, console = load(*folders), _console()
    left_out = rows.attrs["left_out"]
    if rows.empty:
        where = ", ".join(map(str, folders))
        raise ConfigError("runs", where, left_out[0] if left_out else "no run is there")
    models, seeds = (", ".join(map(str, rows[name].unique())) for name in ("model", "seed"))
    console.print(f"[bold]{escape(models)}, seed {escape(seeds)}[/]", highlight=False)
    timed = rows.task.isin(views.SPEC["timed"])
    own = rows[~timed]
    tables = [_rows(views.make("terminal", own))] if len(own) else []
    compared = own[own.setting.isin(own.setting[own.row == REFERENCE])]
    if (compared.row != REFERENCE).any():
        against = _rows(views.make("against", compared))
        if set(against.shown()) - {"", "n"}:  # else no row is finished
            tables.append(against)
    if len((over := views.make("terminal_seeds", own)).frame):
        tables.append(_rows(over))
    tables += [_rows(views.make("speed", rows[timed]))] if timed.any() else []
    for i, table in enumerate([*tables, *views.breakdowns(own)]):
        if i:
            console.print(f"\n[bold]{escape(table.title)}[/]", highlight=False)
        for part in table.rich():
            console.print(part, highlight=False)
    for note in [*views.notes(rows), *(f"left out: {one}" for one in left_out)]:
        console.print(escape(note), highlight=False)
    return left_out


def _rows(table: Table) -> Table:
    """The table with lines by the names of their files; their settings stand above them."""
    told_elsewhere = [*HEADS, "row", "n", "prompt_tokens"]
    frame = table.frame.drop(columns=told_elsewhere, errors="ignore")
    frame.insert(0, "", table.frame["row"])
    return replace(table, frame=frame.assign(n=table.frame["n"]))


def print_paired(folders: Sequence[Path], method: str) -> None:
    """Prints the paired differences of a method to each other one of the same budget.

    Raises:
        ConfigError: a folder does not exist, or the folders hold no two methods to compare.
    """
    rows = load(*folders)
    named, lines, sections = views.labels(rows), [], []
    for setting, parts in views.settings(views.ran(rows)).items():
        for (row, part), (other, theirs) in permutations(parts.items(), 2):
            own, its = part.iloc[0], theirs.iloc[0]
            same = (own.budget, own.budget_by) == (its.budget, its.budget_by)
            if own.label != method or its.label == method or not (same or its.method == REFERENCE):
                continue
            both = pd.concat([part, theirs.assign(row=REFERENCE)])
            beside = partner(both).loc[part.index]
            line = {"": row, "less": other}
            for name, of, column in (("score", "n", "score"), ("KL nats", "n of KL", "kl_to_full")):
                one = estimate(part, column, beside, DIFFERENCE, rows)
                line |= {name: one.value, f"{name} low": one.low, f"{name} high": one.high}
                line |= {of: one.n}
            lines.append(line)
            sections.append(f"{named[setting]}  {own.headline}")
    if not lines:
        raise ConfigError("--paired", method, "name a method that others were run beside")
    for part in Table("paired", "", pd.DataFrame(lines, dtype=object), sections=sections).rich():
        _console().print(part, highlight=False)


def _console() -> Console:
    """A console at least WIDEST wide: a narrow terminal wraps lines, and nothing is cut off."""
    console = Console()
    return Console(width=max(console.width, WIDEST) if console.is_terminal else 200)
