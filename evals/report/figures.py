"""Figures of a frame of samples, as PNG files.

Points stand at the memory that was measured, and are named where they stand: at most LABELLED
methods of a panel in colour, the others grey.
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

from evals.report.methods import place, style_of  # noqa: E402
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
    score,
    settings,
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
}
ROW = 0.18  # inches of a legend's row
LABELLED = 8  # methods of a panel that have a colour and a name
GREY = "#BBBBBB"
CURVES = {"question": "question", "length": "prompt (tokens)"}


@dataclass(frozen=True)
class Figure:
    """A picture and what it shows."""

    title: str
    path: Path
    note: str
    width: int  # pixels on a page

    @property
    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


# Of each figure: the file's stem, its title, what a reader must know, the figure, what is in it.
Drawn = Iterator[tuple[str, str, str, Any, Sequence[pd.DataFrame]]]
Settings = dict[str, Parts]


def draw_all(rows: pd.DataFrame, folder: Path) -> list[Figure]:
    """Every figure for which there are rows, as PNG files in `folder`."""
    kinds = (pareto, distance, maps, by_question, by_length)
    return [
        one for draw in kinds for one in _saved(draw, rows, lambda name: folder / f"{name}.png")
    ]


def draw_pareto(rows: pd.DataFrame, path: Path) -> bool:
    """Scores against KV memory alone, if there are two methods to compare."""
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
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            plt.close(figure)
            note = f"{note} {over_note(shown)}".strip()
            figures.append(Figure(title, path, note, round(96 * figure.get_figwidth())))
    return figures


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
    widest = 0.45 + 0.075 * max(map(len, names), default=1)  # inches of an entry, at this font size
    columns = max(1, min(int(figure.get_figwidth() / widest), len(names)))
    figure.set_figheight(figure.get_figheight() + ROW * -(-len(names) // columns))
    where = {"loc": "outside upper center", "ncols": columns}
    figure.legend([entries[name] for name in names], names, **where)


def name_points(axis: Any, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes names beside points (x, y, name, color), each where it covers the fewest others."""
    taken: list[tuple[float, float]] = [axis.transData.transform((x, y)) for x, y, *_ in points]
    size = axis.figure.dpi * 0.1
    for x, y, name, color in points:
        at = axis.transData.transform((x, y))
        best, least = (6, 3, "left"), np.inf
        for dx, dy, align in ((6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right")):
            ends = at[0] + np.linspace(0, np.sign(dx) * size * 0.55 * len(name), 4)
            spots = [(end, at[1] + dy * 1.4) for end in ends]
            near = sum(abs(a - c) < size and abs(b - d) < size for a, b in spots for c, d in taken)
            outside = axis.bbox.width + axis.bbox.x0 < ends[-1] or ends[-1] < axis.bbox.x0
            if (cost := near + 5 * outside) < least:
                best, least, chosen = (dx, dy, align), cost, spots
        taken += chosen
        style = {"fontsize": 7, "color": color, "ha": best[2], "annotation_clip": False}
        axis.annotate(name, (x, y), best[:2], textcoords="offset points", **style)


def highlighted(methods: Sequence[str]) -> set[str]:
    """Those that a panel names in colour: of many, the first by :func:`place`."""
    return set(sorted(dict.fromkeys(methods), key=place)[:LABELLED])


def _chosen(found: Settings, keep: Callable[[pd.DataFrame], Any], least: int = 1) -> Settings:
    """The settings that have so many rows that are to be drawn."""
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
    """Score against KV memory, a panel per setting; the line joins what nothing smaller beats."""
    chosen = _chosen(found, lambda part: part.task.iloc[0] not in SPEC["timed"], least=2)
    note = (
        "KV memory while decoding. Bars: 95% bootstrap intervals over samples. Grey line: what"
        " nothing of less memory beats."
    )
    yield from _memory_panels("pareto", "Score against KV memory", note, chosen, named, "score")


def distance(found: Settings, named: dict[str, str]) -> Drawn:
    """How far the next token's distribution is from the full cache's, against KV memory."""
    chosen = _chosen(found, lambda part: part.kl_to_full.notna().any())
    note = (
        "Divergence of the next-token distribution from the full cache's, while both read the full"
        " cache's answers: 0 is no difference. Bars: 95% bootstrap intervals over samples."
    )
    title = "Distance to the full cache against KV memory"
    yield from _memory_panels("distance", title, note, chosen, named, "kl_to_full")


def _memory_panels(
    name: str, title: str, note: str, chosen: Settings, named: dict[str, str], metric: str
) -> Drawn:
    """A panel per setting, and one of means for settings that differ in the seed alone."""
    if not chosen:
        return
    shown = flat(chosen)
    whole = pd.concat(shown)
    means = across_seeds(whole)
    figure, axes = panels(len(chosen) + len(means))
    for axis, (setting, parts) in zip(axes, (chosen | means).items(), strict=True):
        first = next(iter(parts.values()))
        if setting in means:
            values = [over_parts(part, "seed", metric) for part in parts.values()]
            seeds = ", ".join(map(str, sorted(first.seed.unique())))
            told = f"{first.task.iloc[0]}, {first.model.iloc[0]}, mean of seeds {seeds}"
        else:
            values = [
                score(part, whole) if metric == "score" else estimate(part, metric)
                for part in parts.values()
            ]
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
    note += " Means of several seeds: 95% intervals over the seeds." if means else ""
    note += " Hollow: more is held than the budget." if any(map(mark, shown)) else ""
    yield name, title, note, figure, shown


def _memory(part: pd.DataFrame) -> float:
    """Mean megabytes of keys and values."""
    return float(np.nan_to_num(part.kv_nbytes_mean.mean())) / 1e6


def _against_memory(
    axis: Any, parts: Sequence[pd.DataFrame], values: Sequence[Estimate], title: str
) -> None:
    """Points and intervals over KV memory; points of one method at several budgets are joined."""
    chosen = highlighted([part.method.iloc[0] for part in parts])
    axis.set_xlim(0, 1.25 * max(map(_memory, parts)) or 1)
    points, lines = [], {}
    for part, found in zip(parts, values, strict=True):
        one, at, value = part.iloc[0], _memory(part), found.value or 0.0
        _, color, marker = style_of(one.method)
        color = color if one.method in chosen else GREY
        if found.ends:
            axis.vlines(at, *found.ends, color=color, lw=1, alpha=0.5)
        told, fill = f"{one.label}{mark(part)}", "none" if mark(part) else color
        style = {"ms": 5, "ls": "", "label": told, "markerfacecolor": fill}
        axis.plot(at, value, marker, color=color, **style)
        lines.setdefault((one.label, one.method), []).append((at, value, told, color))
    for spots in lines.values():
        spots.sort(key=lambda spot: spot[:2])
        axis.plot(*zip(*[spot[:2] for spot in spots], strict=True), color=spots[0][3], lw=0.6)
        points += spots[-1:]
    axis.set_title("\n".join(wrap(title, 44)), fontsize=8)
    axis.set_xlabel("KV cache, mean (MB)")
    axis.figure.draw_without_rendering()
    name_points(axis, points)


def front(
    memory: Sequence[float], scores: Sequence[float], higher_is_better: bool
) -> list[tuple[float, float]]:
    """The points (memory, score) that no point of less or equal memory beats, by memory."""
    sign = 1 if higher_is_better else -1
    best: list[tuple[float, float]] = []
    for x, y in sorted(zip(memory, scores, strict=True), key=lambda p: (p[0], -sign * p[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best


def maps(found: Settings, named: dict[str, str]) -> Drawn:
    """Scores by two settings of a task, a panel per row."""
    chosen = _chosen(found, lambda part: part.task.iloc[0] in SPEC["maps"])
    for number, parts in enumerate(chosen.values()):
        shown = list(parts.values())
        (x, x_label), (y, y_label) = SPEC["maps"][shown[0].task.iloc[0]]
        most = 3 if len(shown) <= 6 else 5
        figure, axes = panels(len(shown), 2.4, 2.3, most)
        for axis, part in zip(axes, shown, strict=True):
            meta = pd.DataFrame(part.meta.tolist(), index=part.index)
            if not {x, y} <= set(meta):
                continue
            cells = part.score.astype(float).groupby([meta[y], meta[x]]).mean().unstack()
            drawn = axis.imshow(cells, cmap="cividis", aspect="auto", vmin=0, vmax=1)
            for (down, across), value in np.ndenumerate(cells):
                style = {"ha": "center", "va": "center", "fontsize": 8}
                color = "white" if value < 0.6 else "black"
                axis.text(across, down, f"{value:.3g}", color=color, **style)
            axis.set_xticks(range(cells.shape[1]), map(_number, cells.columns))
            axis.set_yticks(range(cells.shape[0]), map(_number, cells.index))
            axis.grid(False)
            axis.set_title(marked(part), fontsize=8)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        rows = -(-len(shown) // most)
        label = shown[0].headline.iloc[0]
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8 / rows, aspect=12)
        title = f"{_title(shown[0], named)}: {label} by {x} and {y}"
        yield f"map_{number}", title, f"{len(shown[0])} samples a panel.", figure, shown


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value}"


def by_question(found: Settings, named: dict[str, str]) -> Drawn:
    """What a method forgets: the score of the first question on a context, the second, ..."""
    note = (
        "Every context is compressed once. In a conversation the questions follow each other on one"
        " cache; else each is put to a copy of it."
    )
    yield from _curves(found, named, "question", "Score by question number", note)


def by_length(found: Settings, named: dict[str, str]) -> Drawn:
    """Of tasks with prompts of several lengths, but for those that draw a map of them."""
    own = _chosen(found, lambda part: part.task.iloc[0] not in SPEC["maps"])
    yield from _curves(own, named, "length", "Score by length of the prompt", "Lengths in tokens.")


def points(part: pd.DataFrame, key: str) -> pd.Series:
    """Mean headline by a number in the samples' `meta`, ascending."""
    told = part.meta.map(lambda meta: meta.get(key) if isinstance(meta, dict) else None)
    known = told.map(lambda one: isinstance(one, int))
    return part.score[known].astype(float).groupby(told[known].astype(int)).mean()


def _curves(found: Settings, named: dict[str, str], key: str, title: str, note: str) -> Drawn:
    chosen = _chosen(found, lambda part: len(points(part, key)) > 1)
    if not chosen:
        return
    figure, axes = panels(len(chosen))
    for axis, parts in zip(axes, chosen.values(), strict=True):
        coloured = highlighted([part.method.iloc[0] for part in parts.values()])
        for under, part in enumerate(parts.values()):
            method, values = part.method.iloc[0], points(part, key)
            _, color, marker = style_of(method)
            # Scores of few samples coincide: a curve under others is wider, so that it shows.
            width = 1.2 + 4 * under / len(parts)
            look = {"color": color if method in coloured else GREY, "marker": marker}
            look |= {"linewidth": width, "markersize": 3 + width, "zorder": 3 - under / len(parts)}
            look |= {"linestyle": "--"} if method == REFERENCE else {}
            axis.plot(values.index, values, label=marked(part), clip_on=False, **look)
        first, fewest = next(iter(parts.values())), min(map(len, parts.values()))
        asked = (first.task_settings.iloc[0] or {}).get("asked") if key == "question" else None
        told = [*wrap(_title(first, named), 44), *([asked] if asked else [])]
        axis.set_title("\n".join(told), fontsize=8)
        axis.set_xlabel(f"{CURVES[key]}; {fewest // len(values)} samples a point")
        axis.set_ylabel(first.headline.iloc[0])
        axis.set_xticks(list(values.index))
        if key == "length":
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(values.index), [f"{n:,}" for n in values.index])
            axis.minorticks_off()
        axis.set_ylim(bottom=0)
    legend(figure, axes)
    yield f"by_{key}", title, note, figure, flat(chosen)
