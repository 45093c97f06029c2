"""Scores of texts in any script, and of references that have next to nothing in them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from evals.tasks.base import Sample
from evals.tasks.nq10 import NQ10
from evals.tasks.pydoc import Pydoc
from evals.tasks.summarization import Summarization
from evals.tasks.text import normalized, package_rouge, rouge, self_bleu, word_f1

# Two sentences of each script that have no word in common.
SCRIPTS = {
    "Chinese": ("工蜂采集花蜜。", "冬天很冷。"),
    "Japanese": ("蜂は花へ飛ぶ", "冬がきた"),
    "Korean": ("꿀벌이 춤을 춘다", "겨울이 왔다"),
    "Thai": ("ผึ้งงาน", "หมอก"),
    "Hindi": ("रानी अंडे देती है", "सर्दी आई"),
    "Russian": ("Матка живёт пять лет", "Зимой холодно"),
    "Greek": ("Η βασίλισσα γεννά", "Χειμώνας εδώ"),
    "Arabic": ("تجمع الشغالات الرحيق", "جاء الشتاء"),
    "Hebrew": ("הדבורים רוקדות", "בא חורף"),
}
PLAIN = st.text(
    st.sampled_from(
        "abcXYZ 019.,;'-_\n\t\u2019\u201c\u2013\u2026\xa3\u20ac\xb2\xbd\u2122\u2764\ufe0f\u20e3"
    ),
    max_size=60,
)


@given(PLAIN, PLAIN)
def test_texts_of_ascii_letters_score_as_rouge_score_has_them(one: str, other: str) -> None:
    stock = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(one, other)
    assert rouge(one, other) == {name: 100 * score.fmeasure for name, score in stock.items()}


def test_inflected_english_is_stemmed_as_before() -> None:
    texts = "The bees' dances were danced (again): 3 dancers.", "Dancing bees dance; dancer's."
    stock = RougeScorer(["rougeL"], use_stemmer=True).score(*texts)["rougeL"].fmeasure
    assert rouge(*texts)["rougeL"] == 100 * stock > 30


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_words(script: str) -> None:
    text, other = SCRIPTS[script]
    assert set(rouge(text, text).values()) == {100}
    assert set(rouge(f"{text} 6", f"{other} 7").values()) == {0}
    assert 0 < rouge(f"{text} 6", f"{other} 6")["rouge1"] < 50
    assert package_rouge(text, text)["pkg_rougeL"] == pytest.approx(100)
    assert package_rouge(text, other)["pkg_rougeL"] == 0


def test_scripts_without_blanks_are_compared_by_letter() -> None:
    # One of the first two of four letters, and the second; of the pairs one of three.
    assert rouge("工蜂采蜜", "工蜂跳舞")["rouge1"] == rouge("工蜂采蜜", "工蜂跳舞")["rougeL"] == 50
    assert rouge("工蜂采蜜", "工蜂跳舞")["rouge2"] == pytest.approx(100 / 3)
    assert package_rouge("工蜂采蜜", "工蜂跳舞")["pkg_rouge1"] == pytest.approx(50)
    assert word_f1("工蜂采蜜", "工蜂跳舞") == 0.5
    assert rouge("6只dancing飞", "6 只 dances 飞")["rougeL"] == 100  # stemmed within them too
    assert rouge("ที่นี่", "ทน")["rougeL"] == 0  # marks belong to their letter


def test_letters_beyond_ascii_are_letters() -> None:
    assert rouge("schön", "sch n")["rouge1"] == rouge("für", "f r")["rouge1"] == 0
    assert rouge("Ein schöner Tag", "EIN SCHÖNER TAG")["rouge1"] == 100
    assert rouge("die Straße", "DIE STRASSE")["rouge1"] == 100
    assert rouge("café", "caf")["rouge1"] == 0


@pytest.mark.parametrize("text", [*(a for a, _ in SCRIPTS.values()), "Überfüllte naïve cafés"])
def test_one_text_in_two_normal_forms_is_one_text(text: str) -> None:
    apart = unicodedata.normalize("NFD", text)
    assert rouge(text, apart)["rougeL"] == 100
    assert normalized(text) == normalized(apart) and word_f1(text, apart) == 1


def test_full_width_forms_are_the_usual_ones() -> None:
    assert rouge("２０２６年ＡＢＣ", "2026年abc")["rougeL"] == 100
    assert normalized("ＢＥＥ！") == "bee"


def test_sentences_of_other_scripts_end_too() -> None:
    assert self_bleu("蜜蜂在跳舞。蜜蜂在跳舞。") == self_bleu("b c d e f. b c d e f.") > 0
    assert self_bleu("मधु मीठा होता है। मधु मीठा होता है।") > 0


def test_records_name_the_words_that_were_compared(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(json.dumps({"article": "x", "summary": "пчёлы летят"}))
    task = Summarization(name="xsum", hub="none", data_file=f"{tmp_path}/data")
    task.prepare()
    (sample,) = task.load(None)
    assert sample.meta["rouge_tokens"] == "unicode words"
    scores = task.score(sample, {"prediction": "Пчёлы спят"})
    assert scores["rouge1"] == pytest.approx(50)


def test_a_summary_in_another_script_is_not_of_the_page() -> None:
    page = Sample(id="0", prompt="", references=("Bees fly in 2026",))
    scores = Pydoc(name="pydoc").score(page, {"prediction": "Пчёлы летят in 2026"})
    assert scores == {"rouge1": 0.5, "rouge2": pytest.approx(1 / 3)}


SOMETHING = st.text(st.sampled_from("beEs hive.,-?АЯ蜂"), max_size=20)


@pytest.mark.parametrize("reference", ["A", "an", "The The", "?", " . ", "the -", "…"])
@given(answer=SOMETHING)
def test_a_reference_of_articles_and_marks_matches_itself_alone(
    reference: str, answer: str
) -> None:
    def scores(said: str) -> set[float]:
        sample = Sample(id="0", prompt="", references=(reference,))
        found = NQ10(name="nq10").score(sample, {"prediction": said})
        return {found[name] for name in ("best_subspan", "exact_match", "f1")}

    assert scores(reference) == {1}
    if any(c.isalnum() for c in answer) or not answer.strip():
        assert scores(answer) == {0}


def test_other_references_of_the_question_still_count() -> None:
    sample = Sample(id="0", prompt="", references=("The", "Queen Bee"))
    found = NQ10(name="nq10").score(sample, {"prediction": "It is the queen bee."})
    assert (found["best_subspan"], found["exact_match"]) == (1, 0)
