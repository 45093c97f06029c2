"""RULER: prompts and scores as lm-eval's and the benchmark's, sizes, averages, bad input."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import nltk
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT, read, ready, refused, shown

from buzz import ConfigError
from evals.run.models import byte_tokenizer, load_tokenizer, named_config
from evals.tasks.encoding import encode

for package in ("lm_eval", "wonderwords", "scipy"):
    pytest.importorskip(package)

from tools import verify_ruler  # noqa: E402

from evals.tasks import ruler_texts as ruler  # noqa: E402
from evals.tasks.ruler import SYNTHETIC, Ruler, averages, score  # noqa: E402
from evals.tasks.ruler_data import QA, SUBTASKS, Pairs, family, needs  # noqa: E402
from evals.tasks.ruler_texts import ANSWER  # noqa: E402

OTHERS = [name for name in SUBTASKS if name not in SYNTHETIC]


@pytest.fixture(scope="module")
def tokenizer():
    if not (ROOT / "models" / named_config("smollm2")["gguf_file"]).exists():
        pytest.skip("the embedded model is not there: make model")
    return load_tokenizer(named_config("smollm2"))


def paragraph(number: int, part: int, words: str) -> dict:
    answers = [{"text": f"Town {number}"}, {"text": f"{number}"}]
    asked = {"question": f"Where is town {number}?", "answers": answers}
    asked["is_impossible"] = part > 1
    return {"context": f"Town {10 * number + part} {words}.", "qas": [asked]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of files in the shapes of those that the benchmark's scripts fetch."""
    folder, rng = tmp_path_factory.mktemp("ruler"), random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(
            rng.choice(["one", "tall", "Mr. Bell", "sails", "by"]) for _ in range(words)
        )

    essay = "\n\n".join(f"{sentence(9)}. {sentence(14)}!  {sentence(5)}?" for _ in range(150))
    squad = [
        {"paragraphs": [paragraph(number, part, sentence(40)) for part in range(3)]}
        for number in range(20)
    ]
    hotpot = [
        {
            "question": f"Who sails in {number}?",
            "answer": f"Bell {number}",
            "context": [[f"Page {number}.{n}", [sentence(12), sentence(8)]] for n in range(10)],
        }
        for number in range(12)
    ]
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    (folder / "squad.json").write_text(json.dumps({"data": squad}))
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return str(folder)


@pytest.fixture(scope="module")
def punkt(tmp_path_factory: pytest.TempPathFactory):
    """What nltk splits sentences by, with nothing learnt but one abbreviation."""
    root = tmp_path_factory.mktemp("nltk")
    folder = root / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("mr\n")
    nltk.data.path.insert(0, str(root))
    yield
    nltk.data.path.remove(str(root))


def make(subtask: str, length: int = 1024, chat: bool = False, **settings) -> Ruler:
    settings = {"samples": 3, "chat_template": chat} | settings
    return ready(Ruler(name="ruler", subtasks=[subtask], lengths=[length], **settings))


@pytest.mark.parametrize("subtask", SYNTHETIC)
def test_prompts_and_scores_are_lm_evals(tokenizer, subtask: str) -> None:
    assert not verify_ruler.verify(tokenizer, subtask, 1024, samples=4, seed=3)


@pytest.mark.parametrize("subtask", OTHERS)
def test_prompts_from_files_are_lm_evals(tokenizer, data: str, punkt: None, subtask: str) -> None:
    # Hotpot's ten documents to a question are all that may be asked for at this length.
    assert not verify_ruler.verify(tokenizer, subtask, 2048, samples=4, data_dir=data)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("subtask", SYNTHETIC)
def test_long_prompts_are_lm_evals(tokenizer, subtask: str, length: int) -> None:
    assert not verify_ruler.verify(tokenizer, subtask, length, samples=20, seed=1)


def test_a_difference_is_noticed(tokenizer, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    requests = verify_ruler.requests
    another = lambda *a: requests(*a[:4], a[4] + 1, *a[5:])  # noqa: E731
    monkeypatch.setattr(verify_ruler, "requests", another)
    wrong = verify_ruler.verify(tokenizer, "vt", 1024, samples=1)
    assert any("another prompt" in line for line in wrong) and any("answers" in w for w in wrong)
    monkeypatch.setattr(verify_ruler, "requests", requests)
    monkeypatch.setattr(verify_ruler, "score", lambda *arguments: 50.0)
    monkeypatch.setattr(sys, "argv", ["verify", "--lengths", "1024", "--samples", "1"])
    monkeypatch.setattr(verify_ruler, "SYNTHETIC", ["fwe"])
    assert verify_ruler.main() == 1
    assert "differs: fwe-1024-0" in capsys.readouterr().out


def test_nothing_is_fetched_for_what_is_made_here() -> None:
    code = (
        "import socket\n"
        "def refuse(*arguments, **settings): raise SystemExit('the net is asked')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "from evals.tasks.ruler import Ruler\n"
        "Ruler(name='ruler').prepare()\n"
        "from evals.tasks.ruler_texts import modules\n"
        "print(len(modules().niah.WORDS), type(modules().niah.WORDS).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, kind = done.stdout.split()  # and not a word of punkt
    assert int(count) > 1e6 and kind == "Pairs"


@given(
    st.lists(st.text("ab-", min_size=1, max_size=3), min_size=1, max_size=6),
    st.lists(st.text("ab-", min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_pairs_are_those_of_the_sorted_set(adjectives: list[str], nouns: list[str]) -> None:
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    found = Pairs(adjectives, nouns)
    # Groups of pairs interleave only where one adjective begins another, as far as a hyphen.
    assert list(found) == expected and len(found) == len(expected)
    assert found[-1] == expected[-1]
    with pytest.raises(IndexError):
        found[len(expected)]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(50, 3000), st.integers(1, 60), st.data())
def test_the_search_ends_where_counting_every_text_ends(start, step, room, line, data) -> None:
    head = data.draw(st.integers(0, 200))  # what every text begins with, thinner than the rest
    sizes, counted = [], []

    def draw(size: int) -> str:
        sizes.append(size)
        return "x" * head + "y" * (line * size)

    def count(text: str) -> int:
        counted.append(text)
        return head // 2 + text.count("y")

    found = ruler._largest(draw, count, room, start, step)
    drawn, sizes[:] = sizes[:], []
    size = start
    while (tokens := count(draw(size))) < room:
        size += step
    assert found == (size + step if tokens == room else size - step)
    assert drawn == sizes  # so the random state is the same


def test_few_texts_are_counted(tokenizer) -> None:
    counted = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(tokenizer(text)["input_ids"])

    ruler.generate("vt", count, 16384, 16384, samples=1, seed=0)
    # lm-eval's search counts 65 texts of this length; one more is for the sample.
    assert sum(length > 16384 for length in counted) < 12


@pytest.mark.parametrize("subtask", SYNTHETIC)
@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_answer_fit_the_length(tokenizer, subtask: str, chat: bool) -> None:
    for sample in make(subtask, 1024, chat, samples=8).load(tokenizer):
        ids, cut = encode(tokenizer, sample.prompt, chat, 2**40, sample.answer_prefix)
        assert not cut and 500 < len(ids) + sample.max_new_tokens <= 1024
        assert 0.8 * ANSWER[family(subtask)] <= sample.max_new_tokens <= ANSWER[family(subtask)]
        assert tokenizer.decode(ids).endswith(sample.answer_prefix)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_the_question_is_apart_from_the_context(tokenizer, data, punkt, subtask: str) -> None:
    for sample in make(subtask, 2048, data_dir=data).load(tokenizer):
        context = sample.prompt.removesuffix(sample.question)
        assert context + sample.question == sample.prompt and context.endswith("\n")
        assert sample.question.startswith(("What ", "Question: ")) and "\n" not in sample.question
        if subtask not in QA:
            assert all(answer in context for answer in sample.references)
        assert len(sample.meta["depths"] or []) in (0, len(sample.references))


def test_depths_are_where_the_needles_stand(tokenizer) -> None:
    for sample in make("vt").load(tokenizer):
        assert (
            sample.meta["depths"] == sorted(sample.meta["depths"]) and len(sample.references) == 5
        )
        for name, depth in zip(sample.references, sample.meta["depths"], strict=True):
            assert f"VAR {name} =" in sample.prompt
            place = sample.prompt.index(name) / len(sample.prompt)
            assert depth == pytest.approx(100 * place, abs=0.1)


def test_of_a_seed_the_first_prompts_are_always_the_same(tokenizer) -> None:
    random.seed(7)
    np.random.seed(7)
    few, many = (make("cwe", samples=n).load(tokenizer) for n in (2, 4))
    options = {"lengths": [1024, 1500], "samples": 2, "chat_template": False}
    beside = ready(Ruler(name="r", subtasks=["fwe", "cwe"], **options))
    found = {sample.id: sample.prompt for sample in beside.load(tokenizer)}
    assert [s.prompt for s in few] == [s.prompt for s in many[:2]]
    assert [found[f"cwe-1024-{n}"] for n in (0, 1)] == [s.prompt for s in few]
    assert few[0].prompt != make("cwe", seed=1).load(tokenizer)[0].prompt
    expected = random.Random(7).random(), np.random.RandomState(7).random_sample()
    assert (random.random(), np.random.random_sample()) == expected  # left as they were


def test_answers_count_wherever_they_stand_whatever_their_case() -> None:
    assert score("vt", "so ABC,\x00 dEf and no more", ["abc", "DEF", "GHI", "JKL"]) == 50
    assert score("niah_single_1", "it is 1234567.", ["1234567"]) == 100
    assert score("niah_single_1", "", ["1234567"]) == 0
    assert score("qa_squad", "in france", ["Paris", "France"]) == 100
    assert score("qa_squad", "in spain", ["Paris", "France"]) == 0


def test_averages_are_the_benchmarks() -> None:
    # The published row of Gemini-1.5-Pro, 4K to 128K.
    row = [96.7, 95.8, 96.0, 95.9, 95.9, 94.4]
    found = {name: round(value, 1) for name, value in averages(row).items()}
    assert found == {"avg": 95.8, "wAvg (inc)": 95.5, "wAvg (dec)": 96.1}
    assert set(averages([1.0, None]).values()) == {None}


def test_averages_with_a_part_missing_are_left_out() -> None:
    task = Ruler(name="r", subtasks=["vt", "cwe"], lengths=[2048, 1024])

    def record(subtask: str, length: int, score: float) -> dict:
        return {"meta": {"subtask": subtask, "length": length}, "scores": {"score": score}}

    records = [record("vt", 1024, 10), record("vt", 1024, 20), record("cwe", 1024, 45)]
    assert task.breakdown([*records, record("vt", 2048, 5)]) == {
        "length": {"1024": 30},
        "subtask": {"vt": 10},
        "average": {},
    }
    whole = task.breakdown([*records, record("vt", 2048, 5), record("cwe", 2048, 25)])
    assert whole["length"] == {"1024": 30, "2048": 15}
    assert whole["average"]["avg"] == 22.5 and whole["average"]["wAvg (inc)"] == 20
    one = Ruler(name="r", subtasks=["vt"], lengths=[1024])
    assert one.breakdown(records[:2]) == {}


def test_a_run_reports_subtasks_and_lengths(go) -> None:
    folder = go(
        "task=ruler",
        "task.subtasks=[niah_single_1,fwe]",
        "task.lengths=[2048,1536]",
        "task.samples=2",
        "task.max_new_tokens=4",
        "model.max_length=4096",
        "method=h2o",
        "budget=0.25",
        needle=False,
    )
    records = read(folder)
    assert len(records) == 8 and {record["group"] for record in records} == {
        f"{name} at {length}" for name in ("niah_single_1", "fwe") for length in (1536, 2048)
    }
    table = shown(folder)
    assert "ruler by length" in table and "ruler by average" in table


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"subtasks": ["niah"]}, "task.subtasks"),
        ({"subtasks": []}, "task.subtasks"),
        ({"subtasks": "vt"}, "task.subtasks"),
        ({"subtasks": ["vt", "vt"]}, "task.subtasks"),
        ({"lengths": []}, "task.lengths"),
        ({"lengths": [100]}, "task.lengths"),
        ({"lengths": [1024, 1024]}, "task.lengths"),
        ({"samples": None}, "task.samples"),
        ({"samples": 0}, "task.samples"),
        ({"data_dir": "nowhere"}, "task.data_dir"),
    ],
)
def test_bad_settings_are_refused(settings: dict, field: str) -> None:
    with refused(field):
        Ruler(name="ruler", **settings).check()


@pytest.mark.parametrize(
    ("subtask", "content", "message"),
    [
        ("qa_squad", None, "no such file, and qa_squad needs it"),
        ("qa_squad", "{", "is not JSON"),
        ("qa_squad", "[]", "is not the file"),
        ("qa_squad", '{"data": [{"paragraphs": [{}]}]}', "is not the file"),
        ("qa_squad", '{"data": []}', "holds no questions"),
        ("qa_hotpot", '[{"question": "q"}]', "is not the file"),
        ("niah_single_2", '{"essay": "x"}', "must be an object with a `text`"),
        ("niah_multiquery", '["x"]', "must be an object with a `text`"),
    ],
)
def test_files_of_the_wrong_shape_are_refused(
    tmp_path: Path, punkt: None, subtask: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / str(needs(subtask))).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        make(subtask, data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subtask", SYNTHETIC)
def test_a_length_too_short_is_refused(subtask: str) -> None:
    # A token a byte: no prompt is shorter than 256 of them.
    with pytest.raises(ConfigError, match=f"too short for {subtask}"):
        make(subtask, 256).load(byte_tokenizer())


def test_documents_that_never_fit_are_refused(tokenizer, data: str) -> None:
    with pytest.raises(ConfigError, match="too short for qa_hotpot"):
        make("qa_hotpot", 256, data_dir=data).load(tokenizer)


def test_essays_need_what_splits_them(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *arguments, **settings: False)
    with pytest.raises(ConfigError, match="punkt_tab"):
        make("niah_single_2", data_dir=data)


def test_without_its_extra_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    ruler.modules.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install -e '.\[ruler\]'"):
            Ruler(name="ruler").prepare()
    finally:
        ruler.modules.cache_clear()


def test_a_prompt_without_prefix_is_as_before(tokenizer) -> None:
    message = [{"role": "user", "content": "Hello"}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encode(tokenizer, "Hello", True, 99)[0]) == whole
    assert tokenizer.decode(encode(tokenizer, "Hello", True, 99, "I am")[0]) == f"{whole}I am"
    assert tokenizer.decode(encode(tokenizer, "Hello", False, 99, "I am")[0]) == "Hello I am"
    cut, lost = encode(tokenizer, "Hello there " * 60, True, 60, "I am")
    assert lost and len(cut) <= 60 and tokenizer.decode(cut).endswith("assistant\nI am")
