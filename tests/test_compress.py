"""Contexts that are compressed before their question is read: the split, the cache, the records."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from runs import MODEL, NEEDLE, full_of, read
from tiny import prompt, tiny
from transformers import DynamicCache

from baselines import FullPolicy
from buzz import ConfigError, EvictionCache
from evals.results.folder import sha256
from evals.run.generate import generate
from evals.run.models import byte_tokenizer, load_tokenizer, named_config
from evals.run.prompts import Prompt, batches, steps_before
from evals.tasks.base import Sample
from evals.tasks.encoding import encode_prompt

KINDS = ("streaming_llm", "h2o", "snapkv", "buzz")
CONTEXT = "The pass key is 12345.  Some people know it.\n\nIt is the last word that counts"
QUESTION = "What is the pass key?"
TOKENIZER = byte_tokenizer()
TOKENIZER.eos_token = None  # an answer has the length that is asked for


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(named_config("smollm2"))


@pytest.mark.parametrize("glue", [" ", "\n\n", "\n", ": "])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prefix", ["", f"The answer to {QUESTION} is"])
def test_a_context_is_the_tokens_before_its_question(
    smollm2, glue: str, chat: bool, prefix: str
) -> None:
    text = f"{QUESTION} {CONTEXT}{glue}{QUESTION}"
    encoded = encode_prompt(smollm2, text, chat, 10_000, prefix)
    count = encoded.tokens_before(QUESTION, smollm2)
    before, asked = smollm2.decode(encoded.ids[:count]), smollm2.decode(encoded.ids[count:])
    assert before + asked == encoded.text
    assert before.endswith("that counts") or before.endswith(("that counts" + glue).rstrip(" "))
    assert asked.lstrip().lstrip(":").lstrip().startswith(QUESTION)
    other = text[: -len(QUESTION)] + "Who sings?"
    # Nothing that was asked has a part in it.
    assert encode_prompt(smollm2, other, chat, 10_000).ids[:count] == encoded.ids[:count]


def test_a_question_is_found_in_a_prompt_that_lost_its_middle(smollm2) -> None:
    text = f"{CONTEXT * 20}\n\n{QUESTION}"
    encoded = encode_prompt(smollm2, text, True, 100)
    count = encoded.tokens_before(QUESTION, smollm2)
    assert encoded.truncated and smollm2.decode(encoded.ids[count:]).strip().startswith(QUESTION)
    assert (
        encode_prompt(smollm2, QUESTION * 40, True, 60).tokens_before(QUESTION * 40, smollm2) == 0
    )


def test_a_prompt_without_question_is_refused() -> None:
    encoded = encode_prompt(TOKENIZER, "A text", False, 99)
    for question, why in (("", "no question"), ("x", "no context"), ("A text", "no context")):
        sample = Sample("7", "A text", (), question=question)
        with pytest.raises(ConfigError, match=f"compress='context'.*sample 7.*{why}"):
            steps_before("context", 4, sample, encoded, TOKENIZER)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("later", [(9,), (16, 5, 9)])
def test_generate_is_a_plain_loop(model, method: str, later: tuple[int, ...]) -> None:
    """The context through the cache, then the question, then the answer token by token."""
    ids, policy = prompt(70), METHODS[method]
    cache = EvictionCache(model, policy)
    held, start = [], 0
    for new in (70 - sum(later), *later):
        logits = model(ids[:, start : start + new], past_key_values=cache).logits[0, -1]
        held.append(cache.lengths[0])
        start += new
    answer = []
    for _ in range(6):
        answer.append(int(logits.argmax()))
        logits = model(torch.tensor([[answer[-1]]]), past_key_values=cache).logits[0, -1]
    (found,) = generate(model, TOKENIZER, ids.tolist(), policy, 6, (), {}, later)
    assert found.tokens == answer and found.lengths[:2] == held[-2:]
    assert 0 < found.question_s < found.ttft_s
    assert found.memory_peak_nbytes >= found.context_peak_nbytes > 0
    (whole,) = generate(model, TOKENIZER, ids.tolist(), policy, 6)
    assert whole.tokens != found.tokens and whole.question_s is None


def test_nothing_evicted_is_the_stock_answer(model) -> None:
    ids = prompt(70)
    expected = model.generate(
        ids, past_key_values=DynamicCache(), max_new_tokens=8, do_sample=False
    )
    (found,) = generate(model, TOKENIZER, ids.tolist(), FullPolicy(), 8, (), {}, (20, 9))
    assert found.tokens == expected[0, 70:].tolist()


@pytest.mark.parametrize("method", KINDS)
def test_rows_of_a_batch_are_what_they_are_alone(model, method: str) -> None:
    prompts = [prompt(tokens, seed=tokens)[0].tolist() for tokens in (70, 51, 60)]
    arguments = METHODS[method], 7, (), {}, (9,)
    together = generate(model, TOKENIZER, prompts, *arguments)
    for ids, row in zip(prompts, together, strict=True):
        (alone,) = generate(model, TOKENIZER, [ids], *arguments)
        assert (alone.tokens, alone.lengths) == (row.tokens, row.lengths)


def test_a_batch_has_questions_of_one_length() -> None:
    def made(tokens: int, *before: int) -> Prompt:
        return Prompt(Sample(f"{tokens}", "", ()), [1] * tokens, 0, False, 5, before=before)

    short, long, other = made(30, 20), made(50, 40), made(32, 20)
    found = list(batches([long, other, short], 4))
    assert found == [[short, long], [other]]
    assert [one.context for one in (short, made(30))] == [20, 30]
    # Chunks of a stream are as long as each other, too.
    assert len(list(batches([made(30, 10, 10), made(40, 10, 10, 10)], 4))) == 2
    assert len(list(batches([made(30), made(40)], 4))) == 1


def test_runs_are_of_their_own_setting(go) -> None:
    method = "method=streaming_llm"
    whole = go(method, "budget=0.25")
    context = go(method, "budget=0.25", "compress=context", "kl=true")
    stream = go(method, "budget=0.25", "compress=stream", "compress_chunk=100")
    assert len({whole, context, stream}) == 3
    assert len({file.parent for file in (whole, context, stream)}) == 3
    answers = {record["id"]: record["tokens"] for record in read(full_of(context))}
    for record in read(context):
        assert record["reference_sha256"] == sha256(answers[record["id"]])
    for record in read(context) + read(stream):
        assert record["budget_entries"] == round(0.25 * record["context_tokens"])
        assert 0 < record["question_s"] < record["ttft_s"]
        assert record["prompt_tokens"] - record["context_tokens"] < 100
    assert "context_tokens" not in read(whole)[0] and "question_s" not in read(whole)[0]


def test_what_asks_for_nothing_new_changes_no_folder(go) -> None:
    """A folder's name is of what differs from the defaults."""
    method = "method=local"
    assert go(method) == go(method, "compress=prompt") == go(method, "compress_chunk=512")
    assert go(method) != go(method, "compress=context")


def test_a_sweep_over_streams_goes_on_without_methods_that_evict_once(main, capsys) -> None:
    """All chunks but its first would stay, whatever the budget."""
    stream = "budget=0.25", "compress=stream", "compress_chunk=100"
    assert main("-m", *MODEL, *NEEDLE, "method=h2o,snapkv", *stream) == 0
    said = capsys.readouterr().out
    assert "SKIPPED method=snapkv" in said and "1 complete, 1 skipped" in said
    (file,) = main.runs.glob("*/h2o*.jsonl")
    assert all(record["kv_entries_peak"] <= record["budget_entries"] for record in read(file))
