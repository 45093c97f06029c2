"""RULER's code and data (arXiv 2404.06654): lm-eval's copy of the owners' code, and essays."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from buzz.errors import ConfigError
from evals.tasks.data import load_hub, read_json
from evals.tasks.definitions import LmEval

LM_EVAL = LmEval("ruler", task="ruler", extra="ruler")
PUNKT = "needs nltk's punkt_tab: python -m nltk.downloader punkt_tab"

# The benchmark's parameters: haystack, kind of key and of value, keys, values of each, keys asked.
NIAH: dict[str, tuple[str, str, str, int, int, int]] = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
QA = {"qa_squad": "squad.json", "qa_hotpot": "hotpotqa.json"}
SUBTASKS = (*NIAH, "vt", "cwe", "fwe", *QA)
ESSAYS = "PaulGrahamEssays.json"


def family(subtask: str) -> str:
    """The generator of a subtask: a key of :data:`ANSWER`."""
    return subtask.partition("_")[0]


def needs(subtask: str) -> str | None:
    """The data file that a subtask needs, by the owners' name for it; None if it needs none."""
    return ESSAYS if subtask in NIAH and NIAH[subtask][0] == "essay" else QA.get(subtask)


def read_data(subtask: str, folder: str | None) -> Any:
    """The data of a subtask: the essays' words, or questions and documents; None if it has none.

    Args:
        folder: of the files that the owners' scripts fetch; None for lm-eval's own sources.

    Raises:
        ConfigError: it is missing or malformed.
    """
    name = needs(subtask)
    if name is None:
        return None
    path = None if folder is None else Path(folder) / name
    if path is not None and not path.is_file():
        raise ConfigError("task.data_dir", str(path), f"no such file, and {subtask} needs it")
    if subtask in QA:
        return _questions(subtask, path)
    _require_punkt(subtask)
    return _essays(path)


@cache
def modules() -> SimpleNamespace:
    """lm-eval's modules, by family, and `common`, which scores.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        names = ("common_utils", "cwe_utils", "fwe_utils", "qa_utils", "vt_utils")
        found = {name.partition("_")[0]: _lm_eval(name) for name in names}
        return SimpleNamespace(**found, **_niah_modules())
    except ImportError as error:
        raise LM_EVAL.missing from error


def _lm_eval(name: str) -> ModuleType:
    return importlib.import_module(f"lm_eval.tasks.ruler.{name}")


def _niah_modules() -> dict[str, ModuleType]:
    """The needles' modules, imported without their download and without six million strings."""
    import wonderwords

    words = wonderwords.RandomWord()._categories
    none = SimpleNamespace(_categories=defaultdict(list))
    fresh = "lm_eval.tasks.ruler.prepare_niah" not in sys.modules
    # The process of rank 0 downloads punkt, needed or not; other ranks do not.
    with (
        patch.dict(os.environ, LOCAL_RANK="1"),
        patch("wonderwords.RandomWord", lambda: none),
    ):
        niah = _lm_eval("prepare_niah")
    if fresh:
        niah.WORDS = Pairs(words["adjectives"], words["nouns"])
    return {"niah": niah, "niah_tasks": _lm_eval("niah_utils")}


class Pairs(Sequence[str]):
    """All different ``adjective-noun`` in order; a string is made only when it is read."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        tails = sorted(set(nouns))
        groups: list[list[str]] = []
        for head in sorted({f"{one}-" for one in adjectives}):
            if groups and head.startswith(groups[-1][0]):
                groups[-1].append(head)
            else:
                groups.append([head])
        # Of each group the common beginning, and the ends. Only pairs of adjectives such as `old`
        # and `old-fashioned` interleave, and are one group.
        self.blocks = [
            (heads[0], tails)
            if len(heads) == 1
            else ("", sorted({head + tail for head in heads for tail in tails}))
            for heads in groups
        ]
        self.ends = [*accumulate(len(ends) for _, ends in self.blocks)]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        head, tails = self.blocks[number]
        return head + tails[index - self.ends[number]]


@cache
def _essays(path: Path | None) -> list[str]:
    if path is None:
        rows = load_hub("baber/paul_graham_essays", None, "train", "task.data_dir")
        text = " ".join(row["text"] for row in rows)
    else:
        content = read_json(path, "task.data_dir")
        text = content.get("text") if isinstance(content, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("task.data_dir", str(path), "must be an object with a `text`")
    return re.sub(r"\s+", " ", text).split(" ")


@cache
def _questions(subtask: str, path: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions and documents, by lm-eval's own reader."""
    qa = modules().qa
    read = {"qa_squad": qa.read_squad, "qa_hotpot": qa.read_hotpotqa}[subtask].__wrapped__
    if path is None:
        try:
            return read()
        except Exception as error:  # the client raises many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                "task.data_dir", None, f"{subtask} could not be fetched ({reason}); give a folder"
            ) from error
    content = read_json(path, "task.data_dir")
    try:
        with patch.object(qa, "download_json", lambda url: content):
            questions, documents = read()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = f"is not the file that {subtask} is made from ({type(error).__name__}: {error})"
        raise ConfigError("task.data_dir", str(path), remedy) from error
    if not questions:
        raise ConfigError("task.data_dir", str(path), "holds no questions")
    return questions, documents


def _require_punkt(subtask: str) -> None:
    """Requires nltk's data that splits essays into sentences; fetches it if it is missing."""
    import nltk

    modules()
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            raise ConfigError("task.subtasks", subtask, PUNKT) from error
