"""Questions on texts of one's own: what is asked, how it is scored, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import read, ready, refused, run_tiny, shown, stub_generate, write_lines

from evals.report.views import sections
from evals.results.frame import load
from evals.run.models import byte_tokenizer
from evals.tasks.base import Sample
from evals.tasks.qa import METRICS, QA

TOKENIZER = byte_tokenizer()
HIVE = "The hive stands in the orchard. Its queen is called Maya."
BARN = "The barn has three doors."
LINES: list[dict[str, Any]] = [
    {"context": HIVE, "question": "Where is the hive?", "answers": ["in the orchard", "orchard"]},
    {"context": BARN, "question": "How many doors?", "answers": "three"},
    {"context": HIVE, "question": "Who is the queen?", "answers": ["Maya"]},
    {"context": HIVE, "question": "What has a name?", "answers": ["the queen"]},
]


def qa(tmp_path: Path, rows: list[dict[str, Any]] = LINES, **fields: Any) -> QA:
    return ready(QA(name="qa", data_file=str(write_lines(tmp_path / "own", rows)), **fields))


def test_a_line_is_a_question_at_the_end_of_its_context(tmp_path: Path) -> None:
    samples = qa(tmp_path, samples=2).load(TOKENIZER)
    assert [one.references for one in samples] == [("in the orchard", "orchard"), ("three",)]
    for one, line in zip(samples, LINES, strict=False):
        assert one.prompt.endswith(f"{line['context']}{one.question}")
        assert one.question == f"\n\nQuestion: {line['question']}\nAnswer:"
    (first, *_) = qa(tmp_path, prompt="{question}\n{context}\n{question}").load(TOKENIZER)
    assert first.question == ""  # the question is known when the context is read


def test_fields_have_the_files_names(tmp_path: Path) -> None:
    row = {"text": HIVE, "ask": "Who?", "gold": "Maya"}
    fields = {"context_field": "text", "question_field": "ask", "answers_field": "gold"}
    (sample,) = qa(tmp_path, [row], **fields).load(TOKENIZER)
    assert HIVE in sample.prompt and "Who?" in sample.question and sample.references == ("Maya",)
    with refused("task.data_file", r"own:1'.*has no 'answers' but .*task.answers_field=NAME"):
        qa(tmp_path, [row], **fields | {"answers_field": "answers"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": []}, "'answers' must be a text or a list of texts"),
        ({"answers": [" "]}, "none of them empty"),
        ({"answers": 3}, "'answers' must be"),
        ({"question": None}, "'question' must be a text"),
        ({"context": ""}, "'context' must be a text"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(tmp_path: Path, change: dict, says: str) -> None:
    with refused("task.data_file", f"own:2'.*{says}"):
        qa(tmp_path, [LINES[0], LINES[1] | change])


def test_the_answer_that_suits_best_counts(tmp_path: Path) -> None:
    task = qa(tmp_path)
    sample = task.load(TOKENIZER)[0]
    scores = task.score(sample, {"prediction": "Orchard\nand so on"})
    assert (scores["best_subspan"], scores["exact_match"], scores["f1"]) == (1, 1, 1)
    assert scores["rouge1"] == pytest.approx(100 * 2 / 5)  # of all the answer: 1 of 1, 1 of 4
    assert set(task.score(sample, {"prediction": ""}).values()) == {0}
    assert set(scores) == set(METRICS)


def test_lines_with_one_context_share_a_reading(tmp_path: Path) -> None:
    samples = qa(tmp_path, questions=2).load(TOKENIZER)
    assert [(one.shared, one.meta["line"]) for one in samples] == [
        ("0", 1),
        ("0", 3),
        ("1", 4),
        ("2", 2),
    ]
    assert len(qa(tmp_path, questions=2, samples=1).load(TOKENIZER)) == 2
    with refused("task.questions", "no two lines have the same context"):
        qa(tmp_path, LINES[:2], questions=2)


@pytest.mark.parametrize("asked", ["copies", "conversation"])
def test_questions_on_a_compressed_context(tmp_path: Path, asked: str) -> None:
    """Each is answered, scored by every metric and in the table."""
    file = write_lines(tmp_path / "own", [row | {"context": 9 * HIVE} for row in LINES])
    options = ["task=qa", f"task.data_file={file}", "task.questions=4", f"task.asked={asked}"]
    options += ["compress=context", "method=h2o", "budget=0.3", "task.max_new_tokens=4"]
    row = run_tiny(tmp_path / "runs", *options, needle=False)
    records = read(row)
    assert [one["meta"]["question"] for one in records] == [1, 2, 3, 4]
    context = len(f"{QA.prompt.partition('{')[0]}{9 * HIVE}")
    assert all(one["kv_entries_peak"] <= 0.3 * context + 1 for one in records)
    assert "qa by question" in shown(row)


def test_all_scores_are_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_generate(monkeypatch, lambda asked: "Maya" if "queen?" in asked else "in the barn")
    file = write_lines(tmp_path / "own", LINES)
    options = ["task=qa", f"task.data_file={file}", "method=full", "task.max_new_tokens=4"]
    row = run_tiny(tmp_path / "runs", *options, needle=False)
    (table,) = (one for one in sections(load(row.parent)) if one.name == "qa")
    (line,) = table.frame.to_dict("records")
    assert line["score"] == line["best_subspan"] == line["exact_match"] == 0.25
    # "in the" of three words and three, "the" of three and two, and one answer that is right
    assert line["rougeL"] == pytest.approx((200 / 3 + 0 + 100 + 40) / 4)
    text = shown(row)
    assert "qa by score" in text and all(name in text for name in METRICS)


def test_readings_count_the_same_in_every_table(tmp_path: Path) -> None:
    task = qa(tmp_path, questions=3)
    records = [
        {"unit": unit, "id": str(i), "meta": {"question": 1}, "scores": dict.fromkeys(METRICS, s)}
        for i, (unit, s) in enumerate([("0", 1.0), ("0", 0.0), ("0", 0.5), ("1", 1.0)])
    ]
    assert task.breakdown(records)["score"]["f1"] == 0.75
    apart = [record | {"unit": ""} for record in records]
    assert task.breakdown(apart)["score"]["f1"] == 0.625


def test_an_answer_is_found_as_whole_words() -> None:
    task = QA(name="qa", data_file="none.jsonl")
    for answer, reference, found in (
        ("I do not know.", "no", 0.0),
        ("16 walls", "6", 0.0),
        ("It has 6 walls.", "6", 1.0),
        ("The Hive", "hive", 1.0),
    ):
        sample = Sample(id="0", prompt="p", references=[reference])
        scores = task.score(sample, {"prediction": answer})
        assert scores["best_subspan"] == found, answer
