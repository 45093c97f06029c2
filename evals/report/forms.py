"""What a table looks like as Markdown, LaTeX and CSV; pages draw it by their template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd

from evals.results.equal_memory import MARK

NOT_RUN, NOT_PUBLISHED = "not run", "not published here"
FORMS = ((10, ".3f"), (100, ".2f"), (1000, ".1f"), (1e6, ",.0f"))  # of numbers below each
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", MARK: r"\textdagger{}"}
    | {"≥": r"$\geq$", "≤": r"$\leq$"}
)


def frame_of(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Rows as they are: a count stays a whole number where other rows have none."""
    return pd.DataFrame(list(rows), dtype=object)


@dataclass(frozen=True)
class Table:
    """A table of raw values; `X low` and `X high` are the ends of the 95% interval of column X.

    Attributes:
        name: the files' stem.
        note: what a reader must know.
    """

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""

    def shown(self) -> pd.DataFrame:
        """The frame as text, with intervals behind their values."""
        if self.frame.empty:
            return pd.DataFrame({"": [NOT_RUN]})
        columns = {}
        for name in self.frame.columns:
            if name.endswith((" low", " high")):
                continue
            values = [text(value) for value in self.frame[name]]
            if f"{name} low" in self.frame:
                ends = zip(self.frame[f"{name} low"], self.frame[f"{name} high"], strict=True)
                values = [
                    value if pd.isna(low) else f"{value} [{text(low)}, {text(high)}]"
                    for value, (low, high) in zip(values, ends, strict=True)
                ]
            columns[name] = values
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        if len(self.sources) == 1:
            del shown["source"]
        return pd.DataFrame(shown)

    @property
    def sources(self) -> list[str]:
        """What the column `source` says, if there is one."""
        return list(dict.fromkeys(self.frame["source"])) if "source" in self.frame else []

    @property
    def notes(self) -> str:
        """The note, and the source where there is a single one."""
        single = self.sources if len(self.sources) == 1 else []
        return " ".join([self.note, *(f"Source: {source}." for source in single)]).strip()

    def markdown(self) -> str:
        shown = self.shown()

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"

        rows = [line(shown.columns), "|" + " --- |" * len(shown.columns)]
        rows += [line(row) for row in shown.itertuples(index=False)]
        return (
            f"## {self.title}\n\n"
            + "\n".join(rows)
            + (f"\n\n{self.notes}\n" if self.notes else "\n")
        )

    def latex(self) -> str:
        """A booktabs table."""
        shown = self.shown().map(lambda cell: cell.translate(LATEX))
        names = [name.translate(LATEX) for name in shown]
        caption = f"{self.title}. {self.notes}".translate(LATEX)
        return shown.to_latex(index=False, header=names, caption=caption)

    def write(self, folder: Path) -> None:
        """NAME.md, NAME.tex and NAME.csv (raw values)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        self.frame.to_csv(folder / f"{self.name}.csv", index=False)


def text(value: Any) -> str:
    """A cell: numbers to about three digits, nothing as a dash."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return format(value, next((form for end, form in FORMS if abs(value) < end), ".3g"))
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)
