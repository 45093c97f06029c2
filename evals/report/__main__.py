"""The report of runs: on the terminal, or as tables, figures and one HTML page.

    python -m evals.report results/runs/*                  # the terminal's tables
    python -m evals.report results/runs --paired h2o       # one method less the others, in pairs
    python -m evals.report runs=results/runs out=results   # tables, figures, report.html
    python -m evals.report embedded                        # see evals/report/embedded.py

No model is loaded. The page also has stored numbers: published ones (paper=results/paper), those of
the old benchmark (bench=results/hardware), and the embedded model's (embedded=results/embedded).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from buzz.errors import ConfigError
from evals.report import stored, terminal, views
from evals.results.frame import load

RESULTS = Path(__file__).resolve().parents[2] / "results"  # of a checkout
STORED = {"bench": RESULTS / "hardware", "embedded": RESULTS / "embedded"}
STORED["paper"] = Path(__file__).with_name("published")  # in the wheel too


def write(runs: Path, out: Path, **numbers: Path) -> Path:
    """Writes tables, figures and the page; returns the page's path.

    Args:
        numbers: the folders of stored numbers, by the names of STORED.

    Raises:
        ConfigError: there are no runs, or `out` cannot be written.
    """
    from evals.report import claims, figures  # with matplotlib, which is slow to import
    from evals.report.page import page

    rows = load(runs)
    if rows.empty:
        raise ConfigError("runs", str(runs), next(iter(rows.attrs["left_out"]), "no run is there"))
    try:
        (out / "tables").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = f"{error.strerror}; give a folder that can be written"
        raise ConfigError("out", str(out), remedy) from None
    left_out = [f"left out: {line}" for line in rows.attrs["left_out"]]
    for name, folder in numbers.items():
        if not folder.exists():
            left_out.append(f"no tables of {name}={folder}: no such folder (a checkout has it)")
    for line in left_out:
        print(line, file=sys.stderr)
    judged = claims.judge(rows)
    table = claims.table(judged)
    scores = [*views.sections(rows), views.make("seeds", rows)]
    details = {
        "Distance to the full cache": [views.make("distance", rows[rows.kl_to_full.notna()])],
        "Memory and speed": [
            views.make("costs", rows),
            views.make("speed", rows[rows.task.isin(views.SPEC["timed"])]),
            *stored.benchmarks(numbers["bench"]),
        ],
        "Breakdowns": list(views.breakdowns(rows)),
        "Parameters": [views.ablations(rows)],
        "On file": [
            *stored.published(numbers["paper"], rows),
            *stored.evidence(numbers["embedded"]),
        ],
        "All runs": [views.overview(rows)],
    }
    for one in (*scores, table, *(one for group in details.values() for one in group)):
        one.write(out / "tables")
    drawn = figures.draw_all(rows, out / "figures")
    notes = [*views.notes(rows), *left_out]
    path = out / "report.html"
    path.write_text(page(rows, scores, judged, table, details, drawn, notes), encoding="utf-8")
    return path


def named(arguments: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Parses arguments NAME=FOLDER; `known` has the names and their defaults.

    Raises:
        ConfigError: a name is not known, or no folder is given.
    """
    found = dict(known)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in found or not value:
            raise ConfigError(name, value, f"give NAME=FOLDER, NAME of {', '.join(found)}")
        found[name] = value
    return found


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 if something was left out, 2 if there is nothing to show."""
    try:
        if arguments and arguments[0] == "embedded":
            from evals.report import embedded

            embedded.main(
                **named(arguments[1:], dict.fromkeys(("runs", "out", "beside", "pictures"), ""))
            )
            return 0
        if not arguments or all("=" in one for one in arguments):
            known = {"runs": "results/runs", "out": "results"}
            known |= {name: str(folder) for name, folder in STORED.items()}
            path = write(**{name: Path(value) for name, value in named(arguments, known).items()})
            print(f"report: {path}   tables: {path.parent / 'tables'}")
            return 0
        parser = argparse.ArgumentParser(
            "python -m evals.report", description=(__doc__ or "").splitlines()[0]
        )
        parser.add_argument("folders", metavar="RUNS", type=Path, nargs="+")
        parser.add_argument("--paired", metavar="METHOD", help="less the others, sample by sample")
        given = parser.parse_args(arguments)
        if given.paired:
            terminal.print_paired(given.folders, given.paired)
            return 0
        return 1 if terminal.print_tables(given.folders) else 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
