"""The terminal's tables where there are many runs, or nothing to compare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from report_runs import write_run
from rich.console import Console

from evals.report import tables
from evals.report.kinds import sections
from evals.report.terminal import WIDEST, _against_full, _breakdowns
from evals.results.reading import read_runs
from evals.tasks.longbench import LongBench


def setting(names: list[str], groups: list[str]) -> Any:
    """Runs whose scores by length are their number and the group's, as 3.07."""
    rows = [
        {
            "task": "needle",
            "headline": "accuracy",
            "grouped_by": "depth",
            "groups": {},
            "breakdown": {"length": {g: i + j / 100 for j, g in enumerate(groups)}},
        }
        for i in range(len(names))
    ]
    return SimpleNamespace(names=names, rows=rows)


@pytest.mark.parametrize(("runs", "groups"), [(2, 8), (27, 8), (27, 40), (3, 3)])
def test_breakdowns_stay_readable_and_whole(runs: int, groups: int) -> None:
    names = [f"buzz budget=0.25 stride={i}" for i in range(runs)]
    lengths = [f"{1024 * (j + 1)}" for j in range(groups)]
    heading, *parts = _breakdowns(setting(names, lengths))
    assert "needle by length" in heading
    console = Console(width=WIDEST)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    lines = capture.get().splitlines()
    assert "…" not in capture.get()  # nothing is cut off
    scores = sorted(cell for line in lines for cell in line.split() if cell.count(".") == 1)
    scores = [cell for cell in scores if "=" not in cell]
    expected = [i + j / 100 for i in range(runs) for j in range(groups)]
    assert sorted(map(float, scores)) == pytest.approx(sorted(expected))
    assert any(line.startswith("buzz budget") for line in lines) == (runs > 2)  # narrower


def test_what_has_nothing_to_compare_has_no_section() -> None:
    compared = {
        "difference": 0.5,
        "difference_ci95": None,
        "relative": 1.5,
        **{name: 1 for name in ("wins", "ties", "losses", "n", "kl_n")},
        **{name: None for name in ("agreement", "prefix", "kl_to_full", "top1_to_full")},
    }
    row = {"headline": "accuracy", "score": 1.0}
    alone = SimpleNamespace(names=["full"], rows=[row])
    both = SimpleNamespace(names=["full", "buzz"], rows=[row, row])
    table = _against_full([alone, both], ["xsum", "needle"], [[None], [None, compared]])
    assert list(table.columns[0].cells) == ["[bold]needle[/]", "buzz"]


def test_many_runs_of_a_benchmark_are_rows(tmp_path) -> None:
    for budget in (0.1, 0.2, 0.3, 0.4):
        for method in ("h2o", "buzz"):
            where = {"task": "longbench", "group": "qasper", "budget": budget}
            write_run(tmp_path, f"{method} {budget}", method, [10.0, 20.0], **where)
    table = tables.section(LongBench.section, read_runs(tmp_path))
    assert len(table.frame) == 8 and table.frame["qasper"].tolist() == [15.0] * 8
    assert "buzz @0.4" in set(table.frame["run"])


def test_counts_are_whole_numbers_where_others_have_none(tmp_path) -> None:
    write_run(tmp_path, "full", "full", [10.0, 20.0, 30.0], task="nq10")
    write_run(tmp_path, "h2o", "h2o", [10.0, 20.0, 30.0], task="nq10", budget=0.25)
    kls = [f'{{"id": "{i}", "kl_to_full": 0.5}}\n' for i in range(3)]
    (tmp_path / "h2o/fidelity.jsonl").write_text("".join(kls))
    runs = read_runs(tmp_path)
    (table,) = (one for one in (tables.section(of, runs) for of in sections()) if len(one.frame))
    assert list(table.shown()["KL n"]) == ["-", "3"]
    assert ",3," in table.frame.to_csv() and "3.0," not in table.frame[["KL n"]].to_csv()
