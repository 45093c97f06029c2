"""Reading other people's files, and the records' own format."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buzz import ConfigError
from evals.results.compare import compare, strata
from evals.results.records import RunFolder, arithmetic_runs, digest
from evals.results.schema import FORMAT
from evals.results.statistics import bootstrap, lead, score_of
from evals.tasks.data import read_jsonl, read_text
from evals.tasks.text import package_rouge, rouge, word_f1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', ":3'?: not JSON"),
        (b'{"a": 1}\n[1]\n', ":2'?: not a JSON object"),
        (b'{"a": 1}\n{"b": 1}\n', ":2'?: lacks a"),
        (b'{"a": "\xff"}\n', ":1'?: not UTF-8"),
        (b'{"a": "x\\ud800"}\n', ":1'?: holds a lone surrogate"),
        (b"\n", "holds no samples"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_jsonl(path, "task.data_file", ("a",))
    assert caught.value.field == "task.data_file"


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": "x\u2028y \\ud83d\\ude00"}\n\n{"a": 2}', encoding="utf-8")
    assert read_jsonl(path, "f") == [{"a": "x\u2028y \U0001f600"}, {"a": 2}]


@given(st.lists(st.integers(0, 50)))
def test_arithmetic_runs_lose_nothing(values: list[int]) -> None:
    runs = arithmetic_runs(values)
    assert [first + i * step for first, count, step in runs for i in range(count)] == values


def test_arithmetic_runs_are_short_for_a_growing_cache() -> None:
    assert arithmetic_runs([*range(90, 140), *range(60, 140)]) == [(90, 50, 1), (60, 80, 1)]


def missed(name: str, **fields: object) -> dict:
    """A record without measurements."""
    own = {"format": FORMAT, "id": name, "status": "failed", "prompt_sha256": "x"}
    return own | fields


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{torn", "not JSON"),
        ('{"id": "0"}', r"written by another version \(format 1, not 2\)"),
        ("null", "Input should be a valid dictionary"),
        ("[]", "Input should be a valid dictionary"),
        ('{"format": 2}', "Unable to extract tag|status"),
        ('{"format": 2, "id": "0", "status": "ok", "prompt_sha256": "x"}', "group: Field required"),
        (json.dumps(missed("0") | {"id": 0}), "id: Input should be a valid string"),
        (json.dumps(missed("0", load=math.nan)), "not JSON .NaN is no number"),
        (json.dumps(missed("0", extra=[{"deep": -math.inf}])), "-Infinity is no number"),
        (json.dumps(missed("0", load=7)).replace("7", "1e999"), "1e999 is no number"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_no_record_is_named_with_its_remedy(tmp_path, line: str, problem: str):
    folder = RunFolder(tmp_path)
    folder.append(missed("a"))
    with open(folder.samples, "a") as file:
        file.write(f"{line}\n")
    folder.append(missed("b"))
    with pytest.raises(ConfigError, match=f"samples.jsonl:2.*({problem})") as caught:
        folder.read()
    assert caught.value.remedy.endswith("remove that line, and the same command makes it anew")
    assert "\n" not in str(caught.value)


def test_only_a_locked_run_cuts_a_torn_line_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(missed("a"))
    whole = folder.samples.read_bytes()
    with open(folder.samples, "ab") as file:
        file.write(b'{"id": "b", "sc')  # another process may be about to write the rest
    assert folder.read() == {"a": missed("a")}
    assert folder.samples.read_bytes().endswith(b'"sc')
    with folder.lock():
        assert folder.samples.read_bytes() == whole


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path: Path) -> None:
    """As some editors leave it, and a kill between two bytes."""
    folder = RunFolder(tmp_path)
    folder.append(missed("a"))
    folder.append(missed("b"))
    whole = folder.samples.read_bytes()
    folder.samples.write_bytes(whole[:-1])
    assert list(folder.read()) == ["a", "b"]
    with folder.lock():
        assert folder.samples.read_bytes() == whole


def test_last_record_of_an_id_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for status in ("failed", "oom"):
        folder.append(missed("a", status=status))
    assert folder.read() == {"a": missed("a", status="oom")}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_invalid_json_is_ever_written(tmp_path: Path, value: float) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append(missed("a", load=value))
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write("summary.json", {"score": value})
    assert list(tmp_path.glob("*.json")) == [] and folder.read() == {}


@pytest.mark.parametrize(
    ("encoded", "problem"),
    [
        (lambda text: codecs.BOM_UTF8 + text.encode(), None),
        (lambda text: text.encode("utf-16"), None),
        (lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), None),
        (lambda text: codecs.BOM_UTF16_LE + b"x", "not UTF-16"),
    ],
    ids=["utf-8", "utf-16", "utf-16-be", "half a character"],
)
def test_files_with_a_byte_order_mark_are_read(tmp_path: Path, encoded, problem) -> None:
    (tmp_path / "rows").write_bytes(encoded('{"a": "蜜蜂"}\r\n{"a": 2}\n'))
    (tmp_path / "text").write_bytes(encoded("蜜蜂\r\n"))
    if problem:
        for read in (read_jsonl, read_text):
            with pytest.raises(ConfigError, match=problem):
                read(tmp_path / "rows", "f")
        return
    assert read_jsonl(tmp_path / "rows", "f", ("a",)) == [{"a": "蜜蜂"}, {"a": 2}]
    assert read_text(tmp_path / "text", "f") == "蜜蜂\n"


def test_a_record_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(missed("a"))
    folder.samples.write_bytes(codecs.BOM_UTF8 + folder.samples.read_bytes())
    (tmp_path / "summary.json").write_bytes(codecs.BOM_UTF8 + b'{"status": "failed", "error": ""}')
    assert list(folder.read()) == ["a"] and folder.load("summary.json")["status"] == "failed"


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1]}) == digest({"b": [1], "a": 1}) != digest({"a": 1, "b": [2]})


def test_bootstrap_interval_is_that_of_a_mean_of_means() -> None:
    assert bootstrap([[1.0] * 5, [0.0] * 9]) == (0.5, 0.5)
    low, high = bootstrap([[0.0, 1.0] * 50])
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def test_bootstrap_interval_by_the_normal_approximation() -> None:
    """Of groups of different sizes: each adds its own variance of the mean."""
    rng = np.random.default_rng(1)
    groups = [rng.normal(0, 1, 400), rng.normal(5, 3, 100), rng.normal(-2, 0.5, 25)]
    error = math.sqrt(sum(group.var() / len(group) for group in groups)) / 3
    middle = np.mean([group.mean() for group in groups])
    expected = (middle - 1.96 * error, middle + 1.96 * error)
    assert bootstrap(groups) == pytest.approx(expected, abs=0.1 * error)
    assert score_of(groups) == pytest.approx(middle)


def test_bootstrap_of_a_paired_difference_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(2)
    groups = [rng.normal(0, 1, (size, 2)) for size in (8, 30)]
    of_differences = bootstrap([group[:, 0] - group[:, 1] for group in groups])
    assert bootstrap(groups, of=lead) == pytest.approx(of_differences)


def test_samples_of_one_unit_are_drawn_together() -> None:
    """The same question asked three times tells no more than asked once."""
    scores = [float(i % 3 == 0) for i in range(30)]
    once = [({"group": ""}, [score]) for score in scores]
    thrice = [
        ({"group": place, "unit": str(i)}, [score])
        for i, score in enumerate(scores)
        for place in "abc"
    ]
    parts = [list(strata(records).values()) for records in (once, thrice)]
    assert bootstrap(parts[0]) == pytest.approx(bootstrap(parts[1]))
    assert score_of(parts[0]) == pytest.approx(score_of(parts[1])) == pytest.approx(1 / 3)
    apart = strata((record | {"unit": ""}, values) for record, values in thrice)
    low, high = bootstrap(list(apart.values()))
    assert high - low < 0.7 * np.subtract(*bootstrap(parts[0])[::-1])


def test_bootstrap_needs_two_values_of_every_group() -> None:
    assert bootstrap([[1.0, 2.0], [3.0]]) is None and bootstrap([]) is None


def test_bootstrap_interval_of_a_perplexity() -> None:
    losses = [[1.0, 2.0] * 40]
    low, high = bootstrap(losses)
    assert bootstrap(losses, "exp") == pytest.approx((math.exp(low), math.exp(high)), rel=1e-4)


def test_paired_differences_are_narrower_than_unpaired() -> None:
    values = [float(i % 7) for i in range(60)]
    pairs = [[(value + 0.5 + 0.1 * (i % 2), value) for i, value in enumerate(values)]]
    low, high = bootstrap(pairs, of=lead)
    assert 0.5 < low < 0.55 < high < 0.6


def record(name: str, score: float, tokens: list[int], **fields: object) -> dict:
    own = {"id": name, "status": "ok", "scores": {"s": score}, "tokens": tokens, "group": ""}
    return own | {"prompt_sha256": name} | fields


@pytest.mark.parametrize(("better", "wins"), [(True, 1), (False, 2)])
def test_comparison_pairs_samples(better: bool, wins: int) -> None:
    own = [
        record("a", 1.0, [1, 2, 3, 4]),
        record("b", 3.0, [9, 2]),
        record("c", 1.0, [5]),
        record("d", 9.0, [5], prompt_sha256="another"),
        record("e", 9.0, [5]) | {"status": "oom"},
        record("f", 2.0, [5]),
    ]
    full = [
        record("a", 2.0, [1, 2, 9, 4, 5]),
        record("b", 2.0, [1, 2]),
        record("c", 3.0, [5]),
        record("d", 1.0, [5]),
        record("e", 1.0, [5]),
        record("f", 2.0, [5]),
    ]
    summary = {"headline": "s", "statistic": "mean", "higher_is_better": better}
    fidelity = {
        name: {"kl_to_full": kl, "top1_to_full": 1.0} for name, kl in [("a", 0.2), ("b", 0.4)]
    }
    runs = [{r["id"]: r for r in run} for run in (own, full)]
    found = compare(*runs, summary, fidelity)
    assert (found["n"], found["wins"], found["ties"], found["losses"]) == (4, wins, 1, 3 - wins)
    assert found["difference"] == pytest.approx(-0.5)
    assert found["relative"] == pytest.approx(7 / 9)
    assert found["agreement"] == pytest.approx((3 / 5 + 1 / 2 + 1 + 1) / 4)
    assert found["prefix"] == pytest.approx((2 / 5 + 0 + 1 + 1) / 4)
    assert found["kl_to_full"] == pytest.approx(0.3) and found["top1_to_full"] == 1


def test_package_rouge_by_hand() -> None:
    # Unigrams {the, bees, danced} and {the, bees, are, dancing}: 2 common, no stems.
    found = package_rouge("the bees are dancing", "the bees danced")
    assert found == pytest.approx({"pkg_rouge1": 400 / 7, "pkg_rouge2": 40, "pkg_rougeL": 400 / 7})
    # Repeated words count once here, and as often as they stand there in rouge-score.
    assert package_rouge("bee bee bee", "bee")["pkg_rouge1"] == pytest.approx(100)
    assert rouge("bee bee bee", "bee")["rouge1"] == pytest.approx(50)


@pytest.mark.parametrize("prediction", ["", " ", ".", "..\n"])
def test_empty_answers_score_zero(prediction: str) -> None:
    assert set(package_rouge("a reference", prediction).values()) == {0.0}
    assert set(rouge("a reference", prediction).values()) == {0.0}


def test_long_answers_do_not_exhaust_the_stack() -> None:
    found = package_rouge("word " * 700, " ".join(f"w{i}" for i in range(1200)) + " word")
    assert found["pkg_rouge1"] > 0


def test_chinese_is_a_word_to_one_package_and_nothing_to_the_other() -> None:
    assert package_rouge("蜜蜂 跳舞", "蜜蜂 跳舞")["pkg_rougeL"] == pytest.approx(100)
    assert rouge("蜜蜂 跳舞", "蜜蜂 跳舞")["rougeL"] == 0  # it knows letters and digits only


def test_word_f1_ignores_case_articles_and_punctuation() -> None:
    assert word_f1("The bee", "a BEE!") == 1
    assert word_f1("red bee", "the bee") == pytest.approx(2 / 3)
    assert word_f1("bee", "") == 0


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "not UTF-8"), (b" \n", "no text")])
def test_unreadable_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_text(tmp_path / "text", "task.data_file")
