"""RULER's generators (arXiv 2404.06654), by way of lm-eval's copy of the owners' code.

Texts of a given size are drawn by lm-eval's code. The size for a length in tokens is searched here,
by the same steps as there, since every try draws from the random state. Two things differ: a text
that is certainly short enough is not tokenized, and a length that is too short is an error (the
owners' loops never end).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np

from buzz.errors import ConfigError
from evals.tasks.ruler_data import NIAH, QA, modules

# The benchmark's answer lengths in tokens.
ANSWER = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}

# Subtasks whose texts have several keys with one value each.
ASKABLE = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery")
# An assignment of vt's chain, and a sentence of its filler.
ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (?:\d{5}|VAR [A-Z]{5} ) ")
SENTENCE = re.compile(r"[^.]+\.\s*")
KEY = re.compile(r"special magic (number|uuid)s? for (\S+) is: ([\w-]+)")

SPREAD = 1.1  # see _largest()

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class Drawn:
    """One prompt.

    Attributes:
        text: the prompt without the beginning of the answer.
        question: the end of `text`, the line that asks.
        prefix: the beginning of the answer.
        answers: what the answer must contain.
    """

    text: str
    question: str
    prefix: str
    answers: tuple[str, ...]


def generate(
    subtask: str, count: Count, length: int, room: int, samples: int, seed: int, data: Any = None
) -> list[Drawn]:
    """Prompts that leave space for the answer; the first n are the same for every `samples`.

    They are lm-eval's if `random` and `numpy.random` are given the seed before the same subtask and
    length, with two exceptions, both as in the owners' code. `cwe` has a worked example before the
    list, which counts; lm-eval leaves it out. `fwe` has room for the answer within the length (in
    the owners' code since June 2025): its prompts are lm-eval's of a length shorter by the answer.

    Args:
        subtask: one of :data:`SUBTASKS`.
        length: in tokens; some sizes depend on it.
        room: tokens that prompt and answer may take together, at most `length`.
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
    """`count` prompts on one text, each asking for another of its keys as the benchmark does.

    The first asks for the key that the drawn prompt asks for. niah_multiquery asks for several; its
    prompts ask for these in random order.

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


def move_chain(drawn: Drawn, spread: str) -> Drawn:
    """A prompt of vt with the assignments of its chain, but the first, moved; the rest is the same.

    The prompt may be a few tokens longer or shorter, as tokens depend on neighbouring text.

    Args:
        spread: one of :data:`SPREADS`, see :class:`evals.tasks.ruler.Ruler`.
    """
    # The worked example before the text has shorter names.
    chain = [*ASSIGNMENT.finditer(drawn.text)]
    begin, end = chain[0].start(), len(drawn.text) - len(drawn.question)
    sentences = SENTENCE.findall(ASSIGNMENT.sub("", drawn.text[begin:end]))
    apart = {"cell": 0.0, "neighbours": 1.0, "prompt": len(sentences) / len(chain)}[spread]
    # From the last to the first, so that no insertion moves another place.
    for number, assignment in reversed([*enumerate(chain)]):
        sentences.insert(round(apart * number), assignment.group())
    return replace(drawn, text=drawn.text[:begin] + "".join(sentences) + drawn.question)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds Python's and numpy's random states, from which lm-eval draws, and restores them."""
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
    """The size at which lm-eval's search ends: the step before the first text longer than `room`.

    A text of exactly `room` tokens is passed, too. Texts that must be shorter are not tokenized: it
    is assumed that what was added to the last tokenized text has at most twice as many tokens per
    character.

    Args:
        spread: factor for texts whose words are drawn anew, and may have more tokens than that.
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


def _first(
    draw: Callable[[int], Any], sizes: Iterable[int], count: Count, room: int
) -> Iterator[Any]:
    """Of the draws in these sizes the first whose text (its first item) fits."""
    fitting = (drawn for drawn in map(draw, sizes) if count(drawn[0]) <= room)
    return islice(fitting, 1)


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
        for text, answers, query in _first(draw, range(size, 0, -step), count, room):
            what, verb = (value[:-1], "is") if one else (value, "are")
            prefix = f"The special magic {what} for {query} mentioned in the provided text"
            yield _drawn(text, "What ", f"{prefix} {verb}", answers)


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
    for text, names in _first(lambda n: draw(n, True), range(size, 0, -5), count, limit):
        example = f"{text} {' '.join(names)}\n\n"
        room -= count(example)
        size = _largest(with_answer, count, room, 10, 10)
        for _ in range(samples):
            for text, names in _first(draw, range(size, 0, -10), count, room):
                start = text.rfind(" Answer: According to the chain(s)")
                text, prefix = f"{vt.randomize_icl(example)}\n\n{text[:start]}", text[start:]
                yield _drawn(text, "Question: ", prefix.strip(), names)


def _cwe(count: Count, length: int, room: int, samples: int) -> Iterator[Drawn]:
    cwe = modules().cwe
    room -= ANSWER["cwe"]
    # The module has its own random generator: set it to its state after the import.
    fresh = random.Random(42)
    fresh.shuffle(list(cwe.WORDS))
    cwe.RNG.setstate(fresh.getstate())

    def draw(size: int) -> tuple[str, list[str]]:
        example, text, words = cwe.generate_input_output(size, length)
        return f"{example}\n{text}", words

    def with_answer(size: int) -> str:
        text, words = draw(size)
        return f"{text} " + " ".join(f"{i}. {w}" for i, w in enumerate(words, start=1))

    size = _largest(with_answer, count, room, 10, 10, len(cwe.WORDS), SPREAD)
    prefix = cwe.CONFIG["answer_prefix"]
    for _ in range(samples):
        for text, words in _first(draw, range(size, 0, -10), count, room):
            text = text[: text.rfind(prefix)].strip()
            yield _drawn(text, "Question: ", prefix.strip(), words)


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
        # A copy, as the list is shuffled in place if all documents are used.
        return qa.generate_input_output(index, size, qas=qas, docs=list(documents))

    def with_answer(size: int) -> str:
        text, answers = draw(0, size)
        return f"{text} {answers}"

    size = _largest(with_answer, count, room, 10, 10, len(documents), SPREAD)
    for index in range(min(samples, len(qas))):
        least = len(qas[index]["context"])  # the documents that answer
        sizes = (*range(max(size, 1, least), least, -10), least)
        for text, answers in _first(partial(draw, index), sizes, count, room):
            yield _drawn(text, "Question: ", "Answer:", answers)


def _drawn(text: str, marker: str, prefix: str, answers: Sequence[str]) -> Drawn:
    """A prompt; `marker` is the beginning of the line that asks."""
    return Drawn(text, text[text.rindex(f"\n{marker}") + 1 :], prefix, tuple(answers))
