"""One HTML file with everything in it: tables, pictures, what the models wrote."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from evals.report.figures import Figure
from evals.report.forms import Table
from evals.report.marks import label
from evals.report.runs import Run
from evals.report.tables import ordered
from evals.report.verdicts import FAILS, HOLDS, Judged

ANSWERS = 2  # samples shown per setting
LONGEST = 700  # characters of an answer

STYLE = """
:root { color-scheme: light; --line: #d8d8d8; --soft: #666; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: #1a1a1a; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
p.note { color: var(--soft); font-size: 0.87rem; max-width: 50rem; }
nav a { margin-right: 0.9rem; } nav { line-height: 1.9; font-size: 0.9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { background: #f4f4f4; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid #eee; } tbody tr:last-child td { border-bottom: 0; }
td.long { white-space: normal; min-width: 14rem; max-width: 24rem; }
.picture { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
@media (max-width: 45rem) { img { max-width: none; } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: 0.6rem;
  border-radius: 4px; margin: 0.2rem 0 0.8rem; font-size: 0.82rem; }
details { margin: 0.4rem 0; } summary { cursor: pointer; }
.claim { border: 1px solid var(--line); border-left-width: 5px; border-radius: 4px;
  padding: 0.6rem 0.8rem; margin: 0.6rem 0; }
.claim p { margin: 0.15rem 0; } .claim .small { color: var(--soft); font-size: 0.83rem; }
.holds { border-left-color: #0072B2; } .fails { border-left-color: #D55E00; }
.open { border-left-color: #b0b0b0; }
"""
KINDS = {HOLDS: "holds", FAILS: "fails"}


def page(
    runs: Sequence[Run],
    judged: Sequence[Judged],
    claims: Table,
    tables: Iterable[Table],
    figures: Iterable[Figure],
) -> str:
    """The report as one self-contained document. All text from runs is escaped."""
    sections = [
        ("claims", claims.title, _claims(judged) + _note(claims.note)),
        ("figures", "Figures", "".join(map(_figure, figures)) or "<p>not run</p>"),
        *((t.name, t.title, _table(t)) for t in tables),
        ("answers", "What the models wrote", _answers(runs)),
    ]
    links = " ".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{html.escape(title)}</h2>{content}</section>'
        for name, title, content in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>BUZZ bench: report</title><style>{STYLE}</style></head><body>"
        f"<h1>BUZZ bench: report</h1><p>{html.escape(_lead(runs))}</p><nav>{links}</nav>"
        f"{body}</body></html>\n"
    )


def _lead(runs: Sequence[Run]) -> str:
    def listed(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    finished = sum(run.status == "complete" for run in runs)
    return (
        f"{len(runs)} runs, {finished} of them complete. Models: {listed(r.model for r in runs)}."
        f" Machines: {listed(r.machine for r in runs)}. Numbers in brackets are 95%"
        " intervals, by bootstrap over samples where nothing else is said."
    )


def _claims(judged: Sequence[Judged]) -> str:
    """A card per claim, its measurements below each other."""
    cards = []
    for claim in dict.fromkeys(one.claim for one in judged):
        own = [one for one in judged if one.claim is claim]
        kinds = {None if one.measured and one.measured.limits else one.kind for one in own}
        kind = KINDS.get(kinds.pop(), "open") if len(kinds) == 1 else "open"
        lines = "".join(f"<p>{_measured(one)}</p>" for one in own)
        source = f"{claim.unit}: {claim.bar_text}. Source: {claim.source}"
        cards.append(
            f'<div class="claim {kind}"><p><b>{html.escape(claim.statement)}</b></p>{lines}'
            f'<p class="small">{html.escape(source)}</p></div>'
        )
    return "".join(cards)


def _measured(one: Judged) -> str:
    if one.measured is None:
        return html.escape(one.verdict)
    m = one.measured
    value = "no number" if m.value is None else f"{m.value:.3g}"
    if m.interval:
        value += f" [{m.interval[0]:.3g}, {m.interval[1]:.3g}]"
    processes = "process" if m.processes == 1 else "processes"
    count = f"n = {m.n}" + (f" in {m.processes} {processes}" if m.processes is not None else "")
    where = html.escape(f"{count}; {m.of}; {m.model} on {m.machine}")
    return f'<b>{html.escape(one.verdict)}</b>: {value} <span class="small">{where}</span>'


def _table(table: Table) -> str:
    return f'<div class="scroll">{table.html()}</div>' + _note(table.notes)


def _note(note: str) -> str:
    return f'<p class="note">{html.escape(note)}</p>' if note else ""


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    title = html.escape(figure.title)
    image = f'<img alt="{title}" width="{figure.width}" src="data:image/png;base64,{data}">'
    return f'<h3>{title}</h3><div class="picture">{image}</div>{_note(figure.note)}'


def _answers(runs: Sequence[Run]) -> str:
    """The first samples of each setting as all its runs answered them."""
    settings: dict[str, list[Run]] = {}
    for run in ordered(runs):
        if run.ran and run.ran[0]["generated_tokens"]:
            settings.setdefault(run.setting, []).append(run)
    parts = []
    for group in settings.values():
        ids = [record["id"] for record in group[0].ran[:ANSWERS]]
        inner = []
        for name in ids:
            found = [(run, r) for run in group for r in run.ran if r["id"] == name]
            expected = " / ".join(found[0][1]["references"])
            inner.append(f"<h3>sample {html.escape(name)}</h3>{_pre('expected', expected)}")
            inner += [_pre(label(run, group), record["prediction"]) for run, record in found]
        title = html.escape(f"{group[0].task}, {group[0].model}: {len(ids)} samples")
        parts.append(f"<details><summary>{title}</summary>{''.join(inner)}</details>")
    return "".join(parts) or "<p>not run</p>"


def _pre(title: str, content: str) -> str:
    cut = content if len(content) <= LONGEST else content[:LONGEST] + " ..."
    return f"<b>{html.escape(title)}</b><pre>{html.escape(cut)}</pre>"
