"""Figures of what eviction costs: against memory, by an answer's source, by cells, by spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from evals.report.figures import RC, legend, name_ends, named_grey, panels, plt, save
from evals.report.methods import GREY, MORE, RIVAL, Style, highlighted, order, style_of
from evals.report.views import SPEC
from evals.results.frame import interval
from evals.tasks.types import SPREADS

# Honeycombs that differ in the number of cells alone, and how many they have: one, as H2O, first.
CELLS = {"lazy": "1", "cells_4": "4", "cells_16": "16", "cells_all": "as many\nas stay"}
MEASURES = {
    "kept": "{} kept, of 5",
    "whole": "heads that keep all five",
    "kl_to_full": "KL to the full cache (nats)",
    "score": "accuracy",
}
GUARDS = {"score": {"span": (0, 1)}}  # of samples that never differ


def draw(
    rows: pd.DataFrame, swept: pd.DataFrame, sourced: pd.DataFrame, spread: pd.DataFrame, out: Path
) -> list[Path]:
    """What there is to see: by cells where those were varied, otherwise by memory and by source.

    Args:
        swept, sourced: see :mod:`evals.report.embedded`.
        spread: rows of facts that are told in one place or apart.
    """
    with plt.rc_context(RC):
        if set(CELLS) <= set(swept.method):
            return [_draw_cells(swept, out)]
        paths = [
            _draw_memory(str(task), group, rows[rows.setting == task].prompt_tokens.mean(), out)
            for task, group in swept.groupby("task", sort=True)
        ]
        paths += [_draw_sources(sourced, out)] if len(sourced) else []
        paths += _draw_both(rows, out)
        if len(spread):
            draw_spread(spread, out / "spread.png")
            paths.append(out / "spread.png")
        return paths


def _draw_memory(task: str, group: pd.DataFrame, prompt: float, out: Path) -> Path:
    figure, axes = panels(2, 4.6, 4)
    methods = list(map(str, group.method.unique()))
    styles, coloured = _styles(methods), highlighted(methods)
    ends: tuple[list[Any], list[Any]] = ([], [])
    for method, line in group.sort_values("budget").groupby("method", sort=False):
        label, color, marker = styles[str(method)]
        color, layer = (color, 3) if method in coloured else (GREY, 2)
        style = {"color": color, "marker": marker, "ms": 4, "lw": 1, "zorder": layer}
        at = line.entries_mean / prompt
        axes[0].vlines(at, line.kl_low, line.kl_high, color=color, lw=1, alpha=0.5, zorder=layer)
        for axis, values, named in zip(axes, (line.kl, line.kl_median), ends, strict=True):
            axis.plot(at, values, **style)
            if method in coloured:
                named.append((at.iloc[-1], values.iloc[-1], label, color))
    for axis, what, named in zip(axes, ("mean, 95% interval", "median"), ends, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="entries held, of the prompt")
        axis.set_ylabel(f"KL to full, {what} (nats)")
        if ticks := sorted(one for one in group.budget.unique() if one < 1):  # not of entries
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axis.xaxis.set_minor_formatter(lambda value, _: "")
        name_ends(axis, named)
    least, most = group.n.min(), group.n.max()
    prompts = f"{most}" if least == most else f"{most}, of points without a line {least}"
    told = [f"{task}, n = {prompts}", *wrap(named_grey(methods, coloured), 120)]
    figure.suptitle("\n".join(told), y=0.0, va="top", fontsize=8)
    return save(figure, out / f"fidelity_{task}.png", bbox_inches="tight")


def _draw_both(rows: pd.DataFrame, out: Path) -> list[Path]:
    """Passkeys found against KL to the full cache, at 0.25; none where only one was measured.

    KL is the mean of the data sets' means. Methods that lack a data set are left out.
    """
    rows = rows[(rows.budget == 0.25) & (rows.status == "ok")]
    keys = rows.setting.str.contains("niah_single_1 at")
    texts = rows[~keys & rows.kl_to_full.notna()]
    if not keys.any() or texts.empty:
        return []
    sets = texts.groupby("label").setting.nunique()
    methods = sets.index[sets == texts.setting.nunique()]
    texts = texts[texts.label.isin(methods)]
    known = texts.groupby(["setting", "id"]).label.transform("nunique")
    texts = texts[known == len(methods)]  # prompts that all have
    figure, axes = panels(2, 4.6, 4)
    for axis, unseen in zip(axes, (False, True), strict=True):
        found = rows[keys & (rows.setting.str.endswith("-context") == unseen)]
        ends = []
        for method in methods:
            label, color, mark = _styles([method])[method]
            kl = texts[texts.label == method]
            own = found[found.label == method].score.astype(float)
            if own.empty:
                continue
            x = interval(kl.kl_to_full, group=kl.setting, unit=kl.setting + kl.id)
            y = interval(own, span=(0, 100))
            color = color if method in order() else GREY
            at = (x.value, y.value)
            axis.plot(*at, marker=mark, color=color, ms=7, ls="")
            axis.hlines(at[1], x.low, x.high, color=color, lw=1, alpha=0.5)
            axis.vlines(at[0], y.low, y.high, color=color, lw=1, alpha=0.5)
            name = label if method in order() else f"honeycomb, {method.replace('_', ' ')}"
            ends.append((at[0], at[1] + 2.6, name, color))  # above its interval
        name_ends(axis, ends)
        axis.set(xlabel="KL to the full cache, nats a token", ylabel="passkeys found (%)")
        axis.set(ylim=(-4, 106), xlim=(0, None))
        axis.set_title("compressed before the question" if unseen else "question in sight")
    return [save(figure, out / "both.png", bbox_inches="tight")]


def _styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each; settings of a method, which are not registered, get one in turn."""
    settings = [name for name in sorted(methods) if name not in order()]
    return {name: style_of(name) for name in methods} | {
        name: Style(name, *look) for name, look in zip(settings, MORE, strict=False)
    }


def _draw_cells(summary: pd.DataFrame, out: Path) -> Path:
    """KL less H2O's by the number of cells, of H2O's scores, evicted as seldom."""
    tasks = sorted(summary.task.unique())
    figure, axes = panels(len(tasks), 3.6, 3.2)
    places, less = np.arange(len(CELLS)), f"kl_less_{RIVAL}"
    for axis, task in zip(axes, tasks, strict=True):
        for budget, group in summary[summary.task == task].groupby("budget"):
            line = group.set_index("method").loc[list(CELLS)]
            (drawn,) = axis.plot(places, line[less], marker="H", label=f"{budget:g}")
            ends = line[f"{less}_low"], line[f"{less}_high"]
            axis.vlines(places, *ends, drawn.get_color(), lw=1, alpha=0.6)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set(title=f"{task}, n = {group.n.max()}", xlabel="cells")
        axis.set_ylabel("KL less H2O's (nats)")
        axis.set_xticks(places, list(CELLS.values()))
    axes[0].legend(title="budget", loc="upper left")
    return save(figure, out / "cells.png", bbox_inches="tight")


def _draw_sources(chosen: pd.DataFrame, out: Path) -> Path:
    """KL of each prompt by where the answer's longest match begins, in BUZZ's windows."""
    tasks = sorted(chosen.task.unique())
    figure, axes = panels(len(tasks), 3.6, 3.2)
    for axis, task in zip(axes, tasks, strict=True):
        for method, group in chosen[chosen.task == task].groupby("label", sort=False):
            label, color, marker = style_of(str(method))
            style = {"color": color, "marker": marker, "s": 12, "alpha": 0.7, "label": label}
            axis.scatter(group.windows, group.kl_to_full, **style)
        axis.axvline(1, color="black", lw=0.7, ls=":")
        axis.set(xscale="log", yscale="log", title=task, ylabel="KL to full (nats)")
    figure.supxlabel("distance of the answer's source from the prompt's end, in BUZZ's windows")
    legend(figure, axes)
    return save(figure, out / "sources.png", bbox_inches="tight")


def draw_spread(rows: pd.DataFrame, path: Path) -> Any:
    """A column a task, a row a measure: methods over the three ways to spread five facts."""
    tasks = list(rows.task.unique())
    coloured = highlighted(list(rows.label.unique()))
    with plt.rc_context(RC):
        figure, axes = panels(len(MEASURES) * len(tasks), height=2.3, most=len(tasks))
        grid: list[tuple[str, Any]] = [(name, task) for name in MEASURES for task in tasks]
        for axis, (name, task) in zip(axes, grid, strict=True):
            for method, own in rows[rows.task == task].groupby("label", sort=False):
                if method == "full" and name == "kl_to_full":
                    continue
                values = [own[own.spread == one][name].astype(float) for one in SPREADS]
                found = [interval(one, **GUARDS.get(name, {"guard": False})) for one in values]
                style, shown = style_of(str(method)), method in coloured
                look: dict[str, Any] = {"color": style.color if shown else GREY, "lw": 1}
                label = style.label if shown else "_"
                means = [one.value for one in found]
                axis.plot(SPREADS, means, label=label, marker=style.marker, ms=4, **look)
                for x, one in zip(SPREADS, found, strict=True):
                    if one.ends:
                        axis.vlines(x, *one.ends, alpha=0.4, **look)
            axis.set_title(f"{task}: {MEASURES[name].format(SPEC['facts'].get(task, 'facts'))}")
            axis.set_ylim(bottom=0)
        legend(figure, axes)
        grey = named_grey(list(rows.label.unique()), coloured)
        figure.supxlabel("\n".join(wrap(grey, 100)) or None, fontsize=8)
        save(figure, path, bbox_inches="tight")
    return figure
