"""Numbers on file that are no runs, in the report: the benchmark's CSV files, results/embedded."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from report_runs import write_run

from evals.report import stored
from scripts import make_tables

ROOT = Path(__file__).resolve().parents[1]


def bench(folder: Path) -> None:
    """As scripts/bench.py writes it: one row ran out of memory."""
    folder.mkdir()
    rows = [
        {"prompt": 2048, "method": "stock", "batch": 1, "prefill_s": 2.0, "decode_ms": 40.0},
        {"prompt": 2048, "method": "full", "batch": 1, "prefill_s": 2.0, "decode_ms": 20.0},
        {"prompt": 2048, "method": "buzz", "batch": 1, "prefill_s": 3.0, "decode_ms": 10.0},
        {"prompt": 4096, "method": "buzz", "failed": "OOM <b>"},
    ]
    rows = [row | ({"peak_bytes": 2e9} if "batch" in row else {}) for row in rows]
    pd.DataFrame(rows).to_csv(folder / "a-cpu.csv", index=False)
    (folder / "a-cpu.json").write_text(json.dumps({"device": "A CPU", "threads": 2}))


def test_the_benchmarks_rows_stand_beside_the_full_caches(tmp_path: Path) -> None:
    bench(tmp_path / "bench")
    (table,) = stored.benchmarks(tmp_path / "bench")
    assert table.title == "Benchmark: A CPU" and "threads 2" in table.note
    buzz = table.frame.iloc[2]
    assert buzz["decode / stock"] == 0.25 and buzz["decode / full"] == 0.5
    assert buzz["prefill / stock"] == 1.5 and buzz["peak MB"] == pytest.approx(2000)
    failed = table.shown().iloc[3]
    assert failed["failed"] == "OOM <b>" and failed["decode / full"] == "-"
    assert list(table.shown()["batch"][:3]) == ["1", "1", "1"]


def test_what_is_committed_can_be_shown() -> None:
    for table in stored.benchmarks(ROOT / "results/hardware"):
        assert len(table.shown())
    (table,) = stored.evidence(ROOT / "results/embedded")
    assert "buzz" in set(table.frame["method"])
    assert stored.evidence(ROOT / "results") == []


def test_the_report_has_them_and_one_line_for_what_was_not_run(tmp_path: Path) -> None:
    bench(tmp_path / "bench")
    write_run(tmp_path / "runs", "full", "full", [1.0, 2.0])
    given = [f"{name}={tmp_path / name}" for name in ("runs", "out", "bench")]
    assert make_tables.main(given) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Benchmark: A CPU" in page and "OOM &lt;b&gt;" in page
    assert (tmp_path / "out/tables/bench_a-cpu.md").exists()
    assert page.count("LongBench;") == 1 and page.count("Not run: ") == 1
    assert page.index('id="claims"') < page.index('id="memory"') < page.index("<details class")
