"""Figures of scores over the number of a question and the length of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from report_runs import write_run

from evals.report.curves import by_length, by_question, points
from evals.report.drawing import plt
from evals.report.marks import label
from evals.report.tables import overview
from evals.results.reading import read_runs


def write(root: Path, name: str, method: str, scores: list[float], compress: str, **task) -> None:
    """Two questions on each context, at two lengths."""
    write_run(root, name, method, scores, task="nq10", **task)
    path = root / name / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"compress": compress, "compress_chunk": 64}
    path.write_text(yaml.safe_dump(config))
    path = root / name / "samples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, record in enumerate(records):
        record["meta"] = {"question": i % 2 + 1, "length": 1024 if i < 4 else 256}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_join_the_means_of_one_setting(tmp_path: Path) -> None:
    write(tmp_path, "a", "full", [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], "context", questions=2)
    write(tmp_path, "b", "buzz", [1.0, 0.0] * 3, "context", questions=2, budget=0.25)
    write(tmp_path, "c", "buzz", [0.0, 0.0] * 3, "stream", questions=2, budget=0.25)
    write(tmp_path, "d", "buzz", [0.0, 1.0] * 3, "prompt", budget=0.25)
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert points(runs["a"], "question") == {1: 1.0, 2: pytest.approx(1 / 3)}
    assert points(runs["a"], "length") == {256: 0.5, 1024: 0.75}

    ((name, _, _, figure, shown),) = by_question(list(runs.values()))
    assert name == "by_question" and len(shown) == 4
    assert [len(axis.lines) for axis in figure.axes] == [2, 1, 1]  # never of two settings
    (first, second) = figure.axes[0].lines
    assert list(second.get_xdata()) == [1, 2] and list(second.get_ydata()) == [1.0, 0.0]
    assert "compress=stream" in figure.axes[1].get_title()
    assert figure.axes[0].get_xlabel() == "question; 3 samples a point"
    assert second.get_linewidth() > first.get_linewidth() and second.zorder < first.zorder
    figure.draw_without_rendering()
    for axis in figure.axes:  # no title runs into the next panel's
        assert axis.title.get_window_extent().width < axis.get_window_extent().width
    plt.close(figure)
    ((name, _, _, figure, shown),) = by_length(list(runs.values()))
    assert name == "by_length" and len(figure.axes) == 3
    assert figure.axes[0].get_xlabel() == "prompt (tokens); 2 to 4 samples a point"
    plt.close(figure)

    table = overview(list(runs.values())).frame.set_index("folder")
    assert dict(table["compress"]) == {
        "a": "context", "b": "context", "c": "stream 64", "d": "prompt"
    }  # fmt: skip
    assert "compress" not in overview([runs["d"]]).frame
    assert label(runs["c"], list(runs.values())).endswith("compress=stream 64")
