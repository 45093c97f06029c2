"""Run records to tables, figures and one HTML page; no model is loaded.

    python scripts/make_tables.py                     # runs=results/runs out=results
    python scripts/make_tables.py runs=FOLDER out=FOLDER paper=results/paper

Writes OUT/tables/*.md, *.tex, *.csv, OUT/figures/*.png and OUT/report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from buzz.errors import ConfigError
from evals.report import figures, published, tables
from evals.report.claims import judge
from evals.report.page import page
from evals.results.reading import read_runs

ROOT = Path(__file__).resolve().parents[1]


def make(runs_folder: Path, out: Path, paper: Path) -> Path:
    """Writes everything; returns the report's path.

    Raises:
        ConfigError: there are no runs.
    """
    runs = read_runs(runs_folder)
    for run in runs:
        if run.problem:
            print(f"left out: {run.places}: {run.problem}", file=sys.stderr)
    judged = judge(runs)
    claims = tables.claims(judged)
    shown = tables.own(runs)
    shown += [*published.tables(runs, paper), tables.overview(runs)]
    for table in (claims, *shown):
        table.write(out / "tables")
    report = out / "report.html"
    drawn = figures.draw_all(runs, out / "figures")
    report.write_text(page(runs, judged, claims, shown, drawn), encoding="utf-8")
    return report


def main(arguments: Sequence[str]) -> int:
    options = {"runs": "results/runs", "out": "results", "paper": str(ROOT / "results/paper")}
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise ConfigError(name, value, f"give NAME=FOLDER, NAME of {', '.join(options)}")
            options[name] = value
        report = make(*(Path(options[name]) for name in ("runs", "out", "paper")))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {report}   tables: {report.parent / 'tables'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
