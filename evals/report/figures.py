"""Figures of a frame of samples, as PNG and PDF files.

Points have 95 % intervals. A panel shows at most HIGHLIGHTED methods in colour, with their names
beside their last points. The others are grey, and the figure's note names them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from evals.report.methods import GREY, called, highlighted, place, style_of  # noqa: E402
from evals.report.views import (  # noqa: E402
    SPEC,
    Parts,
    across_seeds,
    finished,
    flat,
    labels,
    mark,
    marked,
    over_note,
    ran,
    settings,
    unknown,
)
from evals.results.frame import MARK, REFERENCE, Estimate, estimate, over_parts  # noqa: E402

RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}
ROW = 0.18  # height of a legend's row in inches
CURVES = {"question": "question", "length": "prompt (tokens)"}


@dataclass(frozen=True)
class Figure:
    """A figure's file, with what a page shows around it."""

    title: str
    path: Path
    note: str
    width: int  # in pixels, on a page

    @property
    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


# For each figure: the file's stem, the title, the note, the figure, the parts in it.
Drawn = Iterator[tuple[str, str, str, Any, Sequence[pd.DataFrame]]]
Settings = dict[str, Parts]


def draw_all(rows: pd.DataFrame, folder: Path) -> list[Figure]:
    """Draws every figure for which there are rows into `folder`."""
    kinds = (pareto, distance, maps, by_question, by_length)
    return [
        one for draw in kinds for one in _saved(draw, rows, lambda name: folder / f"{name}.png")
    ]


def draw_pareto(rows: pd.DataFrame, path: Path) -> bool:
    """Draws scores against KV memory, and nothing else; False: there are no two methods."""
    return bool(_saved(pareto, rows, lambda name: path))


def _saved(
    draw: Callable[[Settings, dict[str, str]], Drawn],
    rows: pd.DataFrame,
    where: Callable[[str], Path],
) -> list[Figure]:
    drawn, figures = {}, []
    for setting, parts in settings(rows).items():
        done = {row: ran(part) for row, part in parts.items() if finished(part)}
        drawn[setting] = {row: part for row, part in done.items() if len(part)}
    with plt.rc_context(RC):
        for name, title, note, figure, shown in draw(drawn, labels(rows)):
            path = where(name)
            save(figure, path)
            note = f"{note} {over_note(shown)}".strip()
            figures.append(Figure(title, path, note, round(96 * figure.get_figwidth())))
    return figures


def save(figure: Any, path: Path, **options: Any) -> Path:
    """Writes a figure as a PNG file, and as a PDF file beside it; returns the PNG file's path.

    Args:
        options: of matplotlib's `savefig`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, **options)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **options)
    plt.close(figure)
    return path


def panels(
    count: int, width: float = 3.4, height: float = 2.9, most: int = 3
) -> tuple[Any, list[Any]]:
    """A figure with `count` axes, at most `most` in a row."""
    columns = min(most, count)
    rows = -(-count // columns)
    size = (width * columns + 0.6, height * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def legend(figure: Any, axes: Sequence[Any]) -> None:
    """Adds one legend for all panels, above them."""
    entries = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    names = sorted(entries, key=lambda name: (place(name.split()[0].rstrip(MARK)), name))
    widest = 0.45 + 0.075 * max(map(len, names), default=1)  # width of an entry in inches
    columns = max(1, min(int(figure.get_figwidth() / widest), len(names)))
    figure.set_figheight(figure.get_figheight() + ROW * -(-len(names) // columns))
    where = {"loc": "outside upper center", "ncols": columns}
    figure.legend([entries[name] for name in names], names, **where)


def name_ends(axis: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes names to the right of points (x, y, name, color), without overlaps.

    A name that has to move up or down gets a thin line to its point.
    """
    axis.figure.draw_without_rendering()  # settles the places of points
    pixels = axis.figure.dpi / 72
    spots = [axis.transData.transform((x, y)) / pixels for x, y, *_ in ends]  # in points
    wide, high = [4.2 * len(name) for _, _, name, _ in ends], 9.5
    heights = [float(y) for _, y in spots]
    apart = sorted(range(len(ends)), key=heights.__getitem__)
    for _ in range(100):
        for under, over in ((i, j) for n, i in enumerate(apart) for j in apart[n + 1 :]):
            first, second = sorted((under, over), key=lambda i: spots[i][0])
            lack = high - (heights[over] - heights[under])
            if lack > 0 and spots[second][0] - spots[first][0] < wide[first] + 8:
                heights[under] -= lack / 2
                heights[over] += lack / 2
    for (x, y, name, color), spot, height in zip(ends, spots, heights, strict=True):
        up = height - float(spot[1])
        line = {"arrowstyle": "-", "color": color, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
        style: dict[str, Any] = {"fontsize": 7, "color": color, "va": "center"}
        style |= {"arrowprops": line} if abs(up) > 3 else {}
        axis.annotate(name, (x, y), (7, up), textcoords="offset points", **style)


def named_grey(methods: Sequence[str], coloured: set[str]) -> str:
    """A sentence that names the methods drawn in grey, if there are any."""
    others = sorted(set(methods) - coloured, key=place)
    return f"Grey: {', '.join(map(called, others))}." if others else ""


def _chosen(found: Settings, keep: Callable[[pd.DataFrame], Any], least: int = 1) -> Settings:
    """The parts that `keep` accepts, of settings with at least `least` of them."""
    chosen = {
        setting: {row: part for row, part in parts.items() if keep(part)}
        for setting, parts in found.items()
    }
    return {setting: parts for setting, parts in chosen.items() if len(parts) >= least}


def _title(part: pd.DataFrame, named: dict[str, str]) -> str:
    one = part.iloc[0]
    label = named[one.setting]
    more = [
        text for text in (str(one.model), f"seed {one.seed}") if text.replace(" ", "=") not in label
    ]
    return ", ".join([label, *more])


def pareto(found: Settings, named: dict[str, str]) -> Drawn:
    """Score against KV memory, a panel per setting, with the Pareto front."""
    chosen = _chosen(found, lambda part: part.task.iloc[0] not in SPEC["timed"], least=2)
    note = (
        "KV memory while decoding. Bars: 95% bootstrap intervals over samples. Grey line: no method"
        " with less memory scores better."
    )
    yield from _memory_panels("pareto", "Score against KV memory", note, chosen, named, "score")


def distance(found: Settings, named: dict[str, str]) -> Drawn:
    """KL divergence from the full cache against KV memory, a panel per setting."""
    chosen = _chosen(found, lambda part: part.kl_to_full.notna().any())
    note = (
        "KL divergence of the next-token distribution from the full cache's, on the full cache's"
        " answers; 0: no difference. Bars: 95% bootstrap intervals over samples."
    )
    title = "Distance to the full cache against KV memory"
    yield from _memory_panels("distance", title, note, chosen, named, "kl_to_full")


def _memory_panels(
    name: str, title: str, note: str, chosen: Settings, named: dict[str, str], metric: str
) -> Drawn:
    """A panel per setting, and one with means for settings that differ only in the seed."""
    if not chosen:
        return
    shown = flat(chosen)
    whole = pd.concat(shown)
    means = across_seeds(whole)
    figure, axes = panels(len(chosen) + len(means))
    for axis, (setting, parts) in zip(axes, (chosen | means).items(), strict=True):
        first = next(iter(parts.values()))
        if setting in means:
            values = [over_parts(part, "seed", metric, every=whole) for part in parts.values()]
            seeds = ", ".join(map(str, sorted(first.seed.unique())))
            told = f"{first.task.iloc[0]}, {first.model.iloc[0]}, mean of seeds {seeds}"
        else:
            values = [estimate(part, metric, every=whole) for part in parts.values()]
            told = f"{_title(first, named)}, n = {len(first)}"
        _against_memory(axis, list(parts.values()), values, told)
        if metric == "score":
            axis.set_ylabel(first.headline.iloc[0])
            if not any(one.value for one in values):
                axis.set_ylim(bottom=-0.02)
            memory = map(_memory, parts.values())
            points = zip(memory, [one.value or 0.0 for one in values], strict=True)
            best = front(*zip(*points, strict=True), first.higher_is_better.iloc[0])
            style = {"color": "#888888", "lw": 0.8, "drawstyle": "steps-post", "zorder": 0}
            axis.plot([x for x, _ in best], [y for _, y in best], **style)
        else:
            axis.set_ylabel("KL to full (nats a token)")
            axis.set_ylim(bottom=0)
    methods = [part.method.iloc[0] for part in shown]
    note = f"{note} {named_grey(methods, highlighted(methods))}".strip()
    note += " Means of several seeds: 95% intervals over the seeds." if means else ""
    note += " Hollow: more is held than the budget." if any(map(mark, shown)) else ""
    yield name, title, note, figure, shown


def _memory(part: pd.DataFrame) -> float:
    """Mean size of keys and values in MB."""
    return float(np.nan_to_num(part.kv_nbytes_mean.mean())) / 1e6


def _against_memory(
    axis: Any, parts: Sequence[pd.DataFrame], values: Sequence[Estimate], title: str
) -> None:
    """Draws points with intervals over KV memory; a line joins a method's budgets."""
    coloured = highlighted([part.method.iloc[0] for part in parts])
    axis.set_xlim(0, 1.1 * max(map(_memory, parts)) or 1)
    lines: dict[tuple[str, str, str], list[tuple[float, float, str]]] = {}
    for part, found in zip(parts, values, strict=True):
        one, at, value = part.iloc[0], _memory(part), found.value or 0.0
        _, color, marker = style_of(one.method)
        color, layer = (color, 3) if one.method in coloured else (GREY, 2)
        if found.ends:
            axis.vlines(at, *found.ends, color=color, lw=1, alpha=0.5, zorder=layer)
        name = _name(part)
        style = {"ms": 5, "ls": "", "label": name, "zorder": layer}
        fill = "none" if mark(part) else color
        axis.plot(at, value, marker, color=color, markerfacecolor=fill, **style)
        lines.setdefault((_parameters(part), one.label, one.method), []).append((at, value, name))
    ends = []
    for (*_, method), spots in lines.items():
        spots.sort()
        color = style_of(method).color if method in coloured else GREY
        axis.plot(*zip(*[spot[:2] for spot in spots], strict=True), color=color, lw=0.6, zorder=1)
        if method in coloured:
            ends.append((*spots[-1], color))
    axis.set_title("\n".join(wrap(title, 44)), fontsize=8)
    axis.set_xlabel("KV cache, mean (MB)")
    name_ends(axis, ends)


def _parameters(part: pd.DataFrame) -> str:
    """What the row's name says behind the method and its budget."""
    return str(part.row.iloc[0]).partition(",")[2]


def _name(part: pd.DataFrame) -> str:
    """The method with its mark and its parameters."""
    return ", ".join(filter(None, [called(part.label.iloc[0]) + mark(part), _parameters(part)]))


def front(
    memory: Sequence[float], scores: Sequence[float], higher_is_better: bool
) -> list[tuple[float, float]]:
    """The Pareto front: points (memory, score) that no point with less or equal memory beats."""
    sign = 1 if higher_is_better else -1
    best: list[tuple[float, float]] = []
    for x, y in sorted(zip(memory, scores, strict=True), key=lambda p: (p[0], -sign * p[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best


def maps(found: Settings, named: dict[str, str]) -> Drawn:
    """Scores by two settings of a task as a map, a panel per row."""
    chosen = _chosen(found, _mapped)
    for number, parts in enumerate(chosen.values()):
        shown = list(parts.values())
        (x, x_label), (y, y_label) = SPEC["maps"][shown[0].task.iloc[0]]
        most = 3 if len(shown) <= 6 else 5
        figure, axes = panels(len(shown), 2.4, 2.3, most)
        for axis, part in zip(axes, shown, strict=True):
            cells = part.score.astype(float).groupby([_told(part, y), _told(part, x)]).mean()
            cells = cells.unstack()
            drawn = axis.imshow(cells, cmap="cividis", aspect="auto", vmin=0, vmax=1)
            for (down, across), value in np.ndenumerate(cells):
                style = {"ha": "center", "va": "center", "fontsize": 8}
                color = "white" if value < 0.6 else "black"
                axis.text(across, down, f"{value:.3g}", color=color, **style)
            axis.set_xticks(range(cells.shape[1]), map(_number, cells.columns))
            axis.set_yticks(range(cells.shape[0]), map(_number, cells.index))
            axis.grid(False)
            axis.set_title(called(marked(part)), fontsize=8)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        rows = -(-len(shown) // most)
        label = shown[0].headline.iloc[0]
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8 / rows, aspect=12)
        title = f"{_title(shown[0], named)}: {label} by {x} and {y}"
        yield f"map_{number}", title, f"{len(shown[0])} samples a panel.", figure, shown


def _mapped(part: pd.DataFrame) -> bool:
    """Whether the task has a map, and the samples have both of its coordinates."""
    axes = SPEC["maps"].get(part.task.iloc[0], ())
    return bool(axes) and all(_told(part, name).notna().any() for name, _ in axes)


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value}"


def by_question(found: Settings, named: dict[str, str]) -> Drawn:
    """Score by question number: what a method forgets of a context with several questions."""
    note = (
        "A context is compressed once. In a conversation the questions follow each other in one"
        " cache; otherwise each question gets a copy of it."
    )
    yield from _curves(found, named, "question", "Score by question number", note)


def by_length(found: Settings, named: dict[str, str]) -> Drawn:
    """Score by length of the prompt, for tasks without a map."""
    own = _chosen(found, lambda part: not _mapped(part))
    yield from _curves(own, named, "length", "Score by length of the prompt", "Lengths in tokens.")


def points(part: pd.DataFrame, key: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The score and its interval by a whole number in the samples' `meta`, ascending.

    Args:
        rows: all rows of the setting; an interval stays within their scores.
    """
    told = _told(part, key)
    known = told.map(lambda one: isinstance(one, int))
    groups = part[known].groupby(told[known].astype(int))
    found = {number: estimate(own, every=rows) for number, own in groups}
    return pd.DataFrame.from_dict(found, orient="index", columns=Estimate._fields)


def _told(part: pd.DataFrame, key: str) -> pd.Series:
    """The samples' `meta` of a key; None for samples without it."""
    values = [meta.get(key) if isinstance(meta, dict) else None for meta in part.meta]
    return pd.Series(values, part.index, dtype=object)  # whole numbers stay whole


def _curves(found: Settings, named: dict[str, str], key: str, title: str, note: str) -> Drawn:
    """A panel per setting and budget, each with the full cache."""
    chosen = _chosen(found, lambda part: len(points(part, key, part)) > 1)
    drawn: list[list[pd.DataFrame]] = []
    for parts in chosen.values():
        budgets = {row: str(part.budget.iloc[0]) for row, part in parts.items() if row != REFERENCE}
        for budget in dict.fromkeys(budgets.values()) or [""]:
            own = [part for row, part in parts.items() if budgets.get(row, budget) == budget]
            drawn.append(own)
    if not drawn:
        return
    whole = pd.concat(flat(chosen))
    figure, axes = panels(len(drawn))
    for axis, parts in zip(axes, drawn, strict=True):
        coloured = highlighted([part.method.iloc[0] for part in parts])
        ends = []
        for part in parts:
            one, values = part.iloc[0], points(part, key, whole)
            _, color, marker = style_of(one.method)
            color, layer = (color, 3) if one.method in coloured else (GREY, 2)
            look = {"color": color, "lw": 1, "zorder": layer, "clip_on": False}
            line = "--" if one.method == REFERENCE else "-"
            axis.plot(values.index, values.value, marker=marker, ms=4, ls=line, **look)
            known = values.dropna()
            axis.vlines(known.index, known.low, known.high, alpha=0.5, **look)
            if one.method in coloured:
                ends.append((values.index[-1], values.value.iloc[-1], _name(part), color))
        first, fewest = parts[-1], min(map(len, parts))
        asked = (first.task_settings.iloc[0] or {}).get("asked") if key == "question" else None
        budget = first.budget.iloc[0]
        title_of = _title(first, named) + ("" if unknown(budget) else f", budget {budget}")
        axis.set_title("\n".join([*wrap(title_of, 44), *([asked] if asked else [])]), fontsize=8)
        axis.set_xlabel(f"{CURVES[key]}; {fewest // len(values)} samples a point")
        axis.set_ylabel(first.headline.iloc[0])
        axis.set_xticks(list(values.index))
        if key == "length":
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(values.index), [f"{n:,}" for n in values.index])
            axis.minorticks_off()
        axis.set_ylim(bottom=0)
        name_ends(axis, ends)
    methods = [part.method.iloc[0] for part in flat(chosen)]
    note = f"{note} Bars: 95% intervals. {named_grey(methods, highlighted(methods))}".strip()
    yield f"by_{key}", title, note, figure, flat(chosen)
