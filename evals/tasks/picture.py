"""Heat maps: a task's score by two of its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.results.schema import Record


@dataclass(frozen=True)
class Picture:
    """A heat map of a run: in its folder, and in reports as a panel beside others.

    Attributes:
        cells: value by (column, row), from records.
        x, y, value: what columns, rows and values are.
        column, row: formats of their names.
        ends: of the colours.
    """

    title: str
    cells: Callable[[Sequence[Record]], dict[tuple[float, float], float]]
    x: str
    y: str
    value: str
    column: str = "{:,}"
    row: str = "{:g}"
    ends: tuple[float, float] = (0, 1)

    def draw(self, axis: Any, records: Sequence[Record]) -> Any:
        """The heat map, on an axis of matplotlib."""
        cells = self.cells(records)
        xs, ys = (sorted(set(values)) for values in zip(*cells, strict=True))
        image = [[cells.get((x, y), float("nan")) for x in xs] for y in ys]
        names = [*map(self.column.format, xs)], [*map(self.row.format, ys)]
        return heat(axis, image, *names, self.ends)

    def save(self, records: Sequence[Record], title: str, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import

        columns, rows = (len(set(values)) for values in zip(*self.cells(records), strict=True))
        figure = Figure(figsize=(2.4 + 0.7 * columns, 1.6 + 0.4 * rows), layout="constrained")
        axis = figure.subplots()
        figure.colorbar(self.draw(axis, records), label=self.value)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel=self.x, ylabel=self.y)
        figure.savefig(path, dpi=150)


def heat(
    axis: Any,
    image: list[list[float]],
    xs: Sequence[str],
    ys: Sequence[str],
    ends: Sequence[float],
    marks: list[list[str]] | None = None,
) -> Any:
    """A heat map with its values, and what marks them, written in; `ends` are of the colours."""
    low, high = ends
    drawn = axis.imshow(image, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for row, values in enumerate(image):
        for column, value in enumerate(values):
            color = "white" if value < low + 0.6 * (high - low) else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            own = marks[row][column] if marks else ""
            axis.text(column, row, f"{value:.3g}{own}", **style)
    axis.set_xticks(range(len(xs)), xs)
    axis.set_yticks(range(len(ys)), ys)
    axis.grid(False)
    return drawn
