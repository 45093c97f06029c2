"""Prompts and scores of the tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buzz import ConfigError
from evals.models import byte_tokenizer
from evals.tasks.needle import NEEDLE, Needle
from evals.tasks.summarization import Summarization

TOKENIZER = byte_tokenizer()


def test_needle_is_made_from_its_seed() -> None:
    prompts = [
        [sample.prompt for sample in Needle(name="n", seed=seed, repeats=2).load(TOKENIZER)]
        for seed in (0, 0, 1)
    ]
    assert prompts[0] == prompts[1]
    assert not set(prompts[0]) & set(prompts[2]) and len(set(prompts[0])) == 10


@pytest.mark.parametrize("length", [600, 4096])
def test_needle_has_its_length_and_depth(length: int) -> None:
    depths = (0, 10, 50, 100)
    for sample in Needle(name="n", lengths=[length], depths=depths, repeats=3).load(TOKENIZER):
        assert length - 100 < len(TOKENIZER(sample.prompt)["input_ids"]) <= length
        _, filler, question = sample.prompt.split("\n\n")
        needle = NEEDLE.format(key=sample.references[0])
        before, after = filler.split(needle)
        place = len(before) / len(before + after)
        assert place == pytest.approx(sample.meta["depth"] / 100, abs=100 / len(filler))
        assert sample.references[0] not in before + after + question


def test_needle_scores_the_passkey_alone() -> None:
    task = Needle(name="n")
    (sample, *_) = task.load(TOKENIZER)
    key = sample.references[0]
    assert task.score(sample, f"The pass key is {key}.") == {"accuracy": 1}
    assert task.score(sample, f"The pass key is {key[:4]}.") == {"accuracy": 0}


def test_samples_limits_the_needle() -> None:
    assert [s.group for s in Needle(name="n", samples=3).load(TOKENIZER)] == ["0%", "25%", "50%"]


def summaries(tmp_path: Path, *rows: dict, **fields) -> Summarization:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Summarization(name="s", hub="none", data_file=str(path), **fields)
    task.check()
    return task


def test_summaries_ask_for_their_words(tmp_path: Path) -> None:
    ready = "###\nArticle: Two\nlines.\n\nSummarize the above article in 1 sentence.\n"
    rows = [
        {"article": ready, "summary_gt": "Short."},
        {"document": "One line.", "summary": "Line."},
    ]
    task = summaries(tmp_path, *rows, words=7)
    prompts = [sample.prompt for sample in task.load(TOKENIZER)]
    ending = "\n\nSummarize the above article in 7 words."
    assert prompts == [f"Two\nlines.{ending}", f"One line.{ending}"]


def test_summaries_are_scored_by_stemmed_rouge(tmp_path: Path) -> None:
    task = summaries(tmp_path, {"article": "x", "highlights": "the bees are dancing"})
    (sample,) = task.load(TOKENIZER)
    scores = task.score(sample, "the bees danced")
    # 3 of 3 and of 4 unigrams by stems, but "are" parts the bigram: 1 of 2 and of 3
    assert scores["rouge1"] == pytest.approx(100 * 6 / 7)
    assert scores["rouge2"] == pytest.approx(100 * 2 / 5)
    assert scores["rougeL"] == pytest.approx(100 * 6 / 7)


def test_summaries_without_article_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a text named document or article"):
        summaries(tmp_path, {"text": "x", "summary": "y"})


@pytest.fixture
def longbench():
    for name in ("lm_eval", "jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(name)
    from evals.tasks import longbench

    return longbench


def test_longbench_serves_21_data_sets(longbench) -> None:
    names = longbench.dataset_names()
    assert len(names) == 21
    answers = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落1"}
    row = {"input": "QUESTION", "context": "CONTEXT\n"}
    for name in names:
        prompt = longbench.prompt_of(name, row)
        assert "CONTEXT\n" in prompt and "{" not in prompt
        mirror = {"question": "QUESTION", "context": "CONTEXT\n"}
        assert prompt == longbench.prompt_of(name, mirror)
        right = longbench.score(name, "1", [answers.get(name, "1")], ["1", "2"])
        assert right == pytest.approx(100, abs=0.01)
        assert longbench.score(name, "2", [answers.get(name, "1")], ["1", "2"]) == 0


def test_longbench_prompts_are_the_benchmarks_own(longbench) -> None:
    def prompt(name: str) -> str:
        return longbench.prompt_of(name, {"input": "Q", "context": "C"})

    assert prompt("lcc").endswith("CNext line of code:\n")
    assert prompt("repobench-p").endswith("CQNext line of code:\n")
    assert prompt("passage_count").endswith("The final answer is: ")
    assert prompt("passage_retrieval_en").endswith("The answer is: ")
    assert prompt("passage_retrieval_zh").endswith("答案是：")
    for name in ("triviaqa", "samsum"):
        assert prompt(name).endswith("examples.\n\nC\n\nQ")
    for name in ("trec", "lsht"):
        assert prompt(name).endswith("\n\nC\nQ")


def test_longbench_scores_the_first_line_where_the_benchmark_does(longbench) -> None:
    prediction = "\n\nhoney bee\nand more"
    for name in ("triviaqa", "samsum"):
        assert longbench.score(name, prediction, ["honey bee"]) == pytest.approx(100, abs=0.01)
    assert longbench.score("hotpotqa", prediction, ["honey bee"]) == pytest.approx(200 / 3)
    assert longbench.score("trec", "\nHuman\nPlace", ["Human"], ["Human", "Place"]) == 100


def test_longbench_reads_a_folder(longbench, tmp_path: Path) -> None:
    rows = [{"input": f"q{i}", "context": "c", "answers": ["a"]} for i in range(3)]
    for name in ("samsum", "qasper"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    task = longbench.LongBench(name="longbench", data_dir=str(tmp_path), samples=2)
    task.check()
    samples = {sample.id: sample for sample in task.load(TOKENIZER)}
    assert samples.keys() == {"qasper-0", "qasper-1", "samsum-0", "samsum-1"}
    assert (samples["qasper-0"].max_new_tokens, samples["samsum-0"].max_new_tokens) == (128, 128)
    assert samples["samsum-0"].stop == ("\n",) and samples["qasper-0"].stop == ()
    assert not samples["samsum-0"].chat_template and samples["qasper-0"].chat_template
    assert task.score(samples["qasper-1"], "a") == {"score": 0}  # an article: normalized away


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "c", "answers": ["a"]}, "sample 1.*input"),
        ({"input": "q", "context": "c", "answers": "a"}, "list of texts"),
        ({"input": "q", "answers": ["a"]}, "lacks context"),
    ],
)
def test_longbench_refuses_other_schemas(longbench, tmp_path: Path, row: dict, message) -> None:
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        longbench.LongBench(name="l", data_dir=str(tmp_path)).check()
