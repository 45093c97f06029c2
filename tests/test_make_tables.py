"""From records to tables, verdicts, figures and the page, on run folders made by hand."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from evals.report import published, tables
from evals.report.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Judged,
    Measurement,
    judge,
    verdict,
)
from evals.report.figures import front
from evals.report.page import page
from evals.report.runs import Run, bootstrap, read_runs
from evals.schema import FORMAT
from scripts import make_tables

PAPER = Path(__file__).resolve().parents[1] / "results/paper"
BUZZ = {
    "sink": 4,
    "window": 160,
    "stride": 5,
    "threshold": 400,
    "history": "strided",
    "compact": "once",
}
HEADLINES = {"xsum": "rougeL", "nq10": "best_subspan", "needle": "accuracy", "longbench": "score"}


def write_run(
    root: Path,
    name: str,
    method: str,
    scores: list[float],
    *,
    task: str = "xsum",
    kv: float = 1e6,
    budget: float | int | None = None,
    parameters: dict[str, Any] | None = None,
    prompt: int = 1000,
    speed: float = 10.0,
    group: str = "",
    prediction: str = "an answer",
    model: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    **task_settings: Any,
) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    default = BUZZ if method.startswith("buzz") else {}
    config = {
        "method": {"name": method, "_target_": "x", **(parameters or default)},
        "task": {"name": task, "shard": None, **task_settings},
        "model": model or {"name": "m", "name_or_path": "meta-llama/Llama-2-7b-chat-hf"},
        "cache": {"logn_base": None, "logn_clamp": False},
        "budget": budget,
        "seed": 0,
        "output": str(root),
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    environment = {"device": "cpu", "cpu": "a CPU", "threads": 2, "git_revision": "abc"}
    (folder / "environment.json").write_text(json.dumps(environment))
    headline = HEADLINES[task]
    with open(folder / "samples.jsonl", "w") as file:
        for i, score in enumerate(scores):
            record = {
                "format": FORMAT,
                "id": str(i),
                "group": group,
                "meta": {"length": 512, "depth": 50},
                "references": ["expected"],
                "prompt_sha256": f"hash {i}",
                "prompt_tokens": prompt,
                "batch_size": 1,
                "status": "ok",
                "scores": {headline: score, "rouge2": score / 2},
                "prediction": prediction,
                "generated_tokens": 8,
                "ttft_s": 1.0,
                "decode_tokens_per_s": speed + i % 3,
                "itl_p50_ms": 1000 / speed + i % 3,
                "kv_nbytes_mean": kv,
                "kv_nbytes_peak": kv,
                "memory_peak_nbytes": 5e8,
            }
            file.write(json.dumps(record) + "\n")
    facts = {
        "status": "complete",
        "headline": headline,
        "statistic": "mean",
        "higher_is_better": True,
    }
    (folder / "summary.json").write_text(json.dumps(facts if summary is None else summary))


def by_statement(judged: list[Judged], start: str) -> list[Judged]:
    return [one for one in judged if one.claim.statement.startswith(start)]


@pytest.mark.parametrize(
    "interval, at_least, expected",
    [
        ((1.0, 1.2), True, HOLDS),  # the bar belongs to the right side
        ((1.1, 1.2), True, HOLDS),
        ((0.9, 1.2), True, UNDECIDED),
        ((0.8, 0.999), True, FAILS),
        ((0.8, 1.0), True, UNDECIDED),
        ((0.8, 1.0), False, HOLDS),
        ((0.8, 1.1), False, UNDECIDED),
        ((1.001, 1.1), False, FAILS),
        (None, True, UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(
    interval: tuple[float, float] | None, at_least: bool, expected: str
) -> None:
    assert verdict(interval, 1.0, at_least, 50, 30) == expected


def test_a_verdict_needs_enough_samples_and_its_condition() -> None:
    assert verdict((1.1, 1.2), 1.0, True, 29, 30) == UNDECIDED
    assert verdict((1.1, 1.2), 1.0, True, 30, 30, condition=UNDECIDED) == UNDECIDED
    assert verdict((1.1, 1.2), 1.0, True, 30, 30, condition=FAILS) == FAILS
    assert verdict((0.8, 0.9), 1.0, True, 30, 30, condition=UNDECIDED) == FAILS


def test_claims_that_no_run_bears_on_are_not_run() -> None:
    assert [one.verdict for one in judge([])] == [NOT_RUN] * len(CLAIMS)


@pytest.mark.parametrize("loss, expected", [(0.0, HOLDS), (0.1, FAILS)])
def test_quality_and_memory_are_judged_together(tmp_path: Path, loss: float, expected: str) -> None:
    full = [20 + i % 5 for i in range(40)]
    write_run(tmp_path, "full", "full", full, kv=4e6)
    write_run(tmp_path, "buzz", "buzz", [s * (1 - loss) for s in full], kv=1e6, budget=0.25)
    judged = judge(read_runs(tmp_path))
    (quality,) = by_statement(judged, "At 2.5x")
    (memory,) = by_statement(judged, "KV memory")
    assert quality.verdict == memory.verdict == expected
    assert quality.measured and memory.measured
    assert quality.measured.value == pytest.approx(1 - loss)
    assert memory.measured.value == pytest.approx(4)
    assert quality.measured.n == 40


def test_a_run_that_holds_more_memory_says_nothing_about_quality_at_less(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [20.0] * 40, kv=4e6)
    write_run(tmp_path, "buzz", "buzz", [20.0] * 40, kv=2e6, budget=0.5)
    judged = judge(read_runs(tmp_path))
    assert by_statement(judged, "At 2.5x")[0].verdict == NOT_RUN
    assert by_statement(judged, "KV memory")[0].verdict == FAILS


def test_swept_parameters_are_no_test_of_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [20.0] * 40, kv=4e6)
    write_run(tmp_path, "buzz", "buzz", [20.0] * 40, parameters={**BUZZ, "stride": 3})
    assert by_statement(judge(read_runs(tmp_path)), "At 2.5x")[0].verdict == NOT_RUN


def test_only_samples_of_the_same_prompt_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [20.0] * 40, kv=4e6)
    write_run(tmp_path, "buzz", "buzz", [20.0] * 40, budget=0.25)
    samples = tmp_path / "buzz/samples.jsonl"
    samples.write_text(samples.read_text().replace('"hash 3"', '"another"'))
    (quality,) = by_statement(judge(read_runs(tmp_path)), "At 2.5x")
    assert quality.measured and quality.measured.n == 39


def test_10_qa_is_compared_with_the_best_other_of_the_same_budget(tmp_path: Path) -> None:
    right = [1.0] * 30 + [0.0] * 10
    write_run(tmp_path, "buzz", "buzz", right, task="nq10", budget=0.25)
    write_run(tmp_path, "h2o", "h2o", [1.0] * 20 + [0.0] * 20, task="nq10", budget=0.25)
    write_run(tmp_path, "local", "local", [0.0] * 40, task="nq10", budget=0.25)
    write_run(tmp_path, "h2o more", "h2o", [1.0] * 40, task="nq10", budget=0.5)
    write_run(tmp_path, "strided", "buzz_strided", [1.0] * 40, task="nq10", budget=0.25)
    (qa,) = by_statement(judge(read_runs(tmp_path)), "10-QA")
    assert qa.measured and qa.measured.value == pytest.approx(25)
    assert "against h2o" in qa.measured.of and qa.verdict == HOLDS


def test_speed_counts_at_32k_on_one_machine_and_latency_below_4k(tmp_path: Path) -> None:
    for prompt, setting in ((31_000, "long"), (2_000, "short")):
        for method, speed in (("full", 10.0), ("buzz", 20.0)):
            name = f"{method} {setting}"
            write_run(
                tmp_path, name, method, [1.0] * 9, prompt=prompt, speed=speed, setting=setting
            )
    judged = judge(read_runs(tmp_path))
    (fast,) = by_statement(judged, "Decoding")
    assert fast.verdict == HOLDS and fast.measured and fast.measured.value == pytest.approx(21 / 11)
    (latency,) = by_statement(judged, "Work")
    assert latency.verdict == HOLDS and latency.measured.n == 9

    environment = tmp_path / "buzz long/environment.json"
    environment.write_text(environment.read_text().replace("a CPU", "another CPU"))
    assert by_statement(judge(read_runs(tmp_path)), "Decoding")[0].verdict == NOT_RUN


@pytest.mark.parametrize("speed, expected", [(10.0, HOLDS), (2.0, FAILS)])
def test_growth_is_measured_against_log_n(tmp_path: Path, speed: float, expected: str) -> None:
    write_run(tmp_path, "short", "buzz", [1.0] * 9, prompt=1024, setting="short")
    write_run(tmp_path, "long", "buzz", [1.0] * 9, prompt=8192, speed=speed, setting="long")
    (growth,) = by_statement(judge(read_runs(tmp_path)), "Time per token")
    ratio = (1000 / speed + 1) / (100 + 1) / (13 / 10)
    assert growth.measured and growth.measured.value == pytest.approx(ratio)
    assert growth.verdict == expected


def test_sensitivity_is_the_range_over_one_parameter_alone(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [20.0, 22.0] * 20)
    for window, score in ((40, 15.0), (80, 18.0), (160, 16.0)):
        parameters = {**BUZZ, "window": window}
        write_run(tmp_path, f"{window}", "buzz", [score] * 40, parameters=parameters)
    write_run(tmp_path, "other", "buzz", [1.0] * 40, parameters={**BUZZ, "window": 1, "sink": 0})
    (window,) = by_statement(judge(read_runs(tmp_path)), "The score depends little on the window")
    assert window.measured and window.measured.value == pytest.approx(3 / 21)
    assert "window 40, 80, 160" in window.measured.of
    assert window.verdict == FAILS


def test_the_interval_covers_the_mean_and_needs_more_than_one_value() -> None:
    low, high = bootstrap([[0.0, 1.0] * 50])
    assert 0.39 < low < 0.5 < high < 0.61
    assert bootstrap([[1.0]]) is None and bootstrap([]) is None


def test_published_numbers_stand_beside_measured_ones(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [20.0] * 3, task="longbench", group="qasper")
    base = {"name": "b", "name_or_path": "meta-llama/Llama-2-7b-hf"}
    write_run(tmp_path, "h2o", "h2o", [22.0] * 3, budget=256, model=base)
    write_run(tmp_path, "other", "h2o", [99.0] * 3, budget=256)  # another model
    longbench, xsum, means, headlines = published.tables(read_runs(tmp_path), PAPER)

    rows = longbench.frame.set_index("data set")
    assert rows.loc["qasper", "full cache published"] == 19.2
    assert rows.loc["qasper", "full cache measured"] == 20
    assert rows.loc["qasper", "full cache difference"] == pytest.approx(0.8)
    assert rows.loc["qasper", "BUZZ published"] == "not published here"
    assert rows.loc["hotpotqa", "full cache measured"] == "not run"
    assert set(rows["source"]) == {rows["source"].iloc[0]} and "LongBench" in rows["source"].iloc[0]

    line = xsum.frame[(xsum.frame["model"] == "Llama-2-7B") & (xsum.frame["KV entries"] == "256")]
    assert line["ROUGE-2 measured"].item() == 11
    assert line["ROUGE-2 difference"].item() == pytest.approx(11 - 11.48)
    assert len(means.frame) and len(headlines.frame)


def test_every_published_number_names_its_source() -> None:
    for path in PAPER.glob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["source"] for row in rows) and rows[0]["source"] != "same", path


def test_a_tables_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "full", "full", [10.0, 20.0, 30.0])
    table = tables.summarization(read_runs(tmp_path / "runs"))
    table.write(tmp_path)
    raw = pd.read_csv(tmp_path / "summarization.csv")
    assert raw["score"].item() == 20 and raw["score low"].item() < 20 < raw["score high"].item()
    cell = re.escape("20.00 [")
    for ending in ("md", "tex"):
        assert re.search(cell, (tmp_path / f"summarization.{ending}").read_text())
    assert re.search(cell, table.html())


def test_cells_are_escaped_in_every_form() -> None:
    table = tables.Table("t", "A & B", pd.DataFrame({"a_b": ["x|y <script>&%"]}))
    assert r"x\|y <script>" in table.markdown()
    assert r"a\_b" in table.latex() and r"\textless{}script\textgreater{}\&\%" in table.latex()
    assert "&lt;script&gt;&amp;%" in table.html()


def test_a_table_without_runs_says_so() -> None:
    assert "not run" in tables.perplexity([]).markdown()
    assert "not run" in tables.longbench([]).html()


def test_ablations_pair_the_score_rules_and_single_parameters(tmp_path: Path) -> None:
    for method in ("buzz", "buzz_strided"):
        parameters = {k: v for k, v in BUZZ.items() if method == "buzz" or k != "history"}
        write_run(tmp_path, method, method, [1.0, 2.0], parameters=parameters)
    write_run(tmp_path, "stride", "buzz", [3.0, 4.0], parameters={**BUZZ, "stride": 3})
    frame = tables.ablations(read_runs(tmp_path)).frame
    rules = frame[frame["factor"] == "local maxima"]
    assert list(rules["value"]) == ["buzz", "buzz_strided"]
    stride = frame[frame["factor"] == "Stride"]
    assert list(stride["value"]) == ["3", "5"] and list(stride["score"]) == [3.5, 1.5]
    assert set(frame["factor"]) == {"local maxima", "Stride"}


def test_the_front_is_what_nothing_smaller_beats() -> None:
    memory, scores = [1.0, 2.0, 2.0, 3.0, 4.0], [5.0, 7.0, 6.0, 7.0, 9.0]
    assert front(memory, scores, True) == [(1, 5), (2, 7), (4, 9)]
    assert front(memory, [-s for s in scores], False) == [(1, -5), (2, -7), (4, -9)]


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file_and_escapes_what_models_wrote(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    evil = '</pre><script>alert("x")</script><img src=http://example.org/a.png>'
    write_run(runs, "full", "full", [1.0, 0.0, 1.0], task="needle", kv=4e6, prediction=evil)
    write_run(runs, "buzz", "buzz", [0.0, 0.0, 1.0], task="needle", budget=0.25, prediction=evil)
    failed = {"status": "failed", "error": "RuntimeError: <b>no</b> disk"}
    write_run(runs, "broken", "local", [], task="needle", summary=failed)
    with open(runs / "buzz/fidelity.jsonl", "w") as file:
        for name, kl in (("0", 0.9), ("1", None), ("2", 0.5), ("0", 0.1)):
            file.write(json.dumps({"id": name, "kl_to_full": kl}) + "\n")
    assert make_tables.main([f"runs={runs}", f"out={tmp_path}"]) == 0

    read = Reader((tmp_path / "report.html").read_text())
    assert evil in read.text and "FAILED: RuntimeError: <b>no</b> disk" in read.text
    names = [tag for tag, _ in read.tags]
    assert "script" not in names and "link" not in names
    pictures = [attributes["src"] or "" for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) == 4  # front, distance to full, heat map, decoding time
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "pareto",
        "fidelity",
        "needle_0",
        "decode_time",
    }
    assert "FAILED" in (tmp_path / "tables/runs.md").read_text()
    table = pd.read_csv(tmp_path / "tables/other_tasks.csv").set_index("method")
    assert table.loc["buzz", "KL to full"] == pytest.approx(0.3)  # of the last records, where known
    assert math.isnan(table.loc["full", "KL to full"])


def test_the_page_needs_no_measurement() -> None:
    judged = [Judged(CLAIMS[0], Measurement(None, None, 3, "m", "cpu", "xsum"))]
    shown = page([], judged, tables.claims(judged), [], [])
    assert "no number" in shown and UNDECIDED in shown


@pytest.mark.parametrize("argument", ["runs=/nowhere/at/all", "colour=red", "runs="])
def test_wrong_arguments_are_one_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_tables.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_unfinished_runs_are_listed_without_a_score(tmp_path: Path) -> None:
    write_run(tmp_path, "full", "full", [1.0] * 4)
    (tmp_path / "full/summary.json").unlink()
    with open(tmp_path / "full/samples.jsonl", "a") as file:
        file.write('{"id": "torn')
    (run,) = read_runs(tmp_path)
    assert isinstance(run, Run) and not run.scored
    assert run.status == "unfinished: 4 samples"
