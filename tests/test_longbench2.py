"""LongBench v2: prompts as lm-eval's, letters as the benchmark's code reads them, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import read, ready

from buzz import ConfigError

pytest.importorskip("lm_eval")

from evals.run.models import byte_tokenizer  # noqa: E402
from evals.tasks import longbench2  # noqa: E402
from evals.tasks.longbench2 import LM_EVAL, LongBench2, subsets  # noqa: E402

OWN = {
    "_id": "66",
    "domain": "Single-Document QA",
    "sub_domain": "Literary",
    "difficulty": "hard",
    "length": "short",
    "context": "Once there was a cat.\n",
    "question": " Who was there? ",
    "choice_A": "A dog",
    "choice_B": "A cat",
    "choice_C": "A {{ bird }}",
    "choice_D": "Nobody",
    "answer": "B",
}
MIRROR = {
    "context": OWN["context"],
    "question": OWN["question"],
    "choices": ["A dog", "A cat", "A {{ bird }}", "Nobody"],
    "answer": 1,
}


def load(tmp_path: Path, rows: object, name: str = "data.json", **settings) -> LongBench2:
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else rows)
    return ready(LongBench2(name="longbench2", data_file=str(path), **settings))


def test_the_prompt_is_lm_evals(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    config = dict(LM_EVAL.read("table.yaml"))
    config["custom_dataset"] = lambda **_: DatasetDict({"train": Dataset.from_list([MIRROR])})
    task = ConfigurableTask(config=config)
    (doc,) = task.test_docs()
    for row in (OWN, MIRROR):
        (sample,) = load(tmp_path, [row], answer="letter").load(byte_tokenizer())
        assert sample.prompt == task.fewshot_context(doc, 0)
        assert sample.references == (task.doc_to_choice(doc)[task.doc_to_target(doc)],) == ("B",)


def test_by_default_the_prompt_ends_as_the_benchmarks(tmp_path: Path) -> None:
    (letter,) = load(tmp_path, [OWN], answer="letter").load(byte_tokenizer())
    (sample,) = load(tmp_path, [OWN]).load(byte_tokenizer())
    start = letter.prompt.removesuffix("Answer:")
    assert sample.prompt.removeprefix(start) == (
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.prompt.endswith(sample.question)
    context = sample.prompt.removesuffix(sample.question)
    assert context.endswith("cat.\n\n</text>\n\n") and "Who" not in context


@pytest.mark.parametrize(
    ("answer", "prediction", "accuracy", "answered"),
    [
        ("sentence", "The correct answer is (B).", 1, 1),
        ("sentence", "The correct answer is **(B)** a cat", 1, 1),
        ("sentence", "Well. The correct answer is B", 1, 1),
        ("sentence", "The correct answer is (C), not (B)", 0, 1),
        ("sentence", "B", 0, 0),
        ("sentence", "The correct answer is A, or rather: The correct answer is (B)", 1, 1),
        ("sentence", "The correct answer is B. The correct answer is A.", 1, 1),
        ("sentence", "The correct answer is (Bees)", 0, 0),
        ("sentence", "The correct answer is Bees", 1, 1),  # so the benchmark reads it
        ("sentence", "The correct answer is (B", 0, 0),
        ("sentence", "The correct answer is ( B )", 0, 0),
        ("sentence", "The correct answer is: (B)", 0, 0),
        ("sentence", "the correct answer is (B)", 0, 0),
        ("letter", " B", 1, 1),
        ("letter", "(B) a cat", 1, 1),
        ("letter", "A, or B", 0, 1),
        ("letter", "Because", 0, 0),
        ("letter", "", 0, 0),
    ],
)
def test_letters_are_read(
    tmp_path: Path, answer: str, prediction: str, accuracy: float, answered: float
) -> None:
    task = load(tmp_path, [OWN], answer=answer)
    (sample,) = task.load(byte_tokenizer())
    assert task.score(sample, {"prediction": prediction}) == {
        "accuracy": accuracy,
        "answered": answered,
    }


def test_results_by_domain_difficulty_and_length(tmp_path: Path) -> None:
    rows = [OWN, OWN | {"difficulty": "easy", "length": "long"}, MIRROR]
    task = load(tmp_path, rows)
    records = [
        {"meta": sample.meta, "scores": {"accuracy": value}}
        for sample, value in zip(task.load(byte_tokenizer()), (1.0, 0.0, 1.0), strict=True)
    ]
    assert task.breakdown(records) == {
        "domain": {"Single-Document QA": 0.5},
        "difficulty": {"hard": 1, "easy": 0},
        "length": {"short": 1, "long": 0},
    }
    assert task.breakdown(records[2:]) == {}


def test_lines_and_lists_are_read(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, (OWN, MIRROR)))
    found = load(tmp_path, lines, "data.jsonl", samples=5).load(byte_tokenizer())
    assert [sample.prompt for sample in found] == [
        sample.prompt for sample in load(tmp_path, [OWN, MIRROR]).load(byte_tokenizer())
    ]
    assert len(load(tmp_path, [OWN, MIRROR], samples=1).load(byte_tokenizer())) == 1


def test_the_mirror_is_read_by_its_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_hub(name: str, config: str, split: str, field: str, revision: str) -> list[dict]:
        asked.append((name, config, split))
        assert revision == "r1"
        return [MIRROR]

    monkeypatch.setattr(longbench2, "load_hub", load_hub)
    task = ready(LongBench2(name="longbench2", hub_revision="r1"))
    assert len(asked) == 20 and {one[::2] for one in asked} == {("recursal/longbench-v2", "train")}
    domains = {sample.meta["domain"] for sample in task.load(byte_tokenizer())}
    assert len(domains) == 6 and subsets()["legal_multi"] == "Multi-Document QA"
    asked.clear()
    LongBench2(name="longbench2", samples=2, hub_revision="r1").prepare()
    assert len(asked) == 2  # no more than are wanted


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must be a list of objects"),
        ({"data": [OWN]}, "must be a list of objects"),
        (["text"], "must be a list of objects"),
        ([OWN | {"context": None}], "`context` and `question` must be texts"),
        ([{key: OWN[key] for key in OWN if key != "choice_D"}], "must be four texts"),
        ([MIRROR | {"choices": ["one"]}], "must be four texts"),
        ([MIRROR | {"answer": 4}], "`answer` must be"),
        ([OWN | {"answer": "E"}], "`answer` must be"),
        ([OWN | {"answer": True}], "`answer` must be"),
        ([MIRROR, OWN | {"answer": ""}], "sample 2"),
    ],
)
def test_files_of_the_wrong_shape_are_refused(tmp_path: Path, rows: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, rows)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[")
    for name in ("data.json", "none.json", "none.jsonl"):
        with pytest.raises(ConfigError, match="task.data_file"):
            LongBench2(name="longbench2", data_file=str(tmp_path / name)).prepare()
    with pytest.raises(ConfigError, match="task.answer"):
        LongBench2(name="longbench2", answer="word").check()


def test_a_run_cuts_long_contexts_and_keeps_the_question(go, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([OWN | {"context": "cat " * 999}] * 2))
    folder = go(
        "task=longbench2",
        f"task.data_file={tmp_path}/data.json",
        "task.max_new_tokens=4",
        "method=buzz",
        needle=False,
    )
    assert {record["prompt_tokens"] for record in read(folder)} == {1020}
    assert all(record["truncated_tokens"] > 0 for record in read(folder))
