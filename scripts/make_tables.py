"""Run records to tables, figures and one HTML page; no model is loaded.

    python scripts/make_tables.py                     # runs=results/runs out=results
    python scripts/make_tables.py runs=FOLDER out=FOLDER
    python scripts/make_tables.py bench=FOLDER        # of scripts/bench.py's CSV files

Writes OUT/tables/*.md, *.tex, *.csv, OUT/figures/*.png and OUT/report.html. Beside the runs the
page has what `make bench` measured (bench=results/hardware), published numbers
(paper=results/paper) and those of the embedded model (embedded=results/embedded).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from buzz.errors import ConfigError
from evals.report import figures, published, stored, tables
from evals.report.claims import judge
from evals.report.kinds import sections
from evals.report.page import page
from evals.results.reading import read_runs

ROOT = Path(__file__).resolve().parents[1]
STORED = {"paper": "paper", "bench": "hardware", "embedded": "embedded"}  # folders of results/


def make(runs_folder: Path, out: Path, paper: Path, bench: Path, embedded: Path) -> Path:
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
    groups = {
        "Scores": [tables.section(one, runs) for one in sections()],
        "Memory and speed": [tables.costs(runs), *stored.benchmarks(bench)],
        "Parameters": [tables.ablations(runs)],
        "Published numbers": published.tables(runs, paper),
        "On file": stored.evidence(embedded),
        "All runs": [tables.overview(runs)],
    }
    for table in (claims, *(table for group in groups.values() for table in group)):
        table.write(out / "tables")
    report = out / "report.html"
    drawn = figures.draw_all(runs, out / "figures")
    report.write_text(page(runs, judged, claims, groups, drawn), encoding="utf-8")
    return report


def main(arguments: Sequence[str]) -> int:
    options = {"runs": "results/runs", "out": "results"}
    options |= {name: str(ROOT / "results" / folder) for name, folder in STORED.items()}
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise ConfigError(name, value, f"give NAME=FOLDER, NAME of {', '.join(options)}")
            options[name] = value
        report = make(*map(Path, options.values()))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {report}   tables: {report.parent / 'tables'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
