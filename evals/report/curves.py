"""Scores over what samples differ in: the number of their question, the length of their prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from evals.report.drawing import legend, panels
from evals.report.kinds import kind
from evals.report.marks import label
from evals.report.methods import style_of
from evals.results.compare import REFERENCE
from evals.results.runs import Run

XLABELS = {"question": "question", "length": "prompt (tokens)"}

Drawn = Iterator[tuple[str, str, str, Any, Sequence[Run]]]  # as of evals.report.figures


def by_question(runs: Sequence[Run]) -> Drawn:
    """What a method forgets: the score of the first question on a context, the second, ..."""
    note = (
        "Every context is compressed once. In a conversation the questions follow each other on one"
        " cache; else each is put to a copy of it."
    )
    yield from _curves(runs, "question", "Score by question number", note)


def by_length(runs: Sequence[Run]) -> Drawn:
    """Of tasks with prompts of several lengths, but for those that draw a map of them."""
    own = [run for run in runs if kind(run).picture is None]
    yield from _curves(own, "length", "Score by length of the prompt", "Lengths in tokens.")


def _curves(runs: Sequence[Run], key: str, title: str, note: str) -> Drawn:
    settings: dict[str, list[Run]] = {}
    for run in runs:
        if len(points(run, key)) > 1:
            settings.setdefault(run.setting, []).append(run)
    if not settings:
        return
    figure, axes = panels(len(settings))
    for axis, group in zip(axes, settings.values(), strict=True):
        for under, run in enumerate(group):
            style = style_of(run.method)
            # Scores of few samples coincide: a curve under others is wider, so that it shows.
            width = 1.2 + 4 * under / len(group)
            look = {"color": style.color, "marker": style.marker, "clip_on": False}
            look |= {"linewidth": width, "markersize": 3 + width, "zorder": 3 - under / len(group)}
            if run.method == REFERENCE:
                look["linestyle"] = "--"
            values = points(run, key)
            axis.plot(list(values), list(values.values()), label=label(run, group), **look)
        first = group[0]
        parts = [] if first.compress == "prompt" else [f"compress={first.compress}"]
        if (asked := first.config["task"].get("asked")) and key == "question":
            parts.append(asked)
        how = [", ".join(parts)] if parts else []
        axis.set_title("\n".join([f"{first.task}, {first.model}", *how]))
        axis.set_xlabel(f"{XLABELS[key]}; {_samples(group, key)}")
        axis.set_ylabel(first.summary["headline"])
        axis.set_xticks(list(points(first, key)))
        if key == "length":
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(points(first, key)), [f"{n:,}" for n in points(first, key)])
            axis.minorticks_off()
        axis.set_ylim(bottom=0)
    legend(figure, axes)
    shown = [run for group in settings.values() for run in group]
    yield f"by_{key}", title, note, figure, shown


def points(run: Run, key: str) -> dict[int, float]:
    """Mean headline by a number in the samples' `meta`, ascending."""
    return {number: statistics.fmean(scores) for number, scores in _scores(run, key).items()}


def _scores(run: Run, key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in run.ran:
        if isinstance(number := record.get("meta", {}).get(key), int):
            found.setdefault(number, []).append(record["scores"][run.summary["headline"]])
    return {number: found[number] for number in sorted(found)}


def _samples(runs: Sequence[Run], key: str) -> str:
    """How many a point is the mean of."""
    counts = {len(scores) for run in runs for scores in _scores(run, key).values()}
    ends = dict.fromkeys(f"{end}" for end in (min(counts), max(counts)))
    return f"{' to '.join(ends)} samples a point"
