"""From records to tables, figures, the terminal and the page, on folders made by hand."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from report_runs import BUZZ, B, Reader, write_row
from rich.console import Console

from buzz import POLICIES
from evals.report import embedded, figures, stored, views
from evals.report.__main__ import main
from evals.report.claims import CLAIMS, UNDECIDED, Judged, Measurement, at_equal_memory
from evals.report.claims import table as claims_table
from evals.report.methods import GREY, HIGHLIGHTED, called, order
from evals.report.page import page
from evals.report.table import WIDEST, Table
from evals.results.frame import SAME, Estimate, load

ROOT = Path(__file__).resolve().parents[1]


def section(root: Path, name: str) -> Table:
    return next(one for one in views.sections(load(root)) if one.name == name)


def line(table: Table, method: str) -> pd.Series:
    (found,) = (row for _, row in table.frame.iterrows() if row["method"] == method)
    return found


def report(root: Path, **more: Any) -> Path:
    out = root / "out"
    given = {"runs": root, "out": out, "paper": root / "no", "bench": root / "no"} | more
    given = {"embedded": root / "no"} | given
    assert main([f"{name}={value}" for name, value in given.items()]) == 0
    return out


# Tables


def test_a_tables_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [10.0, 20.0, 30.0])
    out = report(tmp_path)
    raw = pd.read_csv(out / "tables/summarization.csv")
    assert raw["score"].item() == 20 and raw["score low"].item() < 20 < raw["score high"].item()
    cell = r"20\.00 (\{\\scriptsize )?\["
    for text in ("tables/summarization.md", "tables/summarization.tex", "report.html"):
        assert re.search(cell, (out / text).read_text())
    assert "\\toprule" in (out / "tables/summarization.tex").read_text()


def test_a_papers_table_is_narrow_and_says_what_its_lines_have_in_common(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [10.0, 20.0, 30.0])
    write_row(tmp_path, "streaming_llm", [9.0, 18.0, 27.0], budget=0.25, kls=[0.5, 0.6, 0.7])
    report(tmp_path)
    text = (tmp_path / "out/tables/summarization.tex").read_text()
    heads = "method & budget & score & score - full & KL & KV MB & KV / full & n"
    assert heads in text and "\\label{tab:summarization}" in text and "\\centering" in text
    assert "(task xsum, model llama2\\_7b\\_chat, seed 0, metric rougeL)" in text
    assert re.search(r"StreamingLLM & 0.25 & 18.00 \{\\scriptsize \[9.*\]\} & -2.000", text)
    assert "{lrrrrrrr}" in text
    whole = pd.read_csv(tmp_path / "out/tables/summarization.csv")
    assert set(whole.method) == {"full", "streaming_llm"} and "wins" in whole


def on_page(table: Table) -> str:
    return page(load(), [table], [], table, {"Tables": [table]}, [])


def test_cells_are_escaped_in_every_form() -> None:
    table = Table("t", "A & B", pd.DataFrame({"a_b": ["x|y <script>&%"]}))
    assert r"x\|y <script>" in table.markdown()
    assert r"a\_b" in table.latex() and r"\textless{}script\textgreater{}\&\%" in table.latex()
    assert "&lt;script&gt;&amp;%" in on_page(table)


def test_what_was_not_run_says_so_and_its_files_have_headings(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [10.0, 20.0])
    out = report(tmp_path)
    assert "not run" in (out / "tables/wikitext.md").read_text()
    for path in (out / "tables").glob("*.csv"):
        assert path.read_text().split("\n")[0].count(",") >= 1 or path.stem == "longbench", path
        assert list(pd.read_csv(path).columns), path
    text = (out / "report.html").read_text()
    assert text.count("Not run: ") == 1 and "Wikitext perplexity" in text


def over_budget(root: Path) -> None:
    """SnapKV grows to 1.38 of its budget, H2O keeps to it; on three tasks."""
    for task, group in (("xsum", ""), ("longbench", "qasper"), ("needle", "")):
        more = {"lengths": [512]} if task == "needle" else {}
        write_row(root, "full", [20.0, 30.0], task=task, groups=group, kv=4e6, **more)
        for method, held in (("snapkv", 1.38), ("h2o", 1.0)):
            where: dict[str, Any] = {"task": task, "groups": group, "budget": 0.25, **more}
            kls = None if task != "needle" else [0.5, 0.6]
            where |= {"kls": kls, "held": held, "allocated": 2e6}
            write_row(root, method, [20.0, 25.0], **where)


def test_tables_mark_what_holds_more_than_its_budget(tmp_path: Path) -> None:
    over_budget(tmp_path)
    out = report(tmp_path)
    for name in ("summarization", "other_tasks", "costs", "runs", "distance"):
        for ending, dagger in (("md", "†"), ("tex", r"\textdagger{}")):
            text = (out / f"tables/{name}.{ending}").read_text()
            marked = [row for row in text.splitlines() if f"0.25{dagger}" in row]
            assert any("SnapKV" in row for row in marked), (name, ending)
            assert f"{dagger} holds over 5" in text, (name, ending)
            assert re.search(r"SnapKV @0.25\S* 1.38x", text), (name, ending)
            assert not re.search(rf"H2O[ |&@-]*0.25{re.escape(dagger)}", text), (name, ending)
        assert "0.25†" in (out / f"tables/{name}.csv").read_text()
    table = pd.read_csv(out / "tables/summarization.csv").set_index("method")
    assert table.loc["snapkv", "held / budget"] == pytest.approx(1.38)
    assert table.loc["h2o", "held / budget"] == 1 and pd.isna(table.loc["full", "held / budget"])
    sets = pd.read_csv(out / "tables/longbench.csv").set_index("data set")
    assert float(sets.loc["memory: held / budget", "snapkv@0.25†"]) == pytest.approx(1.38)
    assert float(sets.loc["memory: KV allocated MB", "h2o@0.25"]) == 2


def test_costs_are_by_length_and_mark_where_more_is_held(tmp_path: Path) -> None:
    def longer(record: dict[str, Any]) -> None:
        if record["id"] == "0":
            record |= {"prompt_tokens": 4000, "kv_entries_peak": 500.0}

    write_row(tmp_path, "h2o", [1.0] * 20, task="throughput", budget=B, edit=longer)
    frame = views.make("costs", load(tmp_path)).frame.set_index("prompt tokens")
    assert frame.loc[4096, "budget"] == f"{B}†" and frame.loc[1024, "budget"] == str(B)
    assert list(frame["n"]) == [19, 1]


def test_tables_without_scores_name_no_metric(tmp_path: Path) -> None:
    for task in ("xsum", "throughput"):  # of two metrics
        write_row(tmp_path, "full", [1.0, 2.0], task=task)
    out = report(tmp_path)
    heads = r"task & prompt tokens & KV MB & memory peak MB & TTFT s & decode tok/s & timed \\\\"
    assert heads.replace("\\\\", "\\") in (out / "tables/costs.tex").read_text()
    assert "rougeL" in (out / "tables/summarization.csv").read_text()
    assert "metric" not in pd.read_csv(out / "tables/costs.csv")


def test_a_budget_is_written_as_it_was_given(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 2.0])
    for budget in (512, 0.25):
        write_row(tmp_path, "h2o", [1.0, 2.0], budget=budget)
    write_row(tmp_path, "tova", [1.0, 2.0], budget=0.25, by="mean", held=1.38)
    table = section(tmp_path, "summarization")
    assert sorted(table.frame["budget"]) == ["-", "0.25", "0.25 mean†", "512"]
    assert line(table, "tova")["held / budget"] == pytest.approx(0.8 * 1.38)
    assert set(views.make("costs", load(tmp_path)).shown()["batch"]) == {"1"}


def test_times_are_of_timed_samples_on_one_machine(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0] * 4, speed=10.0)
    write_row(tmp_path, "h2o", [1.0] * 4, budget=0.25, speed=None)

    def untimed(record: dict[str, Any]) -> None:
        if record["id"] != "3":
            record["timed"] = False

    write_row(tmp_path, "buzz", [1.0] * 4, budget=0.25, speed=20.0, edit=untimed, loaded=True)
    write_row(tmp_path, "tova", [1.0] * 4, budget=0.25, speed=20.0, cpu="another CPU")
    table = views.make("costs", load(tmp_path))
    frame = table.frame.set_index("method")
    assert dict(frame["timed"].fillna(0)) == {"full": 4, "h2o": 0, "buzz": 1, "tova": 4}
    assert frame.loc["buzz", "tok/s / full"] == pytest.approx(2.0)  # of the one sample
    assert pd.isna(frame.loc["tova", "tok/s / full"]) and pd.isna(frame.loc["h2o", "TTFT s"])
    shown = table.shown().set_index("method")
    assert shown.loc["buzz", "decode tok/s"].endswith("~")
    assert not shown.loc["full", "decode tok/s"].endswith("~")
    assert "disturbed 1 of" in " ".join(views.notes(load(tmp_path)))


def test_an_unfinished_row_has_no_score_and_is_listed(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0] * 4)
    write_row(tmp_path, "h2o", [1.0, None, None, 1.0], budget=0.25)
    own = line(section(tmp_path, "summarization"), "h2o")
    assert pd.isna(own["score"]) and own["status"] == "unfinished: 2 of 4 samples"
    assert "unfinished" in views.overview(load(tmp_path)).markdown()
    assert any("2 of 4 samples" in note for note in views.notes(load(tmp_path)))


def test_an_unfinished_row_has_no_score_on_a_terminal(tmp_path: Path, capsys) -> None:
    write_row(tmp_path, "full", [1.0] * 4, groups=["a", "b"] * 2)
    write_row(tmp_path, "h2o", [0.5, None, None, 0.5], groups=["a", "b"] * 2, budget=0.25)
    shown = "".join(table.markdown() for table in views.breakdowns(load(tmp_path)))
    assert "h2o@0.25" not in shown and "full" in shown
    _, out, _ = printed(capsys, tmp_path)
    assert "against full" not in out and "2 of 4" in out and "0.500" not in out


def test_seeds_are_named_and_averaged_over(tmp_path: Path) -> None:
    for seed, gain in ((3, 0.0), (4, 2.0), (7, 4.0)):
        write_row(tmp_path, "full", [10.0, 20.0], seed=seed)
        write_row(tmp_path, "h2o", [10.0 + gain, 20.0 + gain], seed=seed, budget=0.25)
    table = section(tmp_path, "summarization")
    assert sorted(table.frame["seed"]) == [3, 3, 4, 4, 7, 7]
    over = views.make("seeds", load(tmp_path))
    own = line(over, "h2o")
    assert own["seed"] == "3, 4, 7" and own["score"] == 17 and own["score - full"] == 2
    assert own["score low"] < 15 and own["score high"] > 19
    assert "3, 4, 7" in over.markdown() and "3, 4, 7" in over.latex()
    assert len(set(views.labels(load(tmp_path)).values())) == 3


def test_the_terminals_lines_over_seeds_have_the_names_of_rows(tmp_path: Path, capsys) -> None:
    for seed in (3, 4):
        for row in ("h2o", "buzz"):
            kls = [0.1, 0.2 + seed]
            write_row(tmp_path, row, [0.5, 1.0], task="needle", seed=seed, budget=0.25, kls=kls)
        write_row(tmp_path, "full", [1.0, 1.0], task="needle", seed=seed)
    _, out, _ = printed(capsys, tmp_path)
    over = out[out.index("Over seeds") :].split("needle seed=3 by")[0]
    names = [one.split()[0] for one in over.splitlines() if re.search(r" \d", one)]
    assert names.count("needle") == over.count("needle seeds=3, 4  accuracy") > 0
    assert names.count("h2o@0.25") == names.count("buzz@0.25") == names.count("needle")


def test_settings_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for shots in (0, 1):
        write_row(tmp_path, "full", [1.0], shots=shots)
    other = {"name": "llama2_7b_chat", "name_or_path": "elsewhere"}
    write_row(tmp_path, "full", [1.0], model=other, shots=1)
    write_row(tmp_path, "full", [1.0], model=other, shots=1, setting="a copy")
    named = views.labels(load(tmp_path))
    assert len(named) == 4 and len(set(named.values())) == 4
    assert any("shots=0" in one for one in named.values())
    more = section(tmp_path, "summarization").frame["setting"]
    assert sorted(more) == sorted(set(more)) and any("shots=0" in one for one in more)


def test_only_settings_that_are_alike_otherwise_are_told_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_row(tmp_path, "full", [1.0], seed=seed, shots=seed)
    table = section(tmp_path, "summarization")
    assert set(table.frame["setting"]) == {""} and "setting" not in table.shown()


def test_where_samples_never_differ_the_rule_of_three_speaks(tmp_path: Path) -> None:
    where = {"task": "needle", "lengths": [512]}
    write_row(tmp_path, "full", [1.0] * 29, **where)
    write_row(tmp_path, "h2o", [0.0] * 29, budget=0.25, **where)
    own = line(section(tmp_path, "other_tasks"), "h2o")
    assert own["score"] == own["score low"] == 0 and own["score high"] == pytest.approx(0.1)
    assert (own["wins"], own["ties"], own["losses"]) == (0, 0, 29)
    assert own["score - full low"] == -1 and own["score - full high"] > -1  # never beyond what is
    assert own["score / full low"] == 0 and own["score / full high"] == pytest.approx(0.1)


def test_perplexities_are_won_by_the_lower(tmp_path: Path) -> None:
    facts = {"headline": "token_perplexity", "statistic": "exp", "higher_is_better": False}
    where = {"task": "wikitext", "blocks": True, "metric": facts, "speed": None}
    write_row(tmp_path, "full", [2.0, 2.0, 2.0], **where)
    write_row(tmp_path, "h2o", [1.0, 2.0, 1.5], budget=0.25, **where)
    own = line(section(tmp_path, "wikitext"), "h2o")
    assert (own["wins"], own["ties"], own["losses"]) == (2, 1, 0)


def test_many_methods_of_a_benchmark_are_rows(tmp_path: Path) -> None:
    for budget in (0.1, 0.2, 0.3, 0.4):
        for method in ("h2o", "buzz"):
            where: dict[str, Any] = {"task": "longbench", "groups": "qasper", "budget": budget}
            write_row(tmp_path, method, [10.0, 20.0], **where)
    table = section(tmp_path, "longbench")
    assert len(table.frame) == 8 and table.frame["qasper"].tolist() == [15.0] * 8
    assert "buzz@0.4" in set(table.frame["run"]) and "average: overall" in table.frame


def test_single_parameters_are_beside_each_other(tmp_path: Path) -> None:
    write_row(tmp_path, "buzz", [1.0, 2.0])
    write_row(tmp_path, "buzz", [3.0, 4.0], row="buzz,stride=3", parameters={**BUZZ, "stride": 3})
    both = {**BUZZ, "stride": 3, "sink": 0}
    write_row(tmp_path, "buzz", [0.0, 0.0], row="buzz,sink=0,stride=3", parameters=both)
    for window in (40, 80):
        own = {"sink": 4, "window": window}
        name = f"streaming_llm,window={window}"
        write_row(tmp_path, "streaming_llm", [9.0, 9.0], row=name, parameters=own)
    frame = views.ablations(load(tmp_path)).frame
    stride = frame[frame["parameter"] == "stride"]
    assert list(stride["value"]) == ["3", "5"] and list(stride["score"]) == [3.5, 1.5]
    assert list(frame[frame["parameter"] == "sink"]["value"]) == ["0", "4"]
    assert list(frame[frame["parameter"] == "window"]["value"]) == ["40", "80"]


def test_counts_are_whole_numbers_where_others_have_none(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [10.0, 20.0, 30.0], task="nq10")
    write_row(tmp_path, "h2o", [10.0, 20.0, 30.0], task="nq10", budget=0.25, kls=[0.5, None, 0.7])
    table = views.make("distance", load(tmp_path))
    assert table.shown().set_index("method")["n"]["h2o"] == "2"
    assert ",2," in table.frame.to_csv() and "2.0" not in table.frame[["n"]].to_csv()


def test_a_methods_summary_is_numbers(tmp_path: Path) -> None:
    write_row(tmp_path, "h2o", [1.0, 3.0, 0.0], budget=0.25, kv=2e6, status={2: "oom"})
    found = views.summary(load(tmp_path))
    assert found["score"] == 2 and found["n"] == 2 and found["oom"] == 1 and found["not_run"] == 0
    assert found["kv_nbytes_peak"] == 2e6 and found["scores.rouge2"] == 1
    assert all(value is None or isinstance(value, int | float) for value in found.values())


# The terminal


def printed(capsys: pytest.CaptureFixture[str], *given: Any) -> tuple[int, str, str]:
    status = main([str(one) for one in given])
    return status, *capsys.readouterr()


def test_the_terminal_shows_all_of_it(tmp_path: Path, capsys) -> None:
    over_budget(tmp_path)
    write_row(tmp_path, "tova", [1.0, 1.0], budget=0.25, status={1: "oom"})
    status, out, _ = printed(capsys, tmp_path)
    assert status == 0 and "llama2_7b_chat, seed 0" in out
    assert re.search(r"snapkv@0.25† +22.50", out) and "1 (+1 oom)" in out
    assert "against full" in out and "needle  accuracy" in out
    assert "snapkv@0.25 holds 1.38x its budget (peak): not at equal memory" in out
    assert "longbench by category" in out
    assert max(map(len, out.splitlines())) <= 200


@pytest.mark.parametrize(("rows", "groups"), [(2, 8), (27, 8), (27, 40), (3, 3)])
def test_breakdowns_stay_readable_and_whole(tmp_path: Path, capsys, rows: int, groups: int) -> None:
    names = [f"g{1024 * (j + 1)}" for j in range(groups)]
    for i in range(rows):
        scores = [i + j / 100 for j in range(groups)]
        write_row(tmp_path, "buzz", scores, row=f"buzz,stride={i}", groups=names, task="nq10")
    table = next(views.breakdowns(load(tmp_path)))
    console = Console(width=WIDEST)
    with console.capture() as capture:
        for part in table.rich():
            console.print(part)
    text = capture.get()
    assert "…" not in text  # nothing is cut off
    cells = [
        cell for one in text.splitlines() for cell in one.split() if re.match(r"\d+\.\d+$", cell)
    ]
    expected = [i + j / 100 for i in range(rows) for j in range(groups)]
    assert sorted(map(float, cells)) == pytest.approx(sorted(expected), abs=0.006)


def test_paired_differences_are_those_of_the_files(tmp_path: Path, capsys) -> None:
    write_row(tmp_path, "full", [10.0, 20.0, 30.0])
    write_row(tmp_path, "h2o", [11.0, 22.0, 33.0], budget=0.25, kls=[0.1, 0.2, 0.3])
    write_row(tmp_path, "buzz", [10.0, 20.0, 30.0], budget=0.25, kls=[0.2, 0.4, None])
    write_row(tmp_path, "buzz", [0.0, 0.0, 0.0], budget=0.5)
    status, out, _ = printed(capsys, tmp_path, "--paired", "h2o")
    assert status == 0 and re.search(r"h2o@0.25 +full +2.000 \[", out)
    assert re.search(r"h2o@0.25 +buzz@0.25 +2.000 .* 3 +-0.150 .* 2", out) and "@0.5" not in out
    status, _, error = printed(capsys, tmp_path, "--paired", "tova")
    assert status == 2 and error.startswith("error: --paired='tova'") and error.count("\n") == 1


def test_what_is_left_out_is_named_and_told_by_the_status(tmp_path: Path, capsys) -> None:
    write_row(tmp_path, "full", [10.0, 20.0])
    bad = write_row(tmp_path, "full", [1.0], seed=9).parent
    old = (bad / "setting.yaml").read_text().replace("version: 3", "version: 2")
    (bad / "setting.yaml").write_text(old)
    status, out, _ = printed(capsys, tmp_path)
    assert status == 1 and f"left out: {bad}: written by another version" in out.replace("\n", "")
    status, _, error = printed(capsys, bad)
    assert status == 2 and error.count("\n") == 1 and "another version" in error
    out = report(tmp_path)
    assert f"{bad}: written by" in capsys.readouterr().err
    assert "written by another version" in (out / "report.html").read_text()


def test_a_folder_that_is_not_there_is_named_among_others(tmp_path: Path, capsys) -> None:
    write_row(tmp_path, "full", [10.0, 20.0])
    write_row(tmp_path, "h2o", [10.0, 20.0], budget=0.25)
    for more in ([], ["--paired", "h2o"]):
        status, out, error = printed(capsys, tmp_path, tmp_path / "rums", *more)
        assert status == 2 and out == ""
        assert error == f"error: runs={str(tmp_path / 'rums')!r}: no such folder\n"


WRONG = ["runs=/nowhere/at/all", "colour=red", "runs=", "/nowhere"]
WRONG += [f"embedded {one}" for one in ("runs=/nowhere", "out=/nowhere", "colour=red")]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_one_line(arguments: str, capsys) -> None:
    status, _, error = printed(capsys, *arguments.split())
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


# Figures


def drawn(kind: Any, root: Path) -> tuple[Any, str]:
    rows = load(root)
    ((_, _, note, figure, _),) = kind(views.settings(views.ran(rows)), views.labels(rows))
    return figure, note


def test_points_stand_at_the_memory_that_was_measured(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0] * 3, kv=40e6)
    for name in ("streaming_llm", "h2o", "vatp"):
        write_row(tmp_path, name, [0.5] * 3, kv=10e6, budget=B, held=1.2 if name == "h2o" else 1.0)
    figure, note = drawn(figures.pareto, tmp_path)
    axis = figure.axes[0]
    spots = {str(one.get_label()): one for one in axis.lines if one.get_marker() != "None"}
    assert spots["full cache"].get_xdata()[0] == 40
    assert [spots[name].get_xdata()[0] for name in ("StreamingLLM", "H2O†", "VATP")] == [10] * 3
    assert spots["H2O†"].get_markerfacecolor() == "none" and "Hollow" in note
    named = {text.get_text() for text in axis.texts}
    assert named == {"full cache", "StreamingLLM", "H2O†", "VATP"}
    # Three names at one point are written below each other.
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without lines to points
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    plt.close(figure)


def test_a_line_joins_the_budgets_of_equal_parameters(tmp_path: Path) -> None:
    for stride in (3, 5):
        for budget, kv in ((0.25, 10e6), (0.5, 20e6)):
            row = f"buzz@{budget},stride={stride}"
            write_row(tmp_path, "buzz", [stride / 10] * 2, row=row, budget=budget, kv=kv)
    figure, _ = drawn(figures.pareto, tmp_path)
    (axis,) = figure.axes
    joined = [one for one in axis.lines if len(one.get_xdata()) == 2 and one.get_linewidth() == 0.6]
    assert sorted(tuple(one.get_ydata()) for one in joined) == [(0.3, 0.3), (0.5, 0.5)]
    assert {text.get_text() for text in axis.texts} == {"BUZZ, stride=3", "BUZZ, stride=5"}
    plt.close(figure)


def test_at_most_eight_methods_are_in_colour(tmp_path: Path, monkeypatch) -> None:
    """The reader's own first; the others are grey, and named in the note."""
    monkeypatch.setitem(POLICIES, "mine", POLICIES["h2o"])
    methods = [*order()[:11], "mine"]
    for i, name in enumerate(methods):
        write_row(tmp_path, name, [0.1 * i, 0.2], kv=1e6 * (i + 1), budget=0.25)
    figure, note = drawn(figures.pareto, tmp_path)
    points = [one for one in figure.axes[0].lines if one.get_marker() != "None"]
    grey = [one for one in points if one.get_color() == GREY]
    assert len(points) == 12 and len(grey) == 12 - HIGHLIGHTED
    named = {text.get_text() for text in figure.axes[0].texts}
    assert named == {called(name) for name in ["mine", *methods[: HIGHLIGHTED - 1]]}
    assert {one.get_label() for one in grey} == {called(name) for name in methods[7:11]}
    assert f"Grey: {', '.join(map(called, methods[7:11]))}." in note
    plt.close(figure)


def test_the_front_is_what_nothing_smaller_beats() -> None:
    memory, scores = [1.0, 2.0, 2.0, 3.0, 4.0], [5.0, 7.0, 6.0, 7.0, 9.0]
    assert figures.front(memory, scores, True) == [(1, 5), (2, 7), (4, 9)]
    assert figures.front(memory, [-s for s in scores], False) == [(1, -5), (2, -7), (4, -9)]


def test_curves_join_the_means_of_one_setting(tmp_path: Path) -> None:
    meta = [{"question": i % 2 + 1, "length": 1024 if i < 4 else 256} for i in range(6)]
    where: dict[str, Any] = {"task": "nq10", "meta": meta, "questions": 2}
    write_row(tmp_path, "full", [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], compress="context", **where)
    write_row(tmp_path, "buzz", [1.0, 0.0] * 3, compress="context", budget=0.25, **where)
    write_row(tmp_path, "buzz", [0.0, 0.0] * 3, compress="stream", budget=0.25, **where)
    rows = load(tmp_path)
    full = rows[rows.row == "full"]
    found = figures.points(full, "question", rows)
    assert found.high.max() == 1  # also where all answers are right
    assert dict(found.value) == {1: 1.0, 2: pytest.approx(1 / 3)}
    assert found.low[2] == 0 and found.high[2] == 1
    assert dict(figures.points(full, "length", rows).value) == {256: 0.5, 1024: 0.75}
    figure, _ = drawn(figures.by_question, tmp_path)
    one, other = sorted(figure.axes, key=lambda axis: axis.get_title())
    assert [len(axis.lines) for axis in (one, other)] == [2, 1]  # never of two settings
    first, second = one.lines
    assert list(second.get_xdata()) == [1, 2] and list(second.get_ydata()) == [1.0, 0.0]
    told = other.get_title()
    assert "compress=stream 64" in told and told.endswith("budget 0.25")
    assert [text.get_text() for text in one.texts] == ["full cache", "BUZZ"]
    assert one.get_xlabel() == "question; 3 samples a point"
    plt.close(figure)


def test_maps_have_their_values_written_in(tmp_path: Path) -> None:
    meta = [{"length": n, "depth": d} for n in (512, 1024) for d in (0, 50)]
    write_row(
        tmp_path, "full", [1.0, 0.5, 0.25, 0.0], task="needle", meta=meta, lengths=[512, 1024]
    )
    figure, _ = drawn(figures.maps, tmp_path)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "0.25", "0.5", "0"]
    plt.close(figure)


def test_maps_are_of_samples_that_have_both_coordinates(tmp_path: Path) -> None:
    lengths = [{"length": n} for n in (512, 512, 1024, 1024)]
    where: dict[str, Any] = {"task": "needle", "meta": [*lengths, {}], "lengths": [512]}
    write_row(tmp_path, "full", [1.0, 0.5, 0.0, 0.0, 1.0], **where)
    write_row(tmp_path, "full", [1.0], task="needle", meta=[{"words": 3}], lengths=[1024])
    names = {one.path.stem for one in figures.draw_all(load(tmp_path), tmp_path)}
    assert names == {"by_length"}


def test_every_figure_marks_what_holds_more(tmp_path: Path, monkeypatch) -> None:
    over_budget(tmp_path)
    shown: dict[str, str] = {}

    def keep(figure: Figure, path: Path, **_: Any) -> None:
        texts = [text.get_text() for axis in figure.axes for text in axis.texts]
        texts += [axis.get_title() for axis in figure.axes]
        shown[path.stem] = " ".join(texts)
        path.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", keep)
    notes = {one.path.stem: one.note for one in figures.draw_all(load(tmp_path), tmp_path)}
    assert set(shown) == {"pareto", "distance", "map_0"}
    assert all((tmp_path / f"{name}.pdf").exists() for name in shown)
    for name, texts in shown.items():
        assert "SnapKV†" in texts.replace("@0.25", "") and "H2O†" not in texts
        assert "SnapKV @0.25† 1.38x" in notes[name], name
    assert figures.draw_pareto(load(tmp_path), tmp_path / "one.png")
    assert not figures.draw_pareto(load(), tmp_path / "two.png")


# The page


def test_the_page_is_one_file_that_opens_with_your_scores(tmp_path: Path) -> None:
    evil = '</pre><script>alert("x")</script><img src=http://example.org/a.png>'
    where: dict[str, Any] = {"task": "needle", "prediction": evil, "lengths": [512]}
    where |= {"groups": evil, "model": {"name": evil, "name_or_path": evil}, "setting": "s"}
    where["edit"] = lambda record: record.update(references=[evil])
    write_row(tmp_path, "full", [1.0, 0.0, 1.0], kv=4e6, **where)
    where |= {"kls": [0.1, None, 0.5], "budget": 0.25}
    write_row(tmp_path, "buzz", [0.0, 0.0, 1.0], status={1: "failed"}, **where)
    text = (report(tmp_path) / "report.html").read_text()
    read = Reader(text)
    assert evil not in text and "script-src 'sha256-" in text
    assert evil in read.text and "FAILED in 1 of 3 samples: no room" in read.text
    names = [tag for tag, _ in read.tags]
    assert names.count("script") == 1 and "link" not in names  # ours; the policy names its hash
    pictures = [attributes["src"] or "" for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) == 3  # scores and distance against memory, and the map
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    places = [text.index(f'id="{name}"') for name in ("scores", "other_tasks", "claims")]
    assert places == sorted(places) and text.index("<details class") > places[1]


def test_the_page_needs_no_measurement() -> None:
    judged = [Judged(CLAIMS[0], Measurement(Estimate(None, None, None, 3), "m", "cpu", "xsum"))]
    shown = page(load(), [], judged, claims_table(judged), {}, [])
    assert "no number" in shown and UNDECIDED in shown


# Files


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_report_touches_only_what_it_is_asked_to(tmp_path: Path, monkeypatch) -> None:
    """Neither the runs nor what is committed, from whatever folder it is called."""
    write_row(tmp_path / "runs", "full", [10.0, 20.0])
    monkeypatch.chdir(tmp_path)
    before = digests(ROOT / "results") | digests(ROOT / "docs") | digests(tmp_path / "runs")
    assert main([f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"]) == 0
    after = digests(ROOT / "results") | digests(ROOT / "docs") | digests(tmp_path / "runs")
    assert after == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_numbers_on_file_are_on_the_page(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 2.0])
    rows = [
        {"prompt": 2048, "method": "stock", "batch": 1, "prefill_s": 2.0, "decode_ms": 40.0},
        {"prompt": 2048, "method": "full", "batch": 1, "prefill_s": 2.0, "decode_ms": 20.0},
        {"prompt": 2048, "method": "buzz", "batch": 1, "prefill_s": 3.0, "decode_ms": 10.0},
        {"prompt": 4096, "method": "buzz", "failed": "OOM <b>"},
    ]
    (tmp_path / "bench").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "bench/a-cpu.csv", index=False)
    (tmp_path / "bench/a-cpu.json").write_text('{"device": "A CPU", "threads": 2}')
    files = {"paper": ROOT / "results/paper", "embedded": ROOT / "results/embedded"}
    out = report(tmp_path, bench=tmp_path / "bench", **files)
    bench = pd.read_csv(out / "tables/bench_a-cpu.csv")
    assert bench["decode / full"][2] == 0.5 and bench["prefill / stock"][2] == 1.5
    text = (out / "report.html").read_text()
    assert "OOM &lt;b&gt;" in text and "A CPU" in text
    published = pd.read_csv(out / "tables/published_longbench_llama2_7b_chat_4k.csv")
    assert published["source"].str.contains("LongBench").all()
    assert "honeycomb" in (out / "tables/embedded_fidelity.md").read_text()


def test_numbers_that_are_not_there_are_said_to_be_missing(tmp_path: Path, capsys) -> None:
    write_row(tmp_path, "full", [1.0, 2.0])
    text = (report(tmp_path) / "report.html").read_text()
    error = capsys.readouterr().err
    for name in ("paper", "bench", "embedded"):
        line = f"no tables of {name}={tmp_path / 'no'}: no such folder"
        assert line in error and line in text


def test_published_numbers_stand_beside_measured_ones(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0] * 3, task="longbench", groups="qasper")
    base = {"name": "b", "name_or_path": "meta-llama/Llama-2-7b-hf"}
    write_row(tmp_path, "h2o", [22.0] * 3, budget=256, model=base)
    write_row(tmp_path, "h2o", [99.0] * 3, budget=256)  # another model
    found = {one.name: one for one in stored.published(ROOT / "results/paper", load(tmp_path))}
    rows = found["published_longbench_llama2_7b_chat_4k"].frame.set_index("dataset")
    assert rows.loc["qasper", "score"] == 19.2 and rows.loc["qasper", "score measured"] == 20
    assert rows.loc["qasper", "score difference"] == pytest.approx(0.8)
    assert rows.loc["hotpotqa", "score measured"] == "not run"
    assert rows.loc["average_en", "score measured"] == 20
    rows = found["published_h2o_xsum_rouge2"].frame
    one = rows[(rows.model == "Llama-2-7B") & (rows.kv_entries == "256")]
    assert one["rouge2 measured"].item() == 11
    assert one["rouge2 difference"].item() == pytest.approx(11 - 11.48)
    assert len(found) == 5 and all(len(table.frame) for table in found.values())


def test_published_numbers_stand_alone_where_no_run_has_their_metric(tmp_path: Path) -> None:
    only = {"accuracy": 1.0}
    write_row(tmp_path, "full", [1.0], task="needle", edit=lambda r: r.update(scores=only))
    for table in stored.published(ROOT / "results/paper", load(tmp_path)):
        for name in table.frame.columns[table.frame.columns.str.endswith(" measured")]:
            assert set(table.frame[name]) == {"not run"}, table.name


def test_every_published_number_names_its_source() -> None:
    for path in (ROOT / "results/paper").glob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["source"] for row in rows) and rows[0]["source"] != "same", path


def distances(root: Path, ids: int = 3) -> None:
    write_row(root, "full", [1.0] * ids)
    for method, kl in (("h2o", 0.1), ("buzz", 0.3)):
        for budget in (0.25, 0.5):
            kls = [kl + i / 100 for i in range(ids)]
            write_row(root, method, [0.5] * ids, budget=budget, kls=kls)


def test_runs_become_committed_numbers_and_the_same_tables(tmp_path: Path) -> None:
    distances(tmp_path / "runs")
    out, pictures = tmp_path / "kept", tmp_path / "img"
    given = [f"runs={tmp_path / 'runs'}", f"out={out}", f"pictures={pictures}"]
    assert main(["embedded", *given]) == 0
    summary = pd.read_csv(out / "fidelity.csv").set_index(["method", "budget"])
    assert summary.loc[("buzz", 0.25), "kl_less_h2o"] == pytest.approx(0.2)
    assert summary.loc[("buzz", 0.25), "of_full"] == pytest.approx(0.5)
    assert (out / "tables/fidelity_xsum.md").exists() and (out / "tables/contrasts.md").exists()
    assert (pictures / "fidelity_xsum.png").exists() and (out / "environment.json").exists()
    assert "prediction" not in pd.read_csv(out / "samples.csv.gz")
    once = digests(out)
    assert main(["embedded", f"out={out}", f"pictures={pictures}"]) == 0
    assert digests(out) == once
    (table,) = embedded.divergence(embedded.summarize(load(tmp_path / "runs")))
    assert "## xsum" in table.markdown()


def test_committed_numbers_tell_constraints_and_the_model(tmp_path: Path, capsys) -> None:
    """Rows of one label and budget under other constraints do not replace each other."""
    distances(tmp_path / "runs")
    for row in ("h2o@0.25,granularity=page16", "h2o@0.25,heads=layer"):
        kls = [0.2, 0.3, 0.4]
        write_row(tmp_path / "runs", "h2o", [0.5] * 3, row=row, budget=0.25, kls=kls)
    given = [f"out={tmp_path / 'kept'}", f"pictures={tmp_path / 'img'}"]
    assert main(["embedded", f"runs={tmp_path / 'runs'}", *given]) == 0
    rows = load(tmp_path / "kept")
    constrained = {"h2o,granularity=page16", "h2o,heads=layer"}
    assert set(rows.label) == {"full", "h2o", "buzz", *constrained}
    assert set(rows.model) == set(load(tmp_path / "runs").model)
    write_row(tmp_path / "runs", "h2o", [0.5], budget=0.25, kls=[0.1], model={"name": "another"})
    assert main(["embedded", f"runs={tmp_path / 'runs'}", *given]) == 2
    assert "of several models" in capsys.readouterr().err


def test_answers_of_two_full_caches_are_not_put_together(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        distances(tmp_path / name)
        assert (
            main(["embedded", *(f"{k}={tmp_path / name}" for k in ("runs", "out", "pictures"))])
            == 0
        )
    lines = pd.read_csv(tmp_path / "a/samples.csv.gz", dtype={"sample": str}).assign(answer="other")
    lines.to_csv(tmp_path / "a/samples.csv.gz", index=False)
    given = [f"runs={tmp_path / 'b'}", f"beside={tmp_path / 'a'}", f"out={tmp_path / 'c'}"]
    assert main(["embedded", *given]) == 2
    assert "two answers to xsum 0" in capsys.readouterr().err


def test_bytes_are_of_all_layers_and_those_a_budget_governs_stand_beside(tmp_path: Path) -> None:
    """Layers with a window of their own hold 400 kB of a sample under either method."""

    def evicting(nbytes: float) -> Any:
        both = {f"kv_evicting_nbytes_{kind}": nbytes for kind in ("mean", "peak")}
        return lambda record: record.update(both)

    write_row(tmp_path, "full", [2.0, 3.0], kv=1.4e6, edit=evicting(1e6))
    write_row(tmp_path, "h2o", [1.0, 2.0], kv=0.61e6, budget=0.25, edit=evicting(0.21e6))
    row = views.make("scores", load(tmp_path)).frame.set_index("method").loc["h2o"]
    assert row["KV / full"] == pytest.approx(0.61 / 1.4)
    assert row["evicting / full"] == pytest.approx(0.21)
    plain = tmp_path / "plain"
    write_row(plain, "full", [2.0, 3.0], kv=1e6)
    write_row(plain, "h2o", [1.0, 2.0], kv=0.25e6, budget=0.25)
    assert "evicting / full" not in views.make("scores", load(plain)).shown()


def test_equal_memory_is_of_the_layers_that_evict(tmp_path: Path) -> None:
    """Windows that all methods have alike make no two methods equal."""
    for method, nbytes in (("h2o", 0.2e6), ("buzz", 0.1e6)):
        both = {f"kv_evicting_nbytes_{kind}": nbytes for kind in ("mean", "peak")}
        told = {"budget": 250, "edit": lambda record, both=both: record.update(both)}
        write_row(tmp_path, method, [1.0], kv=10e6 + nbytes, **told)
    rows = load(tmp_path)
    own, other = (rows[rows.method == name] for name in ("h2o", "buzz"))
    assert at_equal_memory(own, other) == pytest.approx(2)


def test_tables_of_answers_say_how_long_they_are(tmp_path: Path) -> None:
    """BUZZ says 12 tokens, and 20 with a wider window, where the full cache says 8."""
    for task, groups in (("needle", ""), ("longbench", "qasper")):
        for seed in (0, 1):
            where: dict[str, Any] = {"task": task, "groups": groups, "seed": seed}
            write_row(tmp_path, "full", [1.0, 0.0], **where)
            for window, tokens in ((32, 12), (64, 20)):
                own = {"row": f"buzz,window={window}", "parameters": BUZZ | {"window": window}}
                longer = {"edit": lambda record, n=tokens: record.update(generated_tokens=n)}
                write_row(tmp_path, "buzz", [1.0, 1.0], budget=None, **own, **longer, **where)
    rows = load(tmp_path)
    tables = [views.make(view, rows) for view in ("scores", "costs", "seeds")]
    tables += [views.ablations(rows)]
    for table in tables:
        for line in table.frame.to_dict("records"):
            if line.get("method", "buzz").startswith("buzz"):
                tokens = 12 if "32" in line["parameters"] else 20
                assert line["answer tokens"] == tokens, table.name
                assert line["answer / full"] == tokens / 8, table.name
    (benchmark,) = (table for table in views.sections(rows) if table.name == "longbench")
    sets = benchmark.frame.set_index("data set")
    assert {12, 20} <= set(sets.loc["answers: tokens"]) and 8 in set(sets.loc["answers: tokens"])
    assert {1.5, 2.5} <= set(sets.loc["answers: tokens / full"])
    assert set(views.make("terminal", rows).frame["answer tokens"]) == {"8", "12", "20"}
    assert set(views.make("against", rows).frame["answer /full"]) == {"1.50", "2.50"}


def test_a_sign_test_is_the_binomials() -> None:
    assert embedded.sign_test(5, 10) == 1.0
    assert embedded.sign_test(0, 10) == pytest.approx(2 / 2**10)
    assert embedded.sign_test(9, 10) == embedded.sign_test(1, 10) == pytest.approx(22 / 2**10)


def test_sign_tests_are_corrected_over_the_methods_of_a_budget() -> None:
    """Of two rivals on 20 prompts: the smaller p counts twice, the other is not below it."""
    lines = []
    for label, farther in (("h2o", 0), ("near", 4), ("far", 18)):
        for number in range(20):
            kl = 1.0 if label == "h2o" else 1.5 if number < farther else 0.5
            line = dict.fromkeys(SAME, "") | {"setting": "nq10", "id": str(number)}
            line |= {"budget": 0.25, "budget_by": "peak", "status": "ok"}
            lines.append(line | {"label": label, "row": label, "kl_to_full": kl})
    (table,) = embedded.signs(pd.DataFrame(lines))
    found = table.frame.set_index("method")
    assert list(found.nearer) == [2, 16] and list(found.index) == ["far", "near"]
    far, near = (embedded.sign_test(fewer, 20) for fewer in (2, 16))
    assert list(found["p, Holm"]) == pytest.approx([2 * far, max(2 * far, near)])


def test_a_note_on_many_rows_gives_the_range_of_the_others(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0] * 3)
    for i in range(7):
        stop = {"edit": lambda record: record.update(stop_reason="length")} if i < 2 else {}
        write_row(tmp_path, "h2o", [1.0] * 3, row=f"h2o@{i}", budget=0.5, **stop)
    (note,) = [one for one in views.notes(load(tmp_path)) if "stop reasons" in one]
    assert note.endswith("rows differ in stop reasons: full eos 3; 7 others eos 0-3 length 0-3")
