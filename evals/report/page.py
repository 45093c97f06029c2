"""The report as one HTML file: scores, verdicts, figures, the models' answers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from evals.report.claims import FAILS, HOLDS, Claim, Judged
from evals.report.figures import Figure
from evals.report.methods import called, highlighted, style_of
from evals.report.table import Table
from evals.report.views import finished, flat, labels, marked, ran, settings, unknown
from evals.results.frame import NOT_RUN, REFERENCE

ANSWERS = 2  # samples per setting whose answers are shown
LONGEST = 700  # characters of an answer that are shown
CLASSES = {HOLDS: "holds", FAILS: "fails"}
FIRST = ("pareto", "distance")  # figures that the page's script replaces by its own
COUNTED = {  # the kinds of verdicts as the summary counts them
    HOLDS: "hold on the models that they are about",
    FAILS: "do not hold",
    "open": "are undecided, or answered for a small model alone",
    NOT_RUN: "wait for runs",
}


def page(
    rows: pd.DataFrame,
    scores: Sequence[Table],
    judged: Sequence[Judged],
    claims: Table,
    details: Mapping[str, Sequence[Table]],
    figures: Iterable[Figure],
    notes: Sequence[str] = (),
) -> str:
    """Renders the report as one self-contained document. All text from runs is escaped.

    Args:
        scores: the tables that it opens with.
        details: further tables by section; a last line lists tables without rows.
        notes: see :func:`evals.report.views.notes`.
    """
    every = [*scores, *(table for group in details.values() for table in group)]
    shown = {name: [t for t in group if len(t.frame)] for name, group in details.items()}
    figures, cards = list(figures), list(_cards(judged))
    kinds = [kind for _, kind, _ in cards]
    parts = flat(settings(rows)) if len(rows) else []
    known = highlighted([part.method.iloc[0] for part in parts])
    return (
        templates()
        .get_template("report.html")
        .render(
            asked=len(parts),
            finished=sum(map(finished, parts)),
            **{name: list(rows[name].dropna().unique()) if len(rows) else [] for name in ASKED},
            models=list(dict.fromkeys(map(own_name, parts))),
            methods=list(dict.fromkeys(called(part.label.iloc[0]) for part in parts)),
            memory=memory(parts),
            looks={
                called(one.label): [*style_of(one.method)[1:], one.method in known]
                for one in (part.iloc[0] for part in parts)
            },
            scores=[table for table in scores if len(table.frame)],
            notes=notes,
            claims=claims,
            classes=CLASSES,
            counted=[
                (kinds.count(kind), words) for kind, words in COUNTED.items() if kind in kinds
            ],
            cards=[card for card in cards if card[1] != NOT_RUN],
            waiting=[claim for claim, kind, _ in cards if kind == NOT_RUN],
            groups={name: group for name, group in shown.items() if group},
            empty=[table.title for table in every if table.frame.empty],
            figures=[figure for figure in figures if figure.path.stem in FIRST],
            more_figures=[figure for figure in figures if figure.path.stem not in FIRST],
            answers=list(_answers(rows)) if len(rows) else [],
            longest=LONGEST,
        )
    )


ASKED = ("task", "seed", "machine")


def own_name(part: pd.DataFrame) -> str:
    """The name of a model's weights, with the name of its configuration if that differs."""
    one = part.iloc[0]
    told = one.model_settings if isinstance(one.model_settings, dict) else {}
    path = Path(str(told.get("gguf_file") or told.get("name_or_path") or one.model).rstrip("/"))
    name = path.stem if told.get("gguf_file") else path.name
    return name if name == one.model else f"{name} ({one.model})"


def memory(parts: Sequence[pd.DataFrame]) -> str:
    """The rows' budgets in words."""
    found: dict[str, list[str]] = {}
    for one in (part.iloc[0] for part in parts):
        if not unknown(one.budget):
            share = isinstance(one.budget, float)
            kind = "of the prompt's entries" if share else "entries"
            own = found.setdefault(f"{kind}{' on average' if one.budget_by == 'mean' else ''}", [])
            own.append(f"{100 * one.budget:g}%" if share else f"{one.budget:g}")
        elif one.method != REFERENCE:
            found.setdefault("the methods' own sizes", [])
    told = [f"{', '.join(dict.fromkeys(sizes))} {of}".strip() for of, sizes in found.items()]
    return "; ".join(told) or "all entries"


def templates() -> Environment:
    """The templates of all pages, with automatic escaping."""
    found = Environment(loader=PackageLoader("evals.report"), autoescape=True, trim_blocks=True)
    found.filters["sha256"] = _sha256
    return found


def _sha256(script: str) -> str:
    """A script's hash for the page's security policy, which lets no other script run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _cards(judged: Sequence[Judged]) -> Iterator[tuple[Claim, str, list[tuple[str, str, str]]]]:
    """For each claim its kind of verdict and its measurements: verdict, value, what was measured.

    The kind is "open" if the measurements differ or are of small models alone.
    """
    for statement in dict.fromkeys(one.claim.statement for one in judged):
        own = [one for one in judged if one.claim.statement == statement]
        kinds = {None if one.measured and one.measured.limits else one.kind for one in own}
        alike = kinds.pop() if len(kinds) == 1 else None
        kind = alike if alike in (HOLDS, FAILS, NOT_RUN) else "open"
        yield own[0].claim, kind, [(one.verdict, *_measured(one)) for one in own]


def _measured(one: Judged) -> tuple[str, str]:
    if one.measured is None:
        return "", ""
    m, number = one.measured, one.measured.number
    value = "no number" if number.value is None else f"{number.value:.3g}"
    if number.ends:
        value += f" [{number.low:.3g}, {number.high:.3g}]"
    processes = "process" if m.processes == 1 else "processes"
    count = f"n = {number.n}"
    count += f" in {m.processes} {processes}" if m.processes is not None else ""
    return value, f"{count}; {m.of}; {m.model} on {m.machine}"


def _answers(rows: pd.DataFrame) -> Iterator[tuple[str, list[Any]]]:
    """The first samples of each setting with the answers of all methods."""
    named = labels(rows)
    for setting, parts in settings(ran(rows[rows.generated_tokens > 0])).items():
        whole = pd.concat(parts.values())
        samples = []
        for name in whole.id.unique()[:ANSWERS]:
            same = whole[whole.id == name]
            given = [
                (called(marked(part)), str(part.prediction[part.id == name].iloc[0]))
                for part in parts.values()
                if (part.id == name).any()
            ]
            references = same.references.iloc[0]
            told = references if isinstance(references, list) else []
            samples.append((name, " / ".join(map(str, told)), given))
        yield f"{named[setting]}, {whole.model.iloc[0]}: {len(samples)} samples", samples
