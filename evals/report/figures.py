"""Figures of runs, as PNG files."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.report.chosen import families, left_to_budget
from evals.report.curves import by_length, by_question
from evals.report.drawing import RC, legend, panels, plt
from evals.report.kinds import kind
from evals.report.marks import budget_text, held, label, mark, over_note, varied
from evals.report.methods import place, style_of
from evals.report.speed import alone
from evals.report.tables import ordered
from evals.results.compare import REFERENCE
from evals.results.runs import Run, length_bin
from evals.results.schema import Record
from evals.results.statistics import bootstrap
from evals.tasks.picture import heat

APART = 0.015  # of the axis, between the first and the last of methods that hold equally much
SWEPT = ("window", "sink", "threshold", "stride")
MANY = 12  # runs of which a figure shows one per method and budget


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


def draw_all(runs: Sequence[Run], folder: Path) -> list[Figure]:
    """Every figure for which there are runs, as PNG files in `folder`."""
    kinds = (
        *(pareto, fidelity, pictures, by_question, by_length),
        *(positions, sensitivity, decode_time),
    )
    return [
        one for draw in kinds for one in _saved(draw, runs, lambda name: folder / f"{name}.png")
    ]


def draw_pareto(runs: Sequence[Run], path: Path) -> list[Figure]:
    """Scores against KV memory alone, if there are two runs to compare."""
    return _saved(pareto, runs, lambda name: path)


def _saved(
    draw: Callable[[Sequence[Run]], Drawn], runs: Sequence[Run], where: Callable[[str], Path]
) -> list[Figure]:
    figures = []
    with plt.rc_context(RC):
        for name, title, note, figure, shown in draw([run for run in ordered(runs) if run.scored]):
            path = where(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            plt.close(figure)
            note = " ".join(filter(None, [note, over_note((run, held(run)) for run in shown)]))
            figures.append(Figure(title, path, note, round(96 * figure.get_figwidth())))
    return figures


# Of each figure: the file's stem, its title, what a reader must know, the figure, the runs in it.
Drawn = Iterator[tuple[str, str, str, Any, Sequence[Run]]]


def _by(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _title(run: Run) -> str:
    text = f"{run.task}, {run.model}, seed {run.config['seed']}"
    variant = run.config["task"].get("variant", "single")
    return text if variant == "single" else f"{text}, {variant}"


def pareto(runs: Sequence[Run]) -> Drawn:
    """Score against KV memory, a panel per setting; the line joins runs that no other beats."""
    answered = [run for run in runs if not kind(run).timed]
    groups = [g for g in _by(answered, lambda run: run.setting).values() if len(g) > 1]
    if not groups:
        return
    figure, axes = panels(len(groups))
    for axis, group in zip(axes, groups, strict=True):
        memory = [_memory(run) for run in group]
        scores = [run.score() or 0.0 for run in group]
        _against_memory(axis, group, [(run.score(), run.score_interval()) for run in group])
        best = front(memory, scores, group[0].summary["higher_is_better"])
        style = {"color": "#888888", "lw": 0.8, "drawstyle": "steps-post", "zorder": 0}
        axis.plot([x for x, _ in best], [y for _, y in best], **style)
        axis.set_ylabel(group[0].summary["headline"])
        if not any(scores):
            axis.set_ylim(-0.02, 1)
    legend(figure, axes)
    note = (
        "KV memory while decoding. Bars: 95% bootstrap intervals over samples. Grey: the front of"
        " runs that none of less memory beats. Methods of one budget are drawn a little apart."
    )
    shown = [run for group in groups for run in group]
    yield "pareto", "Score against KV memory", note + _hollow(shown), figure, shown


def fidelity(runs: Sequence[Run]) -> Drawn:
    """How far the next token's distribution is from the full cache's, against KV memory."""
    groups = _by([run for run in runs if run.kl()[0] is not None], lambda run: run.setting)
    if not groups:
        return
    figure, axes = panels(len(groups))
    for axis, group in zip(axes, groups.values(), strict=True):
        _against_memory(axis, group, [run.kl() for run in group])
        axis.set_ylabel("KL to full cache (nats a token)")
        axis.set_ylim(bottom=0)
    legend(figure, axes)
    note = (
        "Divergence of the next-token distribution from the full cache's, while both read the full"
        " cache's answers: 0 is no difference. Bars: 95% bootstrap intervals over samples."
    )
    shown = [run for group in groups.values() for run in group]
    title = "Distance to the full cache against KV memory"
    yield "fidelity", title, note + _hollow(shown), figure, shown


def _hollow(runs: Sequence[Run]) -> str:
    return " Hollow: more is held than the budget." if any(map(mark, runs)) else ""


def _memory(run: Run) -> float:
    """Mean megabytes of keys and values."""
    return (run.mean("kv_nbytes_mean") or 0) / 1e6


def _against_memory(axis: Any, group: Sequence[Run], values: Sequence[tuple[Any, Any]]) -> None:
    """Points and intervals of runs over their KV memory, those of one budget a little apart."""
    widest = max(map(_memory, group))
    methods = sorted({run.method for run in group if run.budget is not None}, key=place)
    for run, (value, interval) in zip(group, values, strict=True):
        _, color, marker = style_of(run.method)
        at = _memory(run)
        if run.budget is not None and len(methods) > 1:
            at += (methods.index(run.method) / (len(methods) - 1) - 0.5) * APART * widest
        if interval:
            axis.vlines(at, *interval, color=color, lw=1, alpha=0.5)
        style = {"ms": 6, "ls": "", "label": f"{run.method}{mark(run)}"}
        fill = "none" if mark(run) else color
        axis.plot(at, value or 0.0, marker, color=color, markerfacecolor=fill, **style)
    axis.set_title(f"{_title(group[0])}, n = {len(group[0].ran)}", fontsize=9)
    axis.set_xlabel("KV cache, mean (MB)")
    axis.set_xlim(0, 1.08 * widest or 1)


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


def pictures(runs: Sequence[Run]) -> Drawn:
    """What a task shows by two of its settings, a panel per run (per method of a swept setting)."""
    chosen = [run for run in runs if kind(run).picture]
    for number, group in enumerate(_by(chosen, lambda run: run.setting).values()):
        picture = kind(group[0]).picture
        assert picture is not None
        shown = group if len(group) <= MANY else _one_each(group)
        most = 3 if len(shown) <= 6 else 5
        figure, axes = panels(len(shown), 2.4, 2.3, most)
        for axis, run in zip(axes, shown, strict=True):
            drawn = picture.draw(axis, run.ran)
            axis.set_title(label(run, shown).replace(" ", "\n", 1), fontsize=8)
        figure.supxlabel(picture.x, fontsize=9)
        figure.supylabel(picture.y, fontsize=9)
        rows = -(-len(shown) // most)
        figure.colorbar(drawn, ax=axes, label=picture.value, shrink=0.8 / rows, aspect=12)
        note = f"{len(shown[0].ran)} samples a panel."
        if len(shown) < len(group):
            note += f" Of {len(group)} runs one per method and budget, the best, is shown."
        title = f"{picture.title}: {_title(group[0])}"
        yield f"{group[0].task}_{number}", title, note, figure, shown


def _one_each(runs: Sequence[Run]) -> list[Run]:
    """The best run of each method and budget."""

    def gain(run: Run) -> float:
        return (run.score() or 0) * (1 if run.summary["higher_is_better"] else -1)

    return [max(group, key=gain) for group in _by(runs, lambda r: (r.method, _budget(r))).values()]


def _budget(run: Run) -> tuple[Any, ...]:
    return run.budget, run.config.get("budget_by") if run.budget is not None else None


def _per_budget(runs: Sequence[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Runs by `key` and budget, with the full cache's in each."""
    found = []
    for group in _by(runs, key).values():
        full = [run for run in group if run.method == REFERENCE]
        others = _by([run for run in group if run.method != REFERENCE], _budget).values()
        found += [[*full, *same] for same in others] or [full]
    return found


def _budget_title(group: Sequence[Run]) -> str:
    """Of runs of one budget, and the full cache's."""
    given = [run for run in group if run.method != REFERENCE]
    if not given:
        return ""
    text = budget_text(given[0], None)
    return "its own sizes" if text == "own" else f"budget {text}"


def positions(runs: Sequence[Run]) -> Drawn:
    """Loss over position in a text."""
    chosen = [run for run in runs if run.ran and run.ran[0].get("blocks")]
    groups = _per_budget(chosen, lambda run: run.setting)
    if not groups:
        return
    figure, axes = panels(len(groups), 4.0, 3.0)
    for axis, group in zip(axes, groups, strict=True):
        shown = group if len(group) <= MANY else _one_each(group)
        for run in shown:
            blocks = [record["blocks"] for record in run.ran]
            curve = [statistics.fmean(losses) for losses in zip(*blocks, strict=True)]
            tokens = statistics.fmean(record["prompt_tokens"] for record in run.ran)
            places = [tokens * (i + 0.5) / len(curve) for i in range(len(curve))]
            _, color, marker = style_of(run.method)
            name = f"{run.method}{mark(run)} {varied(run, shown)}".strip()
            axis.plot(places, curve, color=color, marker=marker, ms=4, lw=1.2, label=name)
        axis.set(xlabel="position (tokens)", ylabel="loss (nats per token)")
        axis.set_title(f"{_title(group[0])}\n{_budget_title(group)}", fontsize=9)
    legend(figure, axes)
    note = f"Means over blocks of the text. Of more than {MANY} runs the best of each method."
    yield "loss_by_position", "Loss by position", note, figure, chosen


def sensitivity(runs: Sequence[Run]) -> Drawn:
    """Score by pairs of BUZZ's parameters, all else equal or averaged over."""
    number = 0
    for whole in _by(
        runs, lambda r: (r.setting, r.method, r.budget, r.config.get("budget_by"))
    ).values():
        group = [r for r in whole if not any(left_to_budget(r, p) for p in _varied(whole))]
        varied = _varied(group)
        couples = [(a, b) for i, a in enumerate(varied) for b in varied[i + 1 :]]
        if not couples:
            continue
        figure, axes = panels(len(couples), 3.0, 2.6)
        values = [run.score() or 0 for run in group]
        low, high = min(values), max(values)
        margin = 0 if high > low else abs(low) / 10 or 0.1
        ends = (low - margin, high + margin)
        for axis, (x, y) in zip(axes, couples, strict=True):
            cells = _by(group, lambda run, x=x, y=y: (run.parameters[x], run.parameters[y]))
            xs, ys = (sorted({cell[i] for cell in cells}) for i in (0, 1))
            image = [[_mean_score(cells.get((a, b), [])) for a in xs] for b in ys]
            marks = [[max(map(mark, cells.get((a, b), [])), default="") for a in xs] for b in ys]
            drawn = heat(axis, image, [str(v) for v in xs], [str(v) for v in ys], ends, marks)
            axis.set(xlabel=x, ylabel=y)
        run = group[0]
        figure.colorbar(drawn, ax=axes, label=run.summary["headline"], shrink=0.8)
        budget = "own sizes" if run.budget is None else f"budget {run.budget}"
        title = f"Sensitivity of {run.method}: {_title(run)}, {budget}"
        note = f"{len(run.ran)} samples a run; a cell is the mean over the parameters not shown."
        yield f"sensitivity_{number}", title, note, figure, group
        number += 1


def _varied(runs: Sequence[Run]) -> list[str]:
    return [p for p in SWEPT if len({run.parameters.get(p) for run in runs}) > 1]


def _mean_score(runs: Sequence[Run]) -> float:
    found = [score for run in runs if (score := run.score()) is not None]
    return statistics.fmean(found) if found else float("nan")


def decode_time(runs: Sequence[Run]) -> Drawn:
    """Time per token by prompt length, a panel per model, machine and budget."""
    swept = {id(r) for parameter in SWEPT for family in families(runs, parameter) for r in family}
    answered = [run for run in runs if id(run) not in swept and any(map(_timed_alone, run.ran))]
    groups = _per_budget(answered, lambda run: (run.model, run.machine))
    if not groups:
        return
    figure, axes = panels(len(groups), 3.6, 2.9)
    for axis, group in zip(axes, groups, strict=True):
        for method, same in _by(group, lambda run: run.method).items():
            bins: dict[int, list[float]] = {}
            for record in (record for run in same for record in run.ran if _timed_alone(record)):
                at = length_bin(record["prompt_tokens"])
                bins.setdefault(at, []).append(record["itl_p50_ms"])
            _, color, marker = style_of(method)
            lengths = sorted(bins)
            means = [statistics.fmean(bins[n]) for n in lengths]
            style = {"color": color, "marker": marker, "ms": 5, "lw": 1.2}
            axis.plot(lengths, means, label=f"{method}{max(map(mark, same))}", **style)
            for n in lengths:
                if interval := bootstrap([bins[n]]):
                    axis.vlines(n, *interval, color=color, lw=1, alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        run = group[-1]
        axis.set_title(f"{run.model}, {_budget_title(group)}\n{run.machine}", fontsize=9)
        axis.set(xlabel="prompt (tokens)", ylabel="time per token, median (ms)")
    legend(figure, axes)
    note = (
        "Batch of 1, without samples timed under load; means over samples of their median, with"
        " 95% bootstrap intervals over samples, which know nothing of how processes differ."
    )
    yield "decode_time", "Decoding time by prompt length", note, figure, answered


def _timed_alone(record: Record) -> bool:
    return alone(record) and bool(record["itl_p50_ms"]) and not record.get("loaded")
