"""Several questions on one context: the tasks that ask them, and the two ways of answering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import METHODS
from runs import read, shown, write_lines
from tiny import prompt, tiny

from buzz import ConfigError, EvictionCache
from evals.run.generate import answer_questions, generate
from evals.run.models import byte_tokenizer, load_tokenizer, named_config
from evals.run.prompts import Prompt, batches, follow_up, share_contexts
from evals.tasks.base import Sample
from evals.tasks.needle import Needle
from evals.tasks.nq10 import NQ10
from evals.tasks.ruler import Ruler

TOKENIZER = byte_tokenizer()
TOKENIZER.eos_token = None
MULTIKEY = ["task.variant=multikey", "task.needles=3", "task.questions=3"]
SHORT = ["task.lengths=[700]", "task.depths=[0,50]", "task.repeats=1", "task.max_new_tokens=4"]


@pytest.fixture(scope="module")
def model():
    return tiny()


def asked(context: int, *questions: int) -> list[Prompt]:
    """Random questions of so many tokens on one random context."""
    begin = prompt(context)[0].tolist()
    return [
        Prompt(
            Sample(f"{i}", "", (), shared="c"),
            begin + prompt(tokens, seed=i)[0].tolist(),
            0,
            False,
            5,
            before=(context,),
            turn=tuple(prompt(6, seed=i + 50)[0].tolist()),
        )
        for i, tokens in enumerate(questions, start=1)
    ]


@pytest.mark.parametrize("policy", ["h2o", "buzz"])
def test_copies_answer_as_if_each_question_were_the_only_one(model, policy: str) -> None:
    prompts = asked(60, 9, 5, 12)
    found = answer_questions(model, TOKENIZER, prompts, METHODS[policy], {}, conversation=False)
    for one, own in zip(prompts, found, strict=True):
        arguments = METHODS[policy], 5, (), {}, one.later
        (alone,) = generate(model, TOKENIZER, [one.ids], *arguments)
        assert (own.tokens, own.lengths) == (alone.tokens, alone.lengths)
        assert 0 < own.question_s < own.ttft_s
    assert len({tuple(one.tokens) for one in found}) > 1


@pytest.mark.parametrize("policy", ["h2o", "buzz"])
def test_a_conversation_is_one_cache(model, policy: str) -> None:
    """By a plain loop: context, question, answer, what follows it, and so on."""
    prompts = asked(60, 9, 5)
    found = answer_questions(model, TOKENIZER, prompts, METHODS[policy], {}, conversation=True)
    cache = EvictionCache(model, METHODS[policy])

    def feed(ids: list[int]) -> int:
        return int(model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].argmax())

    first, second = prompts
    feed(first.ids[:60])
    token, answers = feed(first.ids[60:]), []
    for own in (first, second):
        said = [token]
        while len(said) < 5:
            said.append(feed(said[-1:]))
        answers.append(said)
        token = feed([said[-1], *second.turn]) if own is first else token
    assert [one.tokens for one in found] == answers
    assert found[1].prompt_tokens == len(first.ids) + 5 + len(second.turn)
    assert found[1].ttft_s == found[1].question_s


def test_the_end_of_an_answer_is_fed_once() -> None:
    """A template ends an answer itself, also one that was cut short."""
    tokenizer = load_tokenizer(named_config("smollm2"))
    sample = Sample("1", "x", (), question="\n\nWho?", answer_prefix="It is")
    turn = tokenizer.decode(follow_up(tokenizer, sample, True))
    assert turn.startswith(tokenizer.eos_token) and turn.count("Who?") == 1
    assert turn.endswith("It is") and "@" not in turn
    assert TOKENIZER.decode(follow_up(TOKENIZER, sample, False)) == "\n\nWho? It is"


def test_questions_on_one_context_are_read_alike() -> None:
    """The shortest of their contexts is everybody's: tokens at the end may merge with one's."""
    one, two = asked(60, 9, 5)
    longer = Prompt(two.sample, two.ids, 0, False, 5, before=(62,))
    found = share_contexts([one, longer], "context", 9, TOKENIZER)
    assert [prompt.before for prompt in found] == [(60,), (60,)]
    found = share_contexts([one, longer], "stream", 25, TOKENIZER)
    assert [prompt.before for prompt in found] == [(25, 25, 10)] * 2
    assert list(batches(found, 1)) == [found]
    with pytest.raises(ConfigError, match="different contexts"):
        other = Prompt(two.sample, [1, *two.ids], 0, False, 5, before=(61,))
        share_contexts([one, other], "context", 9, TOKENIZER)
    with pytest.raises(ConfigError, match="compress='prompt'"):
        share_contexts([one, two], "prompt", 9, TOKENIZER)
    with pytest.raises(ConfigError, match="too short"):
        share_contexts([one, two], "context", 9, TOKENIZER, limit=80)


def test_shards_hold_whole_contexts() -> None:
    task = Needle(name="needle", variant="multikey", questions=2, repeats=1, shard="1/2")
    samples = task.load(TOKENIZER)
    assert [one.shared for one in task.of_shard(samples)] == [
        name for name in ("1024-25-0", "1024-75-0") for _ in range(2)
    ]


def test_needles_are_asked_for_one_by_one() -> None:
    task = Needle(name="needle", variant="multikey", needles=3, questions=3, depths=[50], repeats=1)
    task.check(), task.prepare()
    samples = task.load(TOKENIZER)
    (whole,) = Needle(name="needle", variant="multikey", needles=3, depths=[50], repeats=1).load(
        TOKENIZER
    )
    assert samples[0].prompt == whole.prompt and samples[0].references == whole.references
    contexts = {one.prompt.removesuffix(one.question) for one in samples}
    assert len(contexts) == 1 and len({one.references for one in samples}) == 3
    (context,) = contexts
    for one in samples:
        town = one.question.split("pass key of ")[1].split("?")[0]
        assert f"A pass key of {town} is {one.references[0]}." in context


@pytest.mark.parametrize("subtask", ["niah_multikey_2", "niah_multikey_3"])
def test_ruler_asks_for_other_keys_in_its_own_words(subtask: str) -> None:
    smollm2 = load_tokenizer(named_config("smollm2"))
    options = {"name": "ruler", "subtasks": [subtask], "lengths": [1024], "samples": 1}
    one, several = Ruler(**options), Ruler(**options, questions=3)
    one.prepare(), several.prepare()
    (whole,), samples = one.load(smollm2), several.load(smollm2)
    first = samples[0]
    assert (first.prompt, first.answer_prefix) == (whole.prompt, whole.answer_prefix)
    assert (first.question, first.references) == (whole.question, whole.references)
    contexts = {one.prompt.removesuffix(one.question) for one in samples}
    assert len(contexts) == 1 and len({one.references for one in samples}) == 3
    for one in samples:
        key = one.question.split(" for ")[1].split(" ")[0]
        assert f"for {key} is: {one.references[0]}." in one.prompt


def test_nq10_shares_the_documents_that_answer(tmp_path) -> None:
    def row(number: int) -> dict[str, Any]:
        texts = [{"title": f"{number}{i}", "text": f"of {number} and {i}"} for i in range(5)]
        return {
            "question": f"q{number}?",
            "answers": [f"a{number}"],
            "ctxs": texts,
            "gold_index": 2,
        }

    write_lines(tmp_path / "nq", [row(number) for number in range(5)])
    task = NQ10(name="nq10", data_file=str(tmp_path / "nq"), questions=2)
    task.prepare()
    samples = task.load(TOKENIZER)
    assert [one.shared for one in samples] == ["0", "0", "1", "1"]
    for one, number in zip(samples, range(4), strict=True):
        assert one.question.strip() == f"Question: q{number}?\nAnswer:"
        assert one.references == (f"a{number}",)
        lines = one.prompt.splitlines()
        documents = [line for line in lines if line.startswith("Document [")]
        assert len(documents) == 5
        assert f"of {number} and 2" in documents[one.meta["gold_at"]]
    task = NQ10(name="nq10", data_file=str(tmp_path / "nq"), questions=6)
    with pytest.raises(ConfigError, match=r"task.questions=6"):
        task.prepare()


def test_scores_by_question_number(go) -> None:
    options = [*SHORT, *MULTIKEY, "compress=context", "method=h2o", "budget=0.2"]
    file = go(*options)
    records = read(file)
    assert [record["meta"]["question"] for record in records] == [1, 2, 3] * 2
    assert "needle by question" in shown(file)
    # What is missing is asked again with its context, and nothing else is recorded twice.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:]))
    assert go(*options) == file
    assert [record["id"] for record in read(file)][-1] == records[2]["id"]
    again = {record["id"]: record["prediction"] for record in read(file)}
    assert again == {record["id"]: record["prediction"] for record in records}
    conversation = go(*options, "task.asked=conversation")
    assert conversation != file and len(read(conversation)) == 6
