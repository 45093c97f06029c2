"""One HTML file with everything in it: verdicts, pictures, tables, what the models wrote."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from evals.report.figures import Figure
from evals.report.forms import Table
from evals.report.marks import label
from evals.report.tables import ordered
from evals.report.verdicts import FAILS, HOLDS, NOT_RUN, Claim, Judged
from evals.results.runs import Run

ANSWERS = 2  # samples shown per setting
LONGEST = 700  # characters of an answer
CLASSES = {HOLDS: "holds", FAILS: "fails"}
FIRST = ("pareto", "fidelity")  # figures that are not folded away
COUNTED = {  # how claims stand, as the first lines count them
    HOLDS: "hold on the models that they are about",
    FAILS: "do not hold",
    "open": "are undecided, or answered for a small model alone",
    NOT_RUN: "wait for runs",
}


def page(
    runs: Sequence[Run],
    judged: Sequence[Judged],
    claims: Table,
    groups: Mapping[str, Sequence[Table]],
    figures: Iterable[Figure],
) -> str:
    """The report as one self-contained document. All text from runs is escaped.

    Args:
        groups: tables under a title each; those without rows share one line.
    """
    tables = [table for group in groups.values() for table in group]
    shown = {name: [t for t in group if not t.frame.empty] for name, group in groups.items()}
    figures = list(figures)
    cards = list(_cards(judged))
    kinds = [kind for _, kind, _ in cards]
    return (
        templates()
        .get_template("report.html")
        .render(
            runs=runs,
            finished=sum(run.status == "complete" for run in runs),
            models=dict.fromkeys(run.model for run in runs),
            machines=dict.fromkeys(run.machine for run in runs),
            tasks=dict.fromkeys(run.task for run in runs),
            methods=dict.fromkeys(run.method for run in ordered(runs)),
            claims=claims,
            classes=CLASSES,
            counted=[
                (kinds.count(kind), words) for kind, words in COUNTED.items() if kind in kinds
            ],
            cards=[card for card in cards if card[1] != NOT_RUN],
            waiting=[claim for claim, kind, _ in cards if kind == NOT_RUN],
            groups={name: group for name, group in shown.items() if group},
            empty=[table.title for table in tables if table.frame.empty],
            figures=[figure for figure in figures if figure.path.stem in FIRST],
            more_figures=[figure for figure in figures if figure.path.stem not in FIRST],
            answers=list(_answers(runs)),
            longest=LONGEST,
        )
    )


def templates() -> Environment:
    """Those of every page: what is put into them is escaped."""
    found = Environment(loader=PackageLoader("evals.report"), autoescape=True, trim_blocks=True)
    found.filters["sha256"] = _sha256
    return found


def _sha256(script: str) -> str:
    """Names a script in the page's security policy, so that no other one runs."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _cards(judged: Sequence[Judged]) -> Iterator[tuple[Claim, str, list[tuple[str, str, str]]]]:
    """Per claim how it stands and its measurements: verdict, value, of what."""
    for claim in dict.fromkeys(one.claim for one in judged):
        own = [one for one in judged if one.claim is claim]
        kinds = {None if one.measured and one.measured.limits else one.kind for one in own}
        alike = kinds.pop() if len(kinds) == 1 else None
        kind = alike if alike in (HOLDS, FAILS, NOT_RUN) else "open"
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
