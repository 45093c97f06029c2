"""From records to tables, verdicts, figures and the page, on run folders made by hand."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from report_runs import BUZZ, B, Reader, write_run

from baselines import SnapKVPolicy
from evals.report import published, tables
from evals.report.claims import CLAIMS
from evals.report.figures import draw_all, front, pareto
from evals.report.forms import Table
from evals.report.page import page
from evals.report.verdicts import UNDECIDED, Judged, Measurement
from evals.results.reading import read_runs
from evals.results.runs import Run
from evals.results.statistics import bootstrap
from evals.tasks.longbench import LongBench
from evals.tasks.summarization import Summarization
from evals.tasks.wikitext import Wikitext
from scripts import make_tables

PAPER = Path(__file__).resolve().parents[1] / "results/paper"


def test_the_interval_covers_the_mean_and_needs_more_than_one_value() -> None:
    low, high = bootstrap([[0.0, 1.0] * 50])
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.012)  # 0.5 -+ 1.96 * 0.05
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


def on_page(table: Table) -> str:
    return page([], [], table, {"Tables": [table]}, [])


def test_a_tables_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "full", "full", [10.0, 20.0, 30.0])
    table = tables.section(Summarization.section, read_runs(tmp_path / "runs"))
    table.write(tmp_path)
    raw = pd.read_csv(tmp_path / "summarization.csv")
    assert raw["score"].item() == 20 and raw["score low"].item() < 20 < raw["score high"].item()
    cell = re.escape("20.00 [")
    for ending in ("md", "tex"):
        assert re.search(cell, (tmp_path / f"summarization.{ending}").read_text())
    assert re.search(cell, on_page(table))


def test_cells_are_escaped_in_every_form() -> None:
    table = Table("t", "A & B", pd.DataFrame({"a_b": ["x|y <script>&%"]}))
    assert r"x\|y <script>" in table.markdown()
    assert r"a\_b" in table.latex() and r"\textless{}script\textgreater{}\&\%" in table.latex()
    assert "&lt;script&gt;&amp;%" in on_page(table)


def test_a_table_without_runs_says_so() -> None:
    assert "not run" in tables.section(Wikitext.section, []).markdown()
    assert "not run" in on_page(tables.section(LongBench.section, []))


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


# Memory beyond a budget


def over_budget(root: Path) -> None:
    """SnapKV grows to 1.38 of its budget, H2O keeps to it; on three tasks."""
    for task, group in (("xsum", ""), ("longbench", "qasper"), ("needle", "")):
        write_run(root, f"{task} full", "full", [20.0, 30.0], task=task, group=group, kv=4e6)
        for method, held in (("snapkv", 1.38), ("h2o", 1.0)):
            where: dict[str, Any] = {"task": task, "group": group, "budget": 0.25}
            write_run(
                root, f"{task} {method}", method, [20.0, 25.0], held=held, allocated=2e6, **where
            )


def test_tables_mark_what_holds_more_than_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SnapKVPolicy, "evicts", "prompt", raising=False)
    over_budget(tmp_path / "runs")
    make_tables.main([f"runs={tmp_path / 'runs'}", f"out={tmp_path}"])
    for name in ("summarization", "longbench", "other_tasks", "costs", "runs"):
        for ending, dagger in (("md", "†"), ("tex", r"\textdagger{}")):
            text = (tmp_path / f"tables/{name}.{ending}").read_text()
            marked = [line for line in text.splitlines() if f"0.25{dagger}" in line]
            assert any("snapkv" in line for line in marked), (name, ending)
            assert f"{dagger} holds over 5" in text, (name, ending)
            assert re.search(r"snapkv @0.25\S* 1.38x", text), (name, ending)
            assert not re.search(rf"h2o[ |&@-]*0.25{re.escape(dagger)}", text), (name, ending)
        assert "0.25†" in (tmp_path / f"tables/{name}.csv").read_text()
    assert (tmp_path / "report.html").read_text().count("0.25†") > 5

    table = pd.read_csv(tmp_path / "tables/summarization.csv").set_index("method")
    assert table.loc["snapkv", "budget"] == "0.25†" and table.loc["h2o", "budget"] == "0.25"
    assert table.loc["snapkv", "held / budget"] == pytest.approx(1.38)
    assert table.loc["snapkv", "growth"] == pytest.approx(95)
    assert table.loc["h2o", "held / budget"] == 1 and math.isnan(table.loc["h2o", "growth"])
    assert math.isnan(table.loc["full", "held / budget"])
    assert table.loc["h2o", "KV MB"] == 1 and table.loc["h2o", "KV allocated MB"] == 2
    sets = pd.read_csv(tmp_path / "tables/longbench.csv").set_index("data set")
    assert float(sets.loc["memory: held / budget", "snapkv @0.25†"]) == pytest.approx(1.38)
    assert float(sets.loc["memory: KV allocated MB", "h2o @0.25"]) == 2


def test_without_methods_that_grow_there_is_no_growth(tmp_path: Path) -> None:
    write_run(tmp_path, "h2o", "h2o", [1.0, 2.0], budget=0.25)
    table = tables.section(Summarization.section, read_runs(tmp_path))
    assert "growth" not in table.frame and "†" not in table.markdown()


def test_costs_mark_the_lengths_at_which_more_is_held(tmp_path: Path) -> None:
    write_run(tmp_path, "h2o", "h2o", [1.0] * 20, task="throughput", budget=B, held=1.06)
    samples = tmp_path / "h2o/samples.jsonl"
    first, *others = samples.read_text().splitlines(keepends=True)
    long = first.replace('"prompt_tokens": 1000', '"prompt_tokens": 4000')
    met = [other.replace("265.0", "250.0") for other in others]
    samples.write_text("".join([long.replace("265.0", "500.0"), *met]))
    frame = tables.costs(read_runs(tmp_path)).frame.set_index("prompt tokens")
    assert frame.loc[4096, "budget"] == f"{B}†" and frame.loc[1024, "budget"] == str(B)


def test_the_mean_is_named_where_it_is_the_measure(tmp_path: Path) -> None:
    write_run(tmp_path, "h2o", "h2o", [1.0, 2.0], budget=0.25, by="mean", held=1.38)
    frame = tables.section(Summarization.section, read_runs(tmp_path)).frame
    assert frame["budget"].item() == "0.25 mean†"
    assert frame["held / budget"].item() == pytest.approx(0.8 * 1.38)


def test_settings_are_those_that_no_budget_chose(tmp_path: Path) -> None:
    for window, fixed in ((40, ["window"]), (160, [])):
        parameters = {**BUZZ, "window": window}
        write_run(
            tmp_path, f"{window}", "buzz", [1.0, 2.0], parameters=parameters, budget=B, fixed=fixed
        )
    frame = tables.section(Summarization.section, read_runs(tmp_path)).frame
    assert list(frame["settings"]) == ["window=40", ""]


def test_early_records_are_not_marked(tmp_path: Path) -> None:
    write_run(tmp_path, "h2o", "h2o", [1.0, 2.0], budget=0.25, by=None, held=9.0)
    table = tables.section(Summarization.section, read_runs(tmp_path))
    assert "†" not in table.markdown() and table.frame["held / budget"].isna().all()


def test_figures_mark_what_holds_more_than_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over_budget(tmp_path / "runs")
    for method in ("snapkv", "h2o"):
        with open(tmp_path / f"runs/needle {method}/fidelity.jsonl", "w") as file:
            file.write(json.dumps({"id": "0", "kl_to_full": 0.5}) + "\n")
    facts = {"status": "complete", "headline": "token_perplexity", "statistic": "exp"}
    for held in (1.0, 1.38):
        write_run(
            tmp_path / "runs",
            f"read {held}",
            "h2o" if held == 1 else "snapkv",
            [2.0, 3.0],
            task="wikitext",
            blocks=True,
            budget=0.25,
            held=held,
            summary=facts | {"higher_is_better": False},
        )
        for window in (40, 80):
            method = "h2o" if held == 1 else "snapkv"  # (no such parameters, but the figure's)
            sizes = {"window": window, "sink": window // 10}
            name = f"{method} {window}"
            where = {"budget": 0.5, "held": held, "parameters": sizes, "task": "nq10"}
            write_run(tmp_path / "runs", name, method, [1.0, 0.0], **where)
    texts: dict[str, list[str]] = {}
    hollow: dict[str, list[str]] = {}

    def keep(figure: Figure, path: Path, **_: Any) -> None:
        legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        texts[path.stem] = legends + [axis.get_title() for axis in figure.axes]
        texts[path.stem] += [text.get_text() for axis in figure.axes for text in axis.texts]
        lines = [line for axis in figure.axes for line in axis.get_lines()]
        unfilled = (line for line in lines if line.get_markerfacecolor() == "none")
        hollow[path.stem] = [str(line.get_label()) for line in unfilled]
        path.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", keep)
    notes = {one.path.stem: one.note for one in draw_all(read_runs(tmp_path / "runs"), tmp_path)}
    plain, marked = texts.pop("sensitivity_0"), texts.pop("sensitivity_1")
    assert not any("†" in text for text in plain) and any("†" in text for text in marked)
    assert "snapkv @0.5† 1.38x" in notes["sensitivity_1"] and "†" not in notes["sensitivity_0"]
    assert set(texts) == {"pareto", "fidelity", "needle_0", "decode_time", "loss_by_position"}
    for name, shown in texts.items():
        assert any("snapkv" in text and "†" in text for text in shown), name
        assert not any("h2o" in text and "†" in text for text in shown), name
        assert "snapkv @0.25† 1.38x" in notes[name], name
    assert set(hollow["pareto"]) == set(hollow["fidelity"]) == {"snapkv†"}
    assert "Hollow" in notes["pareto"]


def test_a_sweep_over_another_methods_window_makes_a_report(tmp_path: Path) -> None:
    """It used to end in KeyError 'stride'."""
    write_run(tmp_path / "runs", "full", "full", [20.0] * 4)
    for window in (40, 80):
        parameters = {"sink": 4, "window": window}
        name = f"streaming {window}"
        write_run(tmp_path / "runs", name, "streaming_llm", [20.0] * 4, parameters=parameters)
    assert make_tables.main([f"runs={tmp_path / 'runs'}", f"out={tmp_path}"]) == 0
    ablations = pd.read_csv(tmp_path / "tables/ablations.csv")
    assert list(ablations["factor"]) == ["Window"] * 2
    assert list(ablations["value"]) == [40, 80]


def test_points_stand_at_the_memory_that_was_measured(tmp_path: Path) -> None:
    """Methods of one budget are a little apart, so that both are seen, and no more."""
    write_run(tmp_path, "full", "full", [1.0] * 3, kv=40e6)
    for name in ("streaming_llm", "h2o", "vatp"):
        write_run(tmp_path, name, name, [0.5] * 3, kv=10e6, budget=B)
    ((_, _, _, figure, _),) = pareto(read_runs(tmp_path))
    at = {line.get_label(): line.get_xdata()[0] for line in figure.axes[0].lines}
    assert at["full"] == 40
    drawn = [at[name] for name in ("streaming_llm", "h2o", "vatp")]
    assert drawn == pytest.approx([9.7, 10, 10.3])


def test_the_front_is_what_nothing_smaller_beats() -> None:
    memory, scores = [1.0, 2.0, 2.0, 3.0, 4.0], [5.0, 7.0, 6.0, 7.0, 9.0]
    assert front(memory, scores, True) == [(1, 5), (2, 7), (4, 9)]
    assert front(memory, [-s for s in scores], False) == [(1, -5), (2, -7), (4, -9)]


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
    assert names.count("script") == 1 and "link" not in names  # ours; the policy names its hash
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
    shown = page([], judged, tables.claims(judged), {}, [])
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
