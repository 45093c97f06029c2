"""Figures of what eviction costs: against memory, by an answer's source, by cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.report.drawing import RC, legend, panels, plt
from evals.report.fidelity_tables import sourced, swept
from evals.report.methods import MORE, RIVAL, Style, order, style_of

# Honeycombs that differ in the number of cells alone, and how many they have: one, as H2O, first.
CELLS = {"lazy": "1", "cells_4": "4", "cells_16": "16", "cells_all": "as many\nas stay"}


def draw(samples: pd.DataFrame, summary: pd.DataFrame, out: Path) -> list[Path]:
    """What there is to see: by cells where those were varied, otherwise by memory and by source."""
    with plt.rc_context(RC):
        if set(CELLS) <= set(summary.method):
            return [_draw_cells(swept(summary), out)]
        paths = [
            _draw_memory(str(task), group, samples[samples.task == task], out)
            for task, group in swept(summary).groupby("task", sort=True)
        ]
        return [*paths, *_draw_sources(samples, out)]


def _draw_memory(task: str, group: pd.DataFrame, samples: pd.DataFrame, out: Path) -> Path:
    figure, axes = panels(2, 4.4, 3.6)
    styles = _styles(group.method.unique())
    for method, line in group.groupby("method", sort=False):
        style, prompt = styles[str(method)], samples.prompt_tokens.mean()
        _draw_method(axes, style, line.sort_values("budget"), prompt)
    for axis, what in zip(axes, ("mean, 95% interval", "median"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="entries held, of the prompt")
        axis.set_ylabel(f"KL to full, {what} (nats)")
        ticks = sorted(group.budget.unique())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axis.xaxis.set_minor_formatter(lambda value, _: "")
    legend(figure, axes)
    least, most = group.n.min(), group.n.max()
    prompts = f"{most}" if least == most else f"{most}, of points without a line {least}"
    figure.suptitle(f"{task}, n = {prompts}", y=0.0, va="top")
    return _save(figure, out / f"fidelity_{task}.png")


def _draw_cells(summary: pd.DataFrame, out: Path) -> Path:
    """KL less H2O's by the number of cells, of H2O's scores, evicted as seldom."""
    tasks = sorted(summary.task.unique())
    figure, axes = panels(len(tasks), 3.6, 3.2)
    places, less = np.arange(len(CELLS)), f"kl_less_{RIVAL}"
    for axis, task in zip(axes, tasks, strict=True):
        for aside, (budget, group) in enumerate(summary[summary.task == task].groupby("budget")):
            line, at = group.set_index("method").loc[list(CELLS)], places + 0.08 * aside
            (drawn,) = axis.plot(at, line[less], marker="H", label=f"{budget:g}")
            axis.vlines(at, line[f"{less}_low"], line[f"{less}_high"], drawn.get_color(), lw=1)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set(
            title=f"{task}, n = {group.n.max()}", xlabel="cells", ylabel="KL less H2O's (nats)"
        )
        axis.set_xticks(places, list(CELLS.values()))
    axes[0].legend(title="budget", loc="upper left")
    return _save(figure, out / "cells.png")


def _styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each; settings of a method, which are not registered, get one in turn."""
    settings = [name for name in sorted(methods) if name not in order()]
    return {name: style_of(name) for name in methods} | {
        name: Style(name, *look) for name, look in zip(settings, MORE, strict=False)
    }


def _draw_method(axes: Sequence[Any], look: Style, line: pd.DataFrame, prompt: float) -> None:
    label, color, marker = look
    style = {"color": color, "marker": marker, "ms": 4, "lw": 1, "label": label}
    at = line.entries_mean / prompt
    axes[0].plot(at, line.kl, **style)
    axes[0].vlines(at, line.kl_low, line.kl_high, color=color, lw=1, alpha=0.5)
    axes[1].plot(at, line.kl_median, **style)


def _draw_sources(samples: pd.DataFrame, out: Path) -> list[Path]:
    """KL of each prompt by where the answer's longest match begins, in BUZZ's windows."""
    chosen = sourced(samples)
    tasks = sorted(chosen.task.unique())
    if not tasks:
        return []
    figure, axes = panels(len(tasks), 3.6, 3.2)
    for axis, task in zip(axes, tasks, strict=True):
        for method, group in chosen[chosen.task == task].groupby("method", sort=False):
            label, color, marker = style_of(str(method))
            style = {"color": color, "marker": marker, "s": 12, "alpha": 0.7, "label": label}
            axis.scatter(group.windows, group.kl, **style)
        axis.axvline(1, color="black", lw=0.7, ls=":")
        axis.set(xscale="log", yscale="log", title=task, ylabel="KL to full (nats)")
    figure.supxlabel("distance of the answer's source from the prompt's end, in BUZZ's windows")
    legend(figure, axes)
    return [_save(figure, out / "sources.png")]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
