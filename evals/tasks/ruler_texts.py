"""RULER's generators (arXiv 2404.06654), by way of lm-eval's copy of the owners' code.

What draws a text of a given size is lm-eval's own. How large it has to be for a length in tokens is
searched here, as there one step after another, since every try draws from the random state that
decides what comes after; but a text that is certainly short enough is not tokenized, and a length
that is too short ends in an error, where the owners' loops never end.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import random
import re
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from buzz.errors import ConfigError
from evals.tasks.data import load_hub

REMEDY = "RULER needs lm-eval and its word lists: pip install -e '.[ruler]'"
PUNKT = "needs nltk's punkt_tab: python -m nltk.downloader punkt_tab"

# The benchmark's answer lengths in tokens.
ANSWER = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}

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
# Subtasks whose texts hold several keys with one value each, and a sentence with one of them.
ASKABLE = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery")
KEY = re.compile(r"special magic (number|uuid)s? for (\S+) is: ([\w-]+)")

QA = {"qa_squad": "squad.json", "qa_hotpot": "hotpotqa.json"}
SUBTASKS = (*NIAH, "vt", "cwe", "fwe", *QA)
ESSAYS = "PaulGrahamEssays.json"

SPREAD = 1.1  # see _largest()

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class Drawn:
    """One prompt.

    Attributes:
        text: all but the answer's beginning.
        question: its end, the line that asks.
        prefix: how the answer begins.
        answers: what must be in it.
    """

    text: str
    question: str
    prefix: str
    answers: tuple[str, ...]


def family(subtask: str) -> str:
    """What generates a subtask: a key of :data:`ANSWER`."""
    return subtask.partition("_")[0]


def needs(subtask: str) -> str | None:
    """The file of data that a subtask is made from, under the name that the owners give it."""
    return ESSAYS if subtask in NIAH and NIAH[subtask][0] == "essay" else QA.get(subtask)


def generate(
    subtask: str, count: Count, length: int, room: int, samples: int, seed: int, data: Any = None
) -> list[Drawn]:
    """Prompts that leave space for the answer; the first n are the same for every `samples`.

    Of a seed they are lm-eval's when `random` and `numpy.random` get it before that subtask and
    length, with two differences. Of `cwe`, a worked example stands before the list and is counted
    with it, as the owners have it; lm-eval leaves it out. Of `fwe`, the answer has room within the
    length, as the owners have it since June 2025: prompts are lm-eval's of a length shorter by it.

    Args:
        subtask: one of :data:`SUBTASKS`.
        length: nominal; some sizes depend on it.
        room: tokens that prompt and answer may take up, at most `length`.
        data: of :func:`read_data`, for subtasks that need a file.

    Raises:
        ConfigError: the length is too short.
    """
    with _seeded(seed):
        if subtask in NIAH:
            drawn = _niah(*NIAH[subtask], data, count, length, room, samples)
        elif subtask in QA:
            drawn = _qa(*data, count, room, samples)
        else:
            drawn = {"vt": _vt, "cwe": _cwe, "fwe": _fwe}[subtask](count, length, room, samples)
        found = list(drawn)
    if not found:
        remedy = f"too short for {subtask} with this tokenizer; give a longer one"
        raise ConfigError("task.lengths", length, remedy)
    return found


def more_questions(subtask: str, drawn: Drawn, count: int, seed: str) -> list[Drawn]:
    """`count` prompts on one text, each for another of its keys, the one asked for first.

    The question is the benchmark's for one key; of niah_multiquery no key is the first.

    Raises:
        ConfigError: there are fewer keys.
    """
    keys = {key: (kind, value) for kind, key, value in KEY.findall(drawn.text)}
    asked = [key for key, (_, value) in keys.items() if value in drawn.answers]
    rng = random.Random(seed)
    if subtask == "niah_multiquery":
        names = rng.sample(asked, min(count, len(asked)))
    else:
        others = [key for key in keys if key not in asked]
        names = asked[:1] + rng.sample(others, min(count - 1, len(others)))
    if len(names) < count:
        remedy = f"a text of {subtask} has {len(names)} keys to ask for; ask fewer questions"
        raise ConfigError("task.questions", count, remedy)
    context = drawn.text[: -len(drawn.question)]
    found = []
    for name in names:
        kind, value = keys[name]
        question = f"What is the special magic {kind} for {name} mentioned in the provided text?"
        prefix = f"The special magic {kind} for {name} mentioned in the provided text is"
        found.append(Drawn(context + question, question, prefix, (value,)))
    return found


def read_data(subtask: str, folder: str | None) -> Any:
    """What a subtask is made from: the essays' words, or questions and documents; None for none.

    Args:
        folder: of the files that the owners' scripts fetch; None for lm-eval's own sources.

    Raises:
        ConfigError: it is not there, or of another shape.
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
        raise ConfigError("task", "ruler", REMEDY) from error


def _lm_eval(name: str) -> ModuleType:
    return importlib.import_module(f"lm_eval.tasks.ruler.{name}")


def _niah_modules() -> dict[str, ModuleType]:
    """The needles' modules, imported without their downloads and without six million strings."""
    import wonderwords

    words = wonderwords.RandomWord()._categories
    none = SimpleNamespace(_categories=defaultdict(list))
    fresh = "lm_eval.tasks.ruler.prepare_niah" not in sys.modules
    # Only the process of rank 0 downloads punkt, and does so whether it is needed or not.
    with (
        patch.dict(os.environ, LOCAL_RANK="1"),
        patch("wonderwords.RandomWord", lambda: none),
    ):
        niah = _lm_eval("prepare_niah")
    if fresh:
        niah.WORDS = Pairs(words["adjectives"], words["nouns"])
    return {"niah": niah, "niah_tasks": _lm_eval("niah_utils")}


class Pairs(Sequence[str]):
    """All different ``adjective-noun`` in order, of which only those asked for are made."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        tails = sorted(set(nouns))
        groups: list[list[str]] = []
        for head in sorted({f"{one}-" for one in adjectives}):
            if groups and head.startswith(groups[-1][0]):
                groups[-1].append(head)
            else:
                groups.append([head])
        # What those of a group begin with, and how they go on: pairs of `old` and `old-fashioned`
        # interleave, others don't.
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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's own random states, which lm-eval draws from; put back afterwards."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def _largest(
    draw: Callable[[int], str],
    count: Count,
    room: int,
    size: int,
    step: int,
    most: float = math.inf,
    spread: float = 1.0,
) -> int:
    """The size that lm-eval's search ends with: the step before the first text beyond `room`.

    One that fills it to the token is passed over, too. A text is not counted while it must be
    shorter: if what came to the one counted last has at most twice its tokens a character.

    Args:
        spread: how far, as a factor, a text of words drawn anew may have more tokens than that.
    """
    tokens = characters = 0
    while True:
        text = draw(size)
        # tokens + 2 * (tokens / characters) * (characters that came to it), without rounding
        if spread * tokens * (2 * len(text) - characters) >= room * characters:
            tokens, characters = count(text), len(text)
            if tokens >= room:
                return size - step if tokens > room else size + step
        size += step
        if size > most:
            return int(most)


def _niah(
    kind: str,
    key: str,
    value: str,
    keys: int,
    values: int,
    asked: int,
    words: list[str] | None,
    count: Count,
    length: int,
    room: int,
    samples: int,
) -> Iterator[Drawn]:
    haystack = words if words is not None else modules().niah.get_haystack(kind)
    step = 500 if kind == "essay" else 25 if length >= 4096 else 5
    needles, room = keys * values, room - ANSWER["niah"]
    most = math.inf if words is None else len(words)

    def draw(size: int) -> tuple[str, list[str], str]:
        return modules().niah.generate_input_output(
            size,
            haystack,
            type_haystack=kind,
            num_needle_k=keys,
            type_needle_k=key,
            num_needle_v=values,
            type_needle_v=value,
            num_needle_q=asked,
            template=modules().niah_tasks.TEMPLATE,
        )

    def with_answer(size: int) -> str:
        text, answers, _ = draw(size)
        return text + " ".join(answers)

    spread = SPREAD if kind == "needle" else 1
    size = _largest(with_answer, count, room, max(step, needles), step, most + step, spread)
    size = max(min(size, most), needles)
    one = asked * values == 1
    for _ in range(samples):
        for used in range(size, 0, -step):
            text, answers, query = draw(used)
            if count(text) <= room:
                what, verb = (value[:-1], "is") if one else (value, "are")
                prefix = f"The special magic {what} for {query} mentioned in the provided text"
                yield _drawn(text, "What ", f"{prefix} {verb}", answers)
                break


def _vt(count: Count, length: int, room: int, samples: int) -> Iterator[Drawn]:
    vt = modules().vt
    room -= ANSWER["vt"]

    def draw(size: int, example: bool = False) -> tuple[str, list[str]]:
        return vt.generate_input_output(size, num_chains=1, num_hops=4, is_icl=example)

    def with_answer(size: int, example: bool = False) -> str:
        text, names = draw(size, example)
        return f"{text} {names}"

    # A worked example, of at most 500 tokens, stands before every prompt, each time with new names.
    limit = 500 - ANSWER["vt"]
    size = _largest(lambda n: with_answer(n, True), count, limit, 5, 5)
    for used in range(size, 0, -5):
        text, names = draw(used, True)
        if count(text) <= limit:
            break
    else:
        return
    example = f"{text} {' '.join(names)}\n\n"
    room -= count(example)
    size = _largest(with_answer, count, room, 10, 10)
    for _ in range(samples):
        for used in range(size, 0, -10):
            text, names = draw(used)
            if count(text) <= room:
                start = text.rfind(" Answer: According to the chain(s)")
                text, prefix = f"{vt.randomize_icl(example)}\n\n{text[:start]}", text[start:]
                yield _drawn(text, "Question: ", prefix.strip(), names)
                break


def _cwe(count: Count, length: int, room: int, samples: int) -> Iterator[Drawn]:
    cwe = modules().cwe
    room -= ANSWER["cwe"]
    # The module shuffles by a generator of its own: to what it is when it has been imported.
    fresh = random.Random(42)
    fresh.shuffle(list(cwe.WORDS))
    cwe.RNG.setstate(fresh.getstate())

    def draw(size: int) -> tuple[str, str, list[str]]:
        return cwe.generate_input_output(size, length)

    def with_answer(size: int) -> str:
        example, text, words = draw(size)
        return f"{example}\n{text} " + " ".join(f"{i}. {w}" for i, w in enumerate(words, start=1))

    size = _largest(with_answer, count, room, 10, 10, len(cwe.WORDS), SPREAD)
    prefix = cwe.CONFIG["answer_prefix"]
    for _ in range(samples):
        for used in range(size, 0, -10):
            example, text, words = draw(used)
            text = f"{example}\n{text}"
            if count(text) <= room:
                text = text[: text.rfind(prefix)].strip()
                yield _drawn(text, "Question: ", prefix.strip(), words)
                break


def _fwe(count: Count, length: int, room: int, samples: int) -> Iterator[Drawn]:
    fwe = modules().fwe
    room -= ANSWER["fwe"]
    shape = {"vocab_size": room // 50, "incremental": room // 32}

    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=range(count(text)))

    if shape["vocab_size"] < 4 or count(fwe.TEMPLATE) > room:
        return
    _, _, size = fwe.generate_input_output(room, tokenizer, **shape)
    prefix = fwe.CONFIG["answer_prefix"]
    for _ in range(samples):
        text, words, _ = fwe.generate_input_output(room, tokenizer, num_words=size, **shape)
        text = text[: text.rfind(prefix)].strip()
        yield _drawn(text, "Question: ", prefix.strip(), words)


def _qa(
    qas: list[dict[str, Any]], documents: list[str], count: Count, room: int, samples: int
) -> Iterator[Drawn]:
    qa = modules().qa
    room -= ANSWER["qa"]

    def draw(index: int, size: int) -> tuple[str, list[str]]:
        # A copy, as it is shuffled in place where all documents are wanted.
        return qa.generate_input_output(index, size, qas=qas, docs=list(documents))

    def with_answer(size: int) -> str:
        text, answers = draw(0, size)
        return f"{text} {answers}"

    size = _largest(with_answer, count, room, 10, 10, len(documents), SPREAD)
    for index in range(min(samples, len(qas))):
        least = len(qas[index]["context"])  # the documents that answer
        for used in (*range(max(size, 1, least), least, -10), least):
            text, answers = draw(index, used)
            if count(text) <= room:
                yield _drawn(text, "Question: ", "Answer:", answers)
                break


def _drawn(text: str, marker: str, prefix: str, answers: Sequence[str]) -> Drawn:
    """`marker` begins the line that asks."""
    return Drawn(text, text[text.rindex(f"\n{marker}") + 1 :], prefix, tuple(answers))


@cache
def _essays(path: Path | None) -> list[str]:
    if path is None:
        rows = load_hub("baber/paul_graham_essays", None, "train", "task.data_dir")
        text = " ".join(row["text"] for row in rows)
    else:
        content = _read_json(path)
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
    content = _read_json(path)
    try:
        with patch.object(qa, "download_json", lambda url: content):
            questions, documents = read()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = f"is not the file that {subtask} is made from ({type(error).__name__}: {error})"
        raise ConfigError("task.data_dir", str(path), remedy) from error
    if not questions:
        raise ConfigError("task.data_dir", str(path), "holds no questions")
    return questions, documents


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError("task.data_dir", str(path), f"is not JSON ({error})") from error


def _require_punkt(subtask: str) -> None:
    """What splits the essays into sentences; fetched if it is not there."""
    import nltk

    modules()
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            raise ConfigError("task.subtasks", subtask, PUNKT) from error
