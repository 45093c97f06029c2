"""MATH-500 and AIME: prompts and verdicts as lm-eval's, bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import read, ready, write_lines

from buzz import ConfigError

for package in ("lm_eval", "math_verify"):
    pytest.importorskip(package)

from evals.run.models import byte_tokenizer  # noqa: E402
from evals.tasks import math  # noqa: E402
from evals.tasks.math import BENCHMARKS, Math, definition, score, scorer  # noqa: E402

# Verdicts of lm-eval 0.4.13 with math-verify 0.9.0 and antlr 4.11.
GOLDEN = Path(__file__).parent / "golden/math_scores.json"
ROWS = {
    "minerva_math500": {
        "problem": "What is $1 + 1$?",
        "solution": "Two: $\\boxed{2}$.",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/1",
    },
    "aime24": {"ID": "2024-I-1", "Problem": "Find $x$.", "Answer": 204},
    "aime25": {"id": "0", "problem": "Find $x$.", "answer": "070"},
    "aime": {"ID": "1983-1", "Question": "Find $x$.", "Answer": "60"},
}
ROWS["hendrycks_math500"] = ROWS["minerva_math500"]


def load(tmp_path: Path, benchmark: str, *rows: dict, **settings) -> Math:
    path = write_lines(tmp_path / "data.jsonl", rows or [ROWS[benchmark]])
    return ready(Math(name="math", benchmark=benchmark, data_file=str(path), **settings))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("fewshot", [None, 0])
def test_the_prompt_is_lm_evals(tmp_path: Path, benchmark: str, fewshot: int | None) -> None:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    config = dict(definition(benchmark))
    split, row = config["test_split"], ROWS[benchmark]
    config["custom_dataset"] = lambda **_: DatasetDict({split: Dataset.from_list([row])})
    for name in ("doc_to_text", "process_results", "process_docs"):
        if (value := config.get(name, "")).startswith("utils."):
            config[name] = getattr(scorer(benchmark), value.removeprefix("utils."))
    if "fewshot_config" in config:
        samples = scorer(benchmark).list_fewshot_samples
        config["fewshot_config"] = config["fewshot_config"] | {"samples": samples}
    task = ConfigurableTask(config=config)
    (doc,) = task.test_docs()
    (sample,) = load(tmp_path, benchmark, fewshot=fewshot).load(byte_tokenizer())
    shots = (task.config.num_fewshot or 0) if fewshot is None else fewshot
    assert sample.prompt == task.fewshot_context(doc, shots)
    assert sample.prompt.count("Problem:") == (5 if shots else 1 if "math" in benchmark else 0)


def test_verdicts_are_lm_evals() -> None:
    cases = json.loads(GOLDEN.read_text())
    assert {(case["benchmark"], case["score"]) for case in cases} == {
        (benchmark, verdict) for benchmark in BENCHMARKS for verdict in (0, 1)
    }
    for case in cases:
        found = score(case["benchmark"], case["prediction"], case["reference"])
        assert found == case["score"], case


def test_what_follows_the_next_problem_is_not_scored(tmp_path: Path) -> None:
    task = load(tmp_path, "minerva_math500")
    (sample,) = task.load(byte_tokenizer())
    assert task.score(sample, {"prediction": "$2$\n\nProblem:\n$3$"}) == {"pass@1": 1}
    assert task.score(sample, {"prediction": "$3$\n\nProblem:\n$2$"}) == {"pass@1": 0}


def test_problems_are_the_units_of_the_interval(tmp_path: Path) -> None:
    task = load(tmp_path, "aime24", *[ROWS["aime24"]] * 3, samples=2)
    samples = task.load(byte_tokenizer())
    assert len({sample.unit for sample in samples}) == len(samples) == 2
    assert samples[0].references == ("204",)


def test_results_by_subject_and_level(tmp_path: Path) -> None:
    row = ROWS["minerva_math500"]
    task = load(tmp_path, "minerva_math500", row, row | {"level": 5}, row | {"subject": "Geometry"})
    records = [
        {"meta": sample.meta, "scores": {"pass@1": value}, "generated_tokens": tokens}
        for sample, value, tokens in zip(
            task.load(byte_tokenizer()), (1.0, 0.0, 1.0), (64, 65, 200), strict=True
        )
    ]
    assert task.breakdown(records) == {
        "subject": {"Algebra": 0.5, "Geometry": 1},
        "level": {"1": 1, "5": 0},
        # accuracy against tokens decoded
        "right within tokens": {"64": 1 / 3, "128": 1 / 3, "256": 2 / 3},
    }
    record = {"meta": {}, "scores": {"pass@1": 1.0}, "generated_tokens": 9}
    assert load(tmp_path, "aime").breakdown([record]) == {"right within tokens": {"64": 1}}


def test_attempts_at_a_problem_are_drawn_each_by_its_own_seed(tmp_path: Path) -> None:
    task = load(tmp_path, "aime24", *[ROWS["aime24"]] * 2, attempts=3, temperature=0.6, top_p=0.9)
    samples = task.load(byte_tokenizer())
    assert [one.unit for one in samples] == ["aime24-0"] * 3 + ["aime24-1"] * 3
    temperature, top_p, seeds = task.sampling(samples)
    assert (temperature, top_p) == (0.6, 0.9) and len({*seeds}) == 6
    assert seeds == task.sampling(samples)[2]
    assert load(tmp_path, "aime24").sampling(samples) is None


def test_by_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_hub(*arguments: str | None) -> list[dict]:
        asked.append(arguments)
        return [ROWS["aime25"]]

    monkeypatch.setattr(math, "load_hub", load_hub)
    Math(name="math", benchmark="aime25", hub_revision="r1").prepare()
    assert asked == [("math-ai/aime25", None, "test", "task.data_file", "r1")]
    with pytest.raises(ConfigError, match="`Problem` and `Answer` must be texts"):
        Math(name="math", benchmark="aime24").prepare()


@pytest.mark.parametrize(
    ("benchmark", "row", "settings", "message"),
    [
        ("aime24", ROWS["aime25"], {}, "lacks Problem, Answer"),
        ("aime24", {"Problem": 1, "Answer": 2}, {}, "must be texts"),
        ("aime24", {"Problem": "p", "Answer": None}, {}, "must be texts"),
        ("minerva_math500", {"problem": "p", "answer": "2"}, {}, "lacks solution"),
        ("minerva_math500", {"problem": "p", "solution": "2"}, {}, "final answer in"),
        ("minerva_math500", ROWS["minerva_math500"], {"fewshot": 5}, "has 4 worked examples"),
        ("aime24", ROWS["aime24"], {"fewshot": 1}, "has 0 worked examples"),
        ("aime26", {}, {}, "choose one of"),
        ("aime24", ROWS["aime24"], {"attempts": 2}, "same every time"),
        ("aime24", ROWS["aime24"], {"attempts": 0}, "greater than 0"),
        ("aime24", ROWS["aime24"], {"temperature": -1.0}, "greater than or equal to 0"),
        ("aime24", ROWS["aime24"], {"temperature": 1.0, "top_p": 0.0}, "greater than 0"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, benchmark: str, row: dict, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, benchmark, row, **settings)
    assert "\n" not in str(error.value)


def test_without_its_extra_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    scorer.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install -e '.\[math\]'"):
            Math(name="math").prepare()
    finally:
        scorer.cache_clear()


def test_a_run_reports_pass_at_1(go, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(ROWS["aime24"])] * 2))
    folder = go(
        "task=math",
        "task.benchmark=aime24",
        f"task.data_file={tmp_path}/data.jsonl",
        "task.max_new_tokens=6",
        "task.attempts=2",
        "task.temperature=1",
        "method=h2o",
        needle=False,
    )
    assert all(record["scores"]["pass@1"] == 0 for record in read(folder))
    assert [record["unit"] for record in read(folder)] == ["aime24-0"] * 2 + ["aime24-1"] * 2
    assert read(folder)[0]["tokens"] != read(folder)[1]["tokens"]
