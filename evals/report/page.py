"""One HTML file with everything in it: tables, pictures, what the models wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from evals.report.figures import Figure
from evals.report.forms import Table
from evals.report.marks import label
from evals.report.tables import ordered
from evals.report.verdicts import FAILS, HOLDS, Claim, Judged
from evals.results.runs import Run

ANSWERS = 2  # samples shown per setting
LONGEST = 700  # characters of an answer
KINDS = {HOLDS: "holds", FAILS: "fails"}


def page(
    runs: Sequence[Run],
    judged: Sequence[Judged],
    claims: Table,
    tables: Iterable[Table],
    figures: Iterable[Figure],
) -> str:
    """The report as one self-contained document. All text from runs is escaped."""
    templates = Environment(loader=PackageLoader("evals.report"), autoescape=True, trim_blocks=True)
    return templates.get_template("report.html").render(
        runs=runs,
        finished=sum(run.status == "complete" for run in runs),
        models=dict.fromkeys(run.model for run in runs),
        machines=dict.fromkeys(run.machine for run in runs),
        claims=claims,
        cards=list(_cards(judged)),
        tables=list(tables),
        figures=list(figures),
        answers=list(_answers(runs)),
        longest=LONGEST,
    )


def _cards(judged: Sequence[Judged]) -> Iterator[tuple[Claim, str, list[tuple[str, str, str]]]]:
    """Per claim how it stands and its measurements: verdict, value, of what."""
    for claim in dict.fromkeys(one.claim for one in judged):
        own = [one for one in judged if one.claim is claim]
        kinds = {None if one.measured and one.measured.limits else one.kind for one in own}
        kind = KINDS.get(kinds.pop(), "open") if len(kinds) == 1 else "open"
        yield claim, kind, [(one.verdict, *_measured(one)) for one in own]


def _measured(one: Judged) -> tuple[str, str]:
    if one.measured is None:
        return "", ""
    m = one.measured
    value = "no number" if m.value is None else f"{m.value:.3g}"
    if m.interval:
        value += f" [{m.interval[0]:.3g}, {m.interval[1]:.3g}]"
    processes = "process" if m.processes == 1 else "processes"
    count = f"n = {m.n}" + (f" in {m.processes} {processes}" if m.processes is not None else "")
    return value, f"{count}; {m.of}; {m.model} on {m.machine}"


def _answers(runs: Sequence[Run]) -> Iterator[tuple[str, list[Any]]]:
    """The first samples of each setting as all its runs answered them."""
    settings: dict[str, list[Run]] = {}
    for run in ordered(runs):
        if run.ran and run.ran[0]["generated_tokens"]:
            settings.setdefault(run.setting, []).append(run)
    for group in settings.values():
        samples = []
        for first in group[0].ran[:ANSWERS]:
            found = [(run, r) for run in group for r in run.ran if r["id"] == first["id"]]
            given = [(label(run, group), record["prediction"]) for run, record in found]
            samples.append((first["id"], " / ".join(first["references"]), given))
        yield f"{group[0].task}, {group[0].model}: {len(samples)} samples", samples
