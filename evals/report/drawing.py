"""How figures look: colours and markers of methods, panels, legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from evals.report.methods import place  # noqa: E402
from evals.results.equal_memory import MARK  # noqa: E402

RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}
ROW = 0.18  # inches of a legend's row


def panels(
    count: int, width: float = 3.4, height: float = 2.9, most: int = 3
) -> tuple[Any, list[Any]]:
    """A figure of `count` axes, at most `most` in a row."""
    columns = min(most, count)
    rows = -(-count // columns)
    size = (width * columns + 0.6, height * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, above them."""
    entries = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    names = sorted(entries, key=lambda name: (place(name.split()[0].rstrip(MARK)), name))
    widest = 0.45 + 0.075 * max(map(len, names))  # inches of an entry, at this font size
    columns = max(1, min(int(figure.get_figwidth() / widest), len(names)))
    where = {"loc": "outside upper center", "ncols": columns}
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + ROW * rows)
    figure.legend([entries[name] for name in names], names, **where)
