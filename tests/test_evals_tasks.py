"""Prompts and scores of the tasks."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from runs import ROOT, ready, refused, write_lines

from buzz import ConfigError
from evals.run.models import byte_tokenizer
from evals.tasks.needle import NEEDLE, Needle
from evals.tasks.nq10 import NQ10
from evals.tasks.summarization import Summarization
from evals.tasks.wikitext import Wikitext

GOLDEN = Path(__file__).parent / "golden/longbench_scores.json"
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


@pytest.mark.parametrize("variant", ["multikey", "multivalue"])
def test_needles_with_several_passkeys(variant: str) -> None:
    options = {"variant": variant, "needles": 3, "depths": (0, 50, 100), "lengths": [1500]}
    task = ready(Needle(name="n", **options))
    for sample in task.load(TOKENIZER):
        assert 1400 < len(TOKENIZER(sample.prompt)["input_ids"]) <= 1500
        _, filler, question = sample.prompt.split("\n\n")
        found = re.findall(r"A pass key of (\w+) is (\d+)\.", filler)
        assert len(found) == 3 and len({key for _, key in found}) == 3
        asked = [key for town, key in found if town in question]
        assert sorted(sample.references) == sorted(asked)
        assert len(asked) == (1 if variant == "multikey" else 3)
        first = filler.index(f" is {sample.references[0]}") - len("A pass key of Davos")
        place = first / (len(filler) - 3 * len("A pass key of Davos is 12345. Remember it. ..."))
        assert place == pytest.approx(sample.meta["depth"] / 100, abs=0.25)


def test_needle_scores_the_share_of_passkeys_found() -> None:
    task = Needle(name="n", variant="multivalue", needles=4)
    (sample, *_) = task.load(TOKENIZER)
    answer = ", ".join(sample.references[1:])
    assert task.score(sample, {"prediction": answer}) == {"accuracy": 0.75}
    assert task.score(sample, {"prediction": ""}) == {"accuracy": 0}
    (sample, *_) = Needle(name="n").load(TOKENIZER)
    key = sample.references[0]
    for said, score in {key: 1, f"is {key}.": 1, key[:4]: 0, f"9{key}": 0, f"{key}0": 0}.items():
        assert Needle(name="n").score(sample, {"prediction": said}) == {"accuracy": score}


def test_needle_is_broken_down_by_length_and_depth() -> None:
    task = Needle(name="n", lengths=[500, 900], depths=[0, 100])
    records = [
        {"meta": {"length": n, "depth": depth}, "scores": {"accuracy": float(n == 500)}}
        for n in task.lengths
        for depth in task.depths
    ]
    found = task.breakdown(records)
    assert found["length"] == {"500": 1, "900": 0}
    assert found["length and depth"]["500 at 100%"] == 1


def test_samples_limits_the_needle() -> None:
    assert [s.group for s in Needle(name="n", samples=3).load(TOKENIZER)] == ["0%", "25%", "50%"]


def summaries(tmp_path: Path, *rows: dict, **fields) -> Summarization:
    path = write_lines(tmp_path / "data.jsonl", rows)
    return ready(Summarization(name="s", hub="none", data_file=str(path), **fields))


ASKED = "\n\nSummarize the above article in 1 sentence.\n"


def test_summaries_ask_for_their_words(tmp_path: Path) -> None:
    made = {"article": f"###\nArticle: Two\nlines.{ASKED}", "summary_gt": "Short."}
    task = summaries(tmp_path, made, {"document": "One line.", "summary": "Line."}, words=7)
    prompts = [sample.prompt for sample in task.load(TOKENIZER)]
    ending = "\n\nSummarize the above article in 7 words."
    assert prompts == [f"Two\nlines.{ending}", f"One line.{ending}"]


@pytest.mark.parametrize("examples", [f"###\nArticle: A1{ASKED}S1\n\n", "S1\n\n"])
def test_summaries_after_examples_are_refused(tmp_path: Path, examples: str) -> None:
    last = f"###\nArticle: A2{ASKED}"
    rows = [{"article": last, "summary_gt": "S2"}, {"article": examples + last, "summary_gt": "S2"}]
    with pytest.raises(ConfigError, match="task.data_file='sample 2': .*few-shot") as caught:
        summaries(tmp_path, *rows)
    assert "A1" not in str(caught.value)
    with refused("task.data_file", "a text named document or article"):
        summaries(tmp_path, {"text": "x", "summary": "y"})


def test_summaries_are_scored_by_both_packages(tmp_path: Path) -> None:
    task = summaries(tmp_path, {"article": "x", "highlights": "the bees are dancing"})
    (sample,) = task.load(TOKENIZER)
    scores = task.score(sample, {"prediction": "the bees danced"})
    # 3 of 3 and of 4 unigrams by stems, but "are" parts the bigram: 1 of 2 and of 3
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(600 / 7)
    assert scores["rouge2"] == pytest.approx(40) and scores["pkg_rouge2"] == pytest.approx(40)
    assert scores["pkg_rouge1"] == scores["pkg_rougeL"] == pytest.approx(400 / 7)  # no stems
    for nothing in ("", " .\n", "zebras juggle", "蜜蜂跳舞"):
        assert set(task.score(sample, {"prediction": nothing}).values()) == {0.0}


def test_a_summary_that_repeats_itself_is_the_worse_one(tmp_path: Path) -> None:
    task = summaries(tmp_path, {"article": "x", "highlights": "y"}, headline="self_bleu")
    (sample,) = task.load(TOKENIZER)
    varied, same = (
        task.score(sample, {"prediction": text})["self_bleu"]
        for text in ("Bees dance in the dark. Honey is gold.", "Bees dance. Bees dance.")
    )
    assert varied == 0 and same == pytest.approx(2 / 3 * 0.1 ** (1 / 3))
    assert not task.higher_is_better
    assert summaries(tmp_path, {"article": "x", "highlights": "y"}).higher_is_better


def questions(tmp_path: Path, *changes: dict, **fields) -> NQ10:
    documents = [{"title": f"T{i}", "text": f"text {i}"} for i in range(4)]
    row = {"question": "who", "answers": ["The Queen Bee", "drone"], "gold_index": 2}
    rows = [row | {"ctxs": documents} | change for change in changes or ({},)]
    rows = [{key: row[key] for key in row if row[key] is not None} for row in rows]
    path = write_lines(tmp_path / "data.jsonl", rows)
    return ready(NQ10(name="nq10", data_file=str(path), **fields))


def test_gold_document_stands_where_it_is_put(tmp_path: Path) -> None:
    task = questions(tmp_path, {}, {"gold_index": 1}, gold_at=[0, 3], samples=2)
    samples = task.load(TOKENIZER)
    assert [sample.id for sample in samples] == ["0-0", "0-3", "1-0", "1-3"]
    titles = [re.findall(r"Title: (T\d)", sample.prompt) for sample in samples]
    assert titles[:2] == [["T2", "T0", "T1", "T3"], ["T0", "T1", "T3", "T2"]]
    assert titles[2][0] == titles[3][3] == "T1" and [s.group for s in samples[:2]] == ["0", "3"]
    (unmoved,) = questions(tmp_path).load(TOKENIZER)
    assert re.findall(r"Title: (T\d)", unmoved.prompt) == ["T0", "T1", "T2", "T3"]
    assert unmoved.group == "" and unmoved.meta == {"gold_at": 2}


def test_gold_document_may_be_marked_as_the_owners_do(tmp_path: Path) -> None:
    documents = [{"title": f"T{i}", "text": "x", "isgold": i == 1} for i in range(3)]
    row = {"gold_index": None, "ctxs": documents}
    (unmoved,) = questions(tmp_path, row).load(TOKENIZER)
    assert unmoved.meta == {"gold_at": 1}
    (moved,) = questions(tmp_path, row, gold_at=[0]).load(TOKENIZER)
    assert re.findall(r"Title: (T\d)", moved.prompt) == ["T1", "T0", "T2"]


def test_questions_are_asked_in_the_owners_layout(tmp_path: Path) -> None:
    documents = [{"title": "first doc", "text": "first doc text"}, {"title": "b", "text": "c"}]
    row = {"ctxs": documents, "gold_index": 0}
    (sample,) = questions(tmp_path, row, instruction="Answer.").load(TOKENIZER)
    assert sample.prompt == (
        "Answer.\n\nDocument [1](Title: first doc) first doc text\nDocument [2](Title: b) c\n\n"
        "Question: who\nAnswer:"
    )


def test_places_of_one_question_are_drawn_together(tmp_path: Path) -> None:
    samples = questions(tmp_path, {}, {}, gold_at=[0, 3]).load(TOKENIZER)
    assert [sample.unit for sample in samples] == ["0", "0", "1", "1"]


def test_answers_by_place_of_the_gold_document(tmp_path: Path) -> None:
    task = questions(tmp_path)
    records = [
        {"meta": {"gold_at": place}, "scores": {"best_subspan": score}}
        for place, score in ((7, 1.0), (0, 0.0), (7, 0.0))
    ]
    assert task.breakdown(records) == {"place of the gold document": {"0": 0, "7": 0.5}}
    assert questions(tmp_path, gold_at=[0]).breakdown(records) == {}


@pytest.mark.parametrize(
    ("answer", "scores"),  # best_subspan, exact_match, f1, strict_match
    [
        ("The Queen Bee", (1, 1, 1, 1)),
        (" The Queen Bee\n", (1, 1, 1, 1)),
        ("\n\nThe Queen Bee", (1, 1, 1, 1)),  # the owners strip what Llama-2 answers
        ("the queen bee", (1, 1, 1, 1)),
        ("the queen bee.", (1, 1, 1, 0)),
        ("A drone", (1, 1, 1, 0)),
        ("It was the queen bee of the hive", (1, 0, 0.5, 0)),
        ("It was a wasp\nThe Queen Bee", (0, 0, 0, 0)),  # only the first line counts
        ("queen", (0, 0, 2 / 3, 0)),
        ("wasp", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
        ("蜂后", (0, 0, 0, 0)),
    ],
)
def test_answers_are_scored_as_the_owners_do(tmp_path: Path, answer: str, scores) -> None:
    task = questions(tmp_path)
    (sample,) = task.load(TOKENIZER)
    names = ("best_subspan", "exact_match", "f1", "strict_match")
    assert task.score(sample, {"prediction": answer}) == pytest.approx(
        dict(zip(names, scores, strict=True))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold_index": 4}, "sample 1.*no place"),
        ({"gold_index": None}, "lacks `gold_index`"),
        ({"answers": []}, "list of texts"),
        ({"answers": ["six", " "]}, "sample 1.*none of them empty"),
        ({"ctxs": [{"title": "x"}]}, "title and text"),
        (None, "task.gold_at=4: give places from 0 to 3"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        questions(tmp_path, change or {}, gold_at=None if change else [4])


def test_grids_with_a_repeated_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task.gold_at=.*twice"):
        questions(tmp_path, gold_at=[0, 1, 1])
    for name, values in (("lengths", [512, 512]), ("depths", [0, 50, 0])):
        with pytest.raises(ConfigError, match=f"task.{name}=.*twice"):
            Needle(name="n", **{"lengths": [512], "depths": [0], name: values}).check()


def text(tmp_path: Path, content: str, **fields) -> Wikitext:
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    return ready(Wikitext(name="w", data_file=str(tmp_path / "text.txt"), **fields))


def test_text_is_cut_into_pieces(tmp_path: Path) -> None:
    content = " ".join(f"{i:03}" for i in range(100))  # 4 tokens a word, less one
    pieces = text(tmp_path, content, tokens=120, samples=None).load(TOKENIZER)
    assert [len(piece.ids) for piece in pieces] == [120] * 3  # the short rest is left out
    assert TOKENIZER.decode([i for piece in pieces for i in piece.ids]) == content[:360]
    assert pieces[1].meta["words"] == 30
    (whole,) = text(tmp_path, content).load(TOKENIZER)
    assert len(whole.ids) == len(content)
    with pytest.raises(ConfigError, match="too short"):
        text(tmp_path, "short").load(TOKENIZER)


def test_perplexity_by_token_and_by_word(tmp_path: Path) -> None:
    task = text(tmp_path, "bees dance in the dark ")
    (sample,) = task.load(TOKENIZER)
    scores = task.score(sample, {"losses": [math.log(2)] * 22})
    assert scores["token_perplexity"] == pytest.approx(2)
    assert scores["word_perplexity"] == pytest.approx(2 ** (22 / 5))


def test_a_text_without_spaces_has_no_word_perplexity(tmp_path: Path) -> None:
    task = text(tmp_path, "蜜蜂在黑暗中跳舞" * 20)
    (sample,) = task.load(TOKENIZER)
    scores = task.score(sample, {"losses": [3.0] * 479})
    assert scores == {"token_perplexity": pytest.approx(math.exp(3))}
    record = {"prompt_tokens": 480, "meta": {}, "blocks": [3.0] * task.blocks, "scores": scores}
    assert task.breakdown([record])["metric"] == scores


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
    row = {"input": "{QUESTION}\n", "context": "{CONTEXT}"}  # braces and line ends must survive
    for name in names:
        prompt = longbench.prompt_of(name, row)
        assert "{CONTEXT}" in prompt and prompt.count("{QUESTION}\n") == prompt.count("{") - 1
        mirror = {"question": row["input"], "context": row["context"]}
        assert prompt == longbench.prompt_of(name, mirror)

        def score(said: str, name: str = name) -> float:
            return longbench.score(name, said, [answers.get(name, "1")], ["1", "2"])

        assert score("1") == pytest.approx(100, abs=0.01)
        assert [score(said) for said in ("2", "", "\n", "completely and utterly wrong")] == [0] * 4


# By config/dataset2maxlen.json and dataset2prompt.json of the benchmark: answer length, and SHA-256
# of the prompt with "CONTEXT" and "INPUT" put in.
OWNERS = {
    "narrativeqa": (128, "ca9f07fdf9f5"),
    "qasper": (128, "2348612ac9ba"),
    "multifieldqa_en": (64, "c19398b7471f"),
    "multifieldqa_zh": (64, "39c14d7ae023"),
    "hotpotqa": (32, "d31e73b501d5"),
    "2wikimqa": (32, "d31e73b501d5"),
    "musique": (32, "d31e73b501d5"),
    "dureader": (128, "66de4f9799dc"),
    "gov_report": (512, "e64c669fb47c"),
    "qmsum": (512, "1ba55beaab07"),
    "multi_news": (512, "2fa37178a851"),
    "vcsum": (512, "333ce30a208f"),
    "trec": (64, "a31ea386ec87"),
    "triviaqa": (32, "0ef1603d346d"),
    "samsum": (128, "b184d51d1f91"),
    "lsht": (64, "e41441500364"),
    "passage_count": (32, "fa3f78681dd4"),
    "passage_retrieval_en": (32, "8f1eab757de5"),
    "passage_retrieval_zh": (32, "4632499f641f"),
    "lcc": (64, "c3d427e651b3"),
    "repobench-p": (64, "91686225aaab"),
}


def test_longbench_prompts_and_lengths_are_the_benchmarks_own(longbench) -> None:
    def owners(name: str) -> tuple[int, str]:
        prompt = longbench.prompt_of(name, {"input": "INPUT", "context": "CONTEXT"})
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
        return longbench.load_dataset(name).max_new_tokens, digest

    assert {name: owners(name) for name in longbench.dataset_names()} == OWNERS


def folder_of(longbench, tmp_path: Path, names: list[str], *rows: dict, **options):
    """The task on a folder that has these rows of each of these data sets."""
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return ready(longbench.LongBench(name="longbench", data_dir=str(tmp_path), **options))


def test_longbench_reads_a_folder(longbench, tmp_path: Path) -> None:
    row = {"context": "c", "answers": ["Paragraph 1, 段落1"], "all_classes": ["a"]}
    names, rows = longbench.dataset_names(), [row | {"input": f"q{i}"} for i in range(3)]
    task = folder_of(longbench, tmp_path, names, *rows, samples=2)
    samples = {sample.id: sample for sample in task.load(TOKENIZER)}
    assert samples.keys() == {f"{name}-{number}" for name in names for number in (0, 1)}
    bare = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {one.group for one in samples.values() if not one.chat_template} == bare
    assert {one.group: one.stop for one in samples.values() if one.stop} == {"samsum": ("\n",)}
    assert (samples["qasper-0"].max_new_tokens, samples["gov_report-1"].max_new_tokens) == (
        128,
        512,
    )
    assert task.score(samples["qasper-1"], {"prediction": "a"}) == {"score": 0}  # an article


def test_longbench_e_reports_by_length(longbench, tmp_path: Path) -> None:
    names = longbench.dataset_names(extended=True)
    assert len(names) == 13 and set(names) < set(longbench.dataset_names())
    lengths = (10, 3999, 4000, 7999, 8000, 10**6)
    rows = [{"input": "q", "context": "c", "answers": ["bee"], "length": n} for n in lengths]
    task = folder_of(longbench, tmp_path, ["qasper_e", "hotpotqa_e"], *rows, extended=True)
    samples = task.load(TOKENIZER)
    assert {sample.group for sample in samples} == {"qasper", "hotpotqa"}
    answers = {"qasper": "bee", "hotpotqa": "wasp"}
    records = [
        {
            "group": s.group,
            "meta": s.meta,
            "scores": task.score(s, {"prediction": answers[s.group]}),
        }
        for s in samples
        if s.meta["length"] < 8000 or s.group == "qasper"
    ]
    found = task.breakdown(records)
    assert found["length"] == {"0-4k": 50, "4-8k": 50, "8k+": 100}
    assert found["data set at 0-4k"] == {"hotpotqa": 0, "qasper": 100}
    buckets = [longbench.bucket_of(length) for length in lengths]
    assert buckets == ["0-4k"] * 2 + ["4-8k"] * 2 + ["8k+"] * 2


def test_longbench_averages_are_the_benchmarks_own(longbench) -> None:
    """Its table's rows for Llama2-7B-chat-4k give its table's averages."""
    with open(ROOT / "results/paper/longbench_llama2_7b_chat_4k.csv") as file:
        published = {row["dataset"]: float(row["score"]) for row in csv.DictReader(file)}
    averages = [published.pop(f"average_{language}") for language in ("en", "zh")]
    assert published.keys() == set(longbench.dataset_names())
    found = longbench.averages(published)
    assert [found["average"][name] for name in ("English", "Chinese")] == pytest.approx(
        averages, abs=0.06
    )
    assert found["average"]["overall"] == pytest.approx(sum(published.values()) / 21)
    assert found["average"]["code"] == found["category"]["code"] == pytest.approx(48.1)
    assert longbench.averages({"qmsum": 5.0})["average"] == {"English": 5, "overall": 5}
    # LongBench-E has code and nothing Chinese.
    found = longbench.averages({"lcc": 4.0, "qasper": 1.0, "hotpotqa": 3.0, "trec": 8.0})
    assert found["average"] == {"English": 4, "code": 4, "overall": 4}
    assert longbench.averages({"lcc": 4.0})["average"] == {"code": 4, "overall": 4}


def test_recorded_longbench_scores_agree(longbench) -> None:
    """12 of each data set, 0..100, by the benchmark's own code."""
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(cases) == 252
    for case in cases:
        found = longbench.score(
            *(case[name] for name in ("dataset", "prediction", "answers")), case["all_classes"]
        )
        assert found == pytest.approx(case["score"], abs=0.01), case


def test_chinese_answers_score_by_their_data_sets_rules(longbench) -> None:
    answer, prediction = "蜜蜂在花园里跳舞", "蜜蜂在黑暗里跳舞。"
    # jieba's words 蜜蜂 在 花园里 跳舞 and 蜜蜂 在 黑暗 里 跳舞; in English data one strange word.
    assert longbench.score("multifieldqa_zh", prediction, [answer]) == pytest.approx(600 / 9)
    assert longbench.score("hotpotqa", prediction, [answer]) == 0
    assert longbench.score("vcsum", answer, [answer]) == pytest.approx(100)
    assert longbench.score("qmsum", answer, [answer]) == pytest.approx(100)
    assert longbench.score("lsht", "类别：农业\n体育", ["农业"], ["农业", "体育"]) == 100
    assert longbench.score("passage_retrieval_zh", "答案是段落12", ["段落12"]) == 100
    assert longbench.score("passage_retrieval_zh", "段落1和段落12", ["段落12"]) == 50


def test_longbench_takes_the_first_line_of_code_even_if_it_is_blank(longbench) -> None:
    line = "    return bee"
    for name in ("lcc", "repobench-p"):
        assert longbench.score(name, f"```python\n# dance\n{line}\nmore", [line]) == 100
        assert longbench.score(name, f"```python\n\n{line}", [line]) == 0  # lm-eval passes over it


def test_longbench_does_not_strip_predictions(longbench) -> None:
    """The package `rouge` takes white space after the last full stop for a sentence."""
    stripped, padded = (
        longbench.score("multi_news", text, ["bees dance"])
        for text in ("bees dance.", "bees dance. ")
    )
    assert stripped == pytest.approx(100) and padded < 99


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qasper", {"context": "c", "answers": ["a"]}, "sample 1.*input"),
        ("qasper", {"input": "q", "context": "c", "answers": "a"}, "list of texts"),
        ("qasper", {"input": "q", "answers": ["a"]}, "lacks context"),
        ("qasper_e", {"input": "q", "context": "c", "answers": ["a"]}, "`length` must be"),
        (
            "passage_retrieval_en",
            {"input": "q", "context": "c", "answers": ["7"]},
            "`answers` must be like Paragraph",
        ),
    ],
)
def test_longbench_refuses_other_schemas(longbench, tmp_path: Path, name, row, message) -> None:
    with pytest.raises(ConfigError, match=message):
        folder_of(longbench, tmp_path, [name], row, extended=name.endswith("_e"))


HUB = {
    "longbench": (
        ("Xnhyacinth/LongBench", "qasper", "test", "task.data_dir", "r"),
        {"question": "q", "context": "c", "answers": ["a"], "length": 5},
    ),
    "wikitext": (
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "task.data_file", "r"),
        {"text": " They dance in the dark .\n"},
    ),
}


@pytest.mark.parametrize(
    ("name", "extended"), [("longbench", 0), ("longbench", 1), ("wikitext", 0)]
)
def test_rows_of_the_hub_are_those_of_a_name_and_a_revision(
    longbench, monkeypatch, name: str, extended: int
) -> None:
    wanted, row = HUB[name]

    def load(*source: str | None) -> list[dict]:
        path, config, *rest = wanted
        assert source == (path, config + "_e" * extended, *rest)
        return [row, row]

    monkeypatch.setattr(f"evals.tasks.{name}.load_hub", load)
    if name == "wikitext":
        (sample,) = ready(Wikitext(name="w", hub_revision="r")).load(TOKENIZER)
        assert TOKENIZER.decode(sample.ids) == 2 * row["text"]  # joined as they are
    else:
        options = {"subsets": ["qasper"], "extended": bool(extended), "hub_revision": "r"}
        task = ready(longbench.LongBench(name="longbench", **options))
        (sample, _) = task.load(TOKENIZER)
        assert "Question: q" in sample.prompt and sample.group == "qasper"
