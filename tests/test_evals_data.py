"""Reading other people's files, and the records' own format."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import refused

from buzz import ConfigError
from evals.results.folder import SettingFolder, arithmetic_runs, row_name
from evals.results.record import FORMAT
from evals.tasks.data import read_jsonl, read_text
from evals.tasks.text import package_rouge, rouge, word_f1


@pytest.mark.parametrize(
    ("content", "message", "as_text"),
    [
        (b'{"a": 1}\n\n{"a": \n', ":3'?: not JSON", None),
        (b'{"a": 1}\n[1]\n', ":2'?: not a JSON object", None),
        (b'{"a": 1}\n{"b": 1}\n', ":2'?: lacks a", None),
        (b'{"a": "\xff"}\n', ":1'?: not UTF-8", "not UTF-8"),
        (b'{"a": "x\\ud800"}\n', ":1'?: holds a lone surrogate", None),
        (b" \n", "holds no samples", "no text"),
    ],
)
def test_malformed_files_are_named_by_line(tmp_path: Path, content, message, as_text) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with refused("task.data_file", message):
        read_jsonl(path, "task.data_file", ("a",))
    if as_text:
        with refused("task.data_file", as_text):
            read_text(path, "task.data_file")


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
    own |= {"sample_sha256": "y", "row": "h2o", "method": "h2o", "label": "h2o", "parameters": {}}
    own |= {"budget": None, "budget_by": None, "cache": {"positions": "cache", "logn_base": None}}
    return own | fields


@pytest.fixture
def folder(tmp_path: Path) -> SettingFolder:
    return SettingFolder(tmp_path)


@pytest.fixture
def file(folder: SettingFolder) -> Path:
    """A row's file that is not there yet."""
    return folder.file("h2o")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{torn", "not JSON"),
        ('{"format": 2, "id": "0"}', r"written by another version \(format 2, not 3\)"),
        ("null", "Input should be a valid dictionary"),
        ("[]", "Input should be a valid dictionary"),
        ('{"format": 3}', "row: Field required"),
        (json.dumps(missed("0", status="ok")), "group: Field required"),
        (json.dumps(missed("0") | {"id": 0}), "id: Input should be a valid string"),
        (json.dumps(missed("0", load=math.nan)), "not JSON .NaN is no number"),
        (json.dumps(missed("0", extra=[{"deep": -math.inf}])), "-Infinity is no number"),
        (json.dumps(missed("0", load=7)).replace("7", "1e999"), "1e999 is no number"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_no_record_is_named_with_its_remedy(folder, file, line, problem) -> None:
    folder.append(file, missed("a"))
    with open(file, "a") as lines:
        lines.write(f"{line}\n")
    folder.append(file, missed("b"))
    with pytest.raises(ConfigError, match=f"h2o.jsonl:2.*({problem})") as caught:
        folder.read(file)
    assert caught.value.remedy.endswith("remove that line, and the same command makes it anew")
    assert "\n" not in str(caught.value)


def test_only_a_locked_file_loses_a_torn_line(folder, file) -> None:
    folder.append(file, missed("a"))
    whole = file.read_bytes()
    with open(file, "ab") as lines:
        lines.write(b'{"id": "b", "sc')  # another process may be about to write the rest
    assert folder.read(file) == {"a": missed("a")}
    assert file.read_bytes().endswith(b'"sc')
    with folder.lock(file):
        assert file.read_bytes() == whole


def test_a_last_line_that_lacks_its_end_alone_is_kept(folder, file) -> None:
    """As some editors leave it, and a kill between two bytes."""
    folder.append(file, missed("a"))
    folder.append(file, missed("b"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert list(folder.read(file)) == ["a", "b"]
    with folder.lock(file):
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("label", "budget", "own", "name"),
    [
        ("h2o", None, {}, "h2o"),
        ("h2o", 0.25, {}, "h2o@0.25"),
        ("buzz", 512, {"stride": 3, "layers": (1, 2)}, "buzz@512,stride=3,layers=1-2"),
    ],
)
def test_a_row_is_called_by_what_tells_it_apart(label, budget, own, name) -> None:
    assert row_name(label, budget, "peak", own) == name
    assert row_name("h2o", 0.25, "mean", {}) == "h2o@0.25 mean"


def test_names_that_no_file_can_have_are_told_apart_all_the_same() -> None:
    long, other = (row_name("h2o", None, None, {"a": "x" * 300 + end}) for end in "yz")
    odd, stroke = (row_name("h2o", None, None, {"a": text}) for text in ("../b", "..:b"))
    assert len({long, other, odd, stroke}) == 4
    assert all(len(name) < 120 and "/" not in name for name in (long, other, odd, stroke))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_invalid_json_is_ever_written(folder, file, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append(file, missed("a", load=value))
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write("prompts.json", {"of": value})
    assert list(folder.path.glob("*.json")) == [] and folder.read(file) == {}


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


def test_a_record_file_with_a_byte_order_mark_is_read(folder, file) -> None:
    folder.append(file, missed("a"))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    (folder.path / "prompts.json").write_bytes(
        codecs.BOM_UTF8 + b'{"samples": {"a": "y"}, "of": 1, "data": ""}'
    )
    assert list(folder.read(file)) == ["a"] and folder.asked["of"] == 1


def test_repeated_words_count_once_by_the_package() -> None:
    assert package_rouge("bee bee bee", "bee")["pkg_rouge1"] == pytest.approx(100)
    assert rouge("bee bee bee", "bee")["rouge1"] == pytest.approx(50)


def test_long_answers_do_not_exhaust_the_stack() -> None:
    found = package_rouge("word " * 700, " ".join(f"w{i}" for i in range(1200)) + " word")
    assert found["pkg_rouge1"] > 0


def test_word_f1_ignores_case_articles_and_punctuation() -> None:
    assert word_f1("The bee", "a BEE!") == 1
    assert word_f1("red bee", "the bee") == pytest.approx(2 / 3)
    assert word_f1("bee", "") == 0
