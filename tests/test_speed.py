"""Speed as a task: stock caches beside this project's, variants as rows, steps in turn."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import HEAD_DIM, KV_HEADS, LAYERS, MODEL, ROOT, composed, read, shown
from tiny import tiny

from baselines import FullPolicy, H2OPolicy, StreamingLLMPolicy
from buzz import BuzzPolicy
from evals.report.stored import benchmarks
from evals.run import speed
from evals.run.faults import NotFinite
from evals.run.plan import Plan, StockPolicy
from evals.run.runner import run_job
from evals.run.speed import Method, measure

ENTRY = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # bytes
PROMPT, NEW = 120, 20


def go(output: Path, rows: list[list[str]], *shared: str) -> dict[str, list[dict]]:
    """Records by row, of one job."""
    common = [*MODEL, "task=throughput", f"task.lengths=[{PROMPT}]", f"task.max_new_tokens={NEW}"]
    common += [f"output={output}", *shared]
    plans = [Plan.of(composed(*common, *row)) for row in rows]
    for outcome in run_job(plans):
        assert outcome.error is None
    (folder,) = {plan.folder for plan in plans}
    return {file.stem: read(file) for file in folder.glob("*.jsonl")}


def test_stock_and_chunks_are_rows_beside_the_full_cache(tmp_path: Path) -> None:
    chunked = ["method=h2o", "method.heavy=20", "method.recent=20", "task.prefill_chunk=50"]
    rows = go(tmp_path, [["method=stock"], chunked, [*chunked, "task.hold=true"]], "task.samples=1")
    name = "h2o,heavy=20,recent=20,prefill_chunk=50"
    assert rows.keys() == {"full", "stock", name, f"{name},hold=True"}
    full, stock, chunks, held = (
        rows[key][0] for key in ("full", "stock", name, f"{name},hold=True")
    )
    assert full["tokens"] == stock["tokens"] and len(full["tokens"]) == NEW
    for record in (full, stock):
        assert record["kv_nbytes_peak"] == (PROMPT + NEW - 1) * ENTRY <= record["allocated_nbytes"]
    assert "eviction_share" not in stock and stock["evictions"] == 0
    assert held["kv_entries_peak"] == chunks["kv_entries_peak"] == 40
    assert chunks["evictions"] == held["evictions"] + 2  # of the first 50 tokens, and the second
    for record, *_ in rows.values():
        assert record["timed"] and record["linear_ms"] < record["ttft_s"] * 1e3
        assert record["first_step_s"] > 0 and record["memory_peak_nbytes"] > 0
        assert record["scores"] == {"answer_tokens": len(record["tokens"])}  # not of the text
        assert record["batch_tokens_per_s"] == pytest.approx(record["decode_tokens_per_s"])
    (file,) = tmp_path.glob("*/stock.jsonl")
    table = shown(file)
    assert "answer_tokens, 120 tokens" in table
    assert table.count("stock") > 1 and "/stock" in table


def test_methods_take_their_steps_in_turn(tmp_path: Path, monkeypatch) -> None:
    steps: list[str] = []
    real = speed._Run.step

    def step(run: speed._Run) -> None:
        steps.append(run.method.policy.name)
        real(run)

    monkeypatch.setattr(speed._Run, "step", step)
    rows = go(tmp_path, [["method=stock"], ["method=buzz"]], "task.paired=true", "task.samples=1")
    assert steps == ["full", "stock", "buzz"] * (NEW - 1)
    assert rows["full"][0]["paired_speedup"] == 1 and rows["buzz"][0]["paired_speedup"] > 0
    assert "memory_peak_nbytes" not in rows["buzz"][0] and rows["buzz"][0]["rows"] == 3


def test_all_of_a_batch_counts_and_evictions_are_clocked() -> None:
    model, prompts = tiny(), torch.randint(3, 97, (3, 50)).tolist()
    policies = (H2OPolicy(heavy=8, recent=8), StreamingLLMPolicy(sink=2, window=6), FullPolicy())
    for policy in policies:
        (records,) = measure(model, prompts, [Method(policy, {})], 12)
        assert [record["prompt_tokens"] for record in records] == [50] * 3
        assert records[0]["tokens"] != records[1]["tokens"]
        assert 0 <= records[0]["eviction_share"] < 1
        each, together = (records[0][f"{name}tokens_per_s"] for name in ("decode_", "batch_"))
        assert together == pytest.approx(3 * each)


def test_a_graph_is_another_row_of_the_same_tokens() -> None:
    model, prompts = tiny(), torch.randint(3, 97, (1, 40)).tolist()
    for policy in (BuzzPolicy(sink=2, window=10, stride=5, threshold=14), StockPolicy()):
        plain, graph = (
            measure(model, prompts, [Method(policy, {"compiled": on})], 24)[0][0] for on in (0, 1)
        )
        assert plain["tokens"] == graph["tokens"] and "eviction_share" not in graph
        assert graph["first_step_s"] > 5 * graph["itl_p50_ms"] / 1e3


def test_what_cannot_be_measured_is_no_figure(monkeypatch) -> None:
    model, prompts = tiny(), [[5] * 40]
    monkeypatch.setattr(speed, "free_nbytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="can't allocate .* 0.0 GB are free"):
        measure(model, prompts, [Method(StockPolicy(), {})], 4)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite):
        measure(model, prompts, [Method(H2OPolicy(), {})], 4)


def test_variants_of_a_sweep_are_one_job(main, tmp_path: Path, capsys) -> None:
    swept = ["-m", "method=stock,local", "task.prefill_chunk=null,40", "task.samples=1"]
    shape = ["task=throughput", f"task.lengths=[{PROMPT}]", "task.max_new_tokens=4"]
    assert main(*MODEL, *swept, *shape, f"output={tmp_path}") == 0
    assert "4 complete" in capsys.readouterr().out
    assert len([*tmp_path.glob("*/setting.yaml")]) == 1
    assert {file.stem for file in tmp_path.glob("*/*.jsonl")} == {
        *("full", "stock", "local", "stock,prefill_chunk=40", "local,prefill_chunk=40")
    }


def test_what_was_measured_before_there_were_records_is_shown() -> None:
    tables = {table.name: table.frame for table in benchmarks(ROOT / "results/hardware")}
    frame = tables["bench_amd-epyc-2-cores"]
    assert isinstance(frame, pd.DataFrame) and {"stock", "buzz-chunked"} <= {*frame.method}
    assert frame[frame.method == "stock"]["decode / stock"].tolist() == [1.0] * 3
