"""Tables as Markdown, LaTeX, CSV and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

from evals.report.methods import called
from evals.results.frame import MARK, NOT_RUN

FORMS = ((10, ".3f"), (100, ".2f"), (1000, ".1f"), (1e6, ",.0f"))  # formats of numbers below
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", MARK: r"\textdagger{}"}
    | {"≥": r"$\geq$", "≤": r"$\leq$"}
)
HEADS = ("task", "model", "seed", "setting", "method", "parameters", "compress", "budget")
HEADS += ("metric",)
ENDS = re.compile(r" (\[.*?\])")  # an interval behind a value
WIDEST = 120  # characters across; a table on a terminal is no wider


@dataclass(frozen=True)
class Table:
    """A table of raw values. `X low` and `X high` are the ends of column X's 95 % interval.

    Attributes:
        name: the stem of its files.
        note: what a reader must know.
        marks: by column, the text behind each line's value.
        sections: each line's section on a terminal.
        narrow: the columns of a paper's table besides those in HEADS; none: all.
    """

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sections: Sequence[str] = ()
    narrow: Sequence[str] = ()

    def shown(self) -> pd.DataFrame:
        """The table as text: values with intervals and marks, without empty columns."""
        if self.frame.empty:
            return pd.DataFrame({"": [NOT_RUN]})
        columns: dict[str, list[str]] = {}
        for name in self.frame.columns:
            if name.endswith((" low", " high")):
                continue
            cells = [text(value) for value in self.frame[name]]
            if f"{name} low" in self.frame:
                ends = zip(self.frame[f"{name} low"], self.frame[f"{name} high"], strict=True)
                cells = [
                    cell if pd.isna(low) else f"{cell} [{text(low)}, {text(high)}]"
                    for cell, (low, high) in zip(cells, ends, strict=True)
                ]
            if any(cell not in ("", "-") for cell in cells):
                marks = self.marks.get(name, [""] * len(cells))
                columns[name] = [
                    a if a == "-" else a + b for a, b in zip(cells, marks, strict=True)
                ]
        return pd.DataFrame(columns)

    def named(self) -> pd.DataFrame:
        """As :meth:`shown`, with the methods' names for readers."""
        shown = self.shown()
        for name in {"method", "run", *shown.columns[:1]} & set(shown):
            shown[name] = shown[name].map(called)
        return shown.rename(columns=called)

    def alike(self) -> dict[str, str]:
        """The cells that all lines have in common, by column."""
        shown = self.named()
        same = [name for name in HEADS if name in shown and shown[name].nunique() == 1]
        return {name: shown[name].iloc[0] for name in same if len(shown) > 1}

    def paper(self) -> list[str]:
        """The columns of a paper's table."""
        if self.frame.empty:
            return list(self.named())
        several = [name for name in self.named() if name not in self.alike()]
        return [name for name in several if name in (*HEADS, *(self.narrow or several))]

    def told(self) -> str:
        """The cells that all lines have in common, in words."""
        return ", ".join(f"{name} {text}" for name, text in self.alike().items() if text)

    def markdown(self) -> str:
        shown = self.named()

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"

        rows = [line(shown.columns), "|" + " --- |" * len(shown.columns)]
        rows += [line(row) for row in shown.itertuples(index=False)]
        note = f"\n\n{self.note}\n" if self.note else "\n"
        return f"## {self.title}\n\n" + "\n".join(rows) + note

    def latex(self) -> str:
        """A booktabs table of :meth:`paper`'s columns, with caption and label."""
        shown = self.named()[self.paper()]
        aligned = ["r" if re.match(r"[-\d]", "".join(shown[name])) else "l" for name in shown]
        shown = shown.map(lambda cell: ENDS.sub(r" {\\scriptsize \1}", cell.translate(LATEX)))
        told = f" ({self.told()})" if self.told() else ""
        text = shown.to_latex(
            index=False,
            header=[name.translate(LATEX) for name in shown],
            caption=f"{self.title}{told}. {self.note}".strip().translate(LATEX),
            label=f"tab:{self.name}",
            column_format="".join(aligned),
        )
        small = "\\centering\n\\small\n\\setlength{\\tabcolsep}{4pt}\n\\begin{tabular}"
        return text.replace("\\begin{tabular}", small)

    def rich(self) -> list[RichTable]:
        """The table for a terminal, in several parts if it is wider than WIDEST."""
        shown = self.shown()
        first, *others = shown.columns
        whole = WIDEST - max(map(len, [first, *shown[first], *self.sections])) - 1
        room, parts = whole, [[]]
        for name in others:
            width = 1 + max(len(cell) for cell in [*name.split(), *shown[name]])
            if parts[-1] and width > room:
                parts.append([])
                room = whole
            parts[-1].append(name)
            room -= width
        return [self._rich(shown[[first, *part]]) for part in parts]

    def _rich(self, shown: pd.DataFrame) -> RichTable:
        table = RichTable(box=SIMPLE_HEAD, show_edge=False, padding=0)
        for i, name in enumerate(shown.columns):
            heading = escape(name).replace(" ", "\n") if i else ""
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        last = None
        for section, cells in zip(
            self.sections or [""] * len(shown), shown.itertuples(index=False), strict=True
        ):
            if section != last and section:
                table.add_section()
                table.add_row(f"[bold]{escape(section)}[/]")
            last = section
            table.add_row(*map(escape, cells))
        return table

    def write(self, folder: Path) -> None:
        """Writes NAME.md, NAME.tex and NAME.csv (raw values, with a heading even without lines)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        self.frame.to_csv(folder / f"{self.name}.csv", index=False)


def text(value: Any) -> str:
    """A cell's text: numbers to about three digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return format(value, next((form for end, form in FORMS if abs(value) < end), ".3g"))
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)
