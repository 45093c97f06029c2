"""A cache with a conversation in it goes on with that one, and answers no other prompt from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from methods import METHODS, core_methods
from tiny import prompt, tiny
from torch import Tensor

from baselines import KVzipPolicy
from buzz import ConfigError, EvictionCache, ForkedCache, Policy

H2O = METHODS["h2o"]


@pytest.fixture(scope="module")
def model():
    return tiny()


def talk(model, cache: EvictionCache, rows: int = 1, **options) -> Tensor:
    """A prompt of 40 tokens, whose first row has 3 of padding, and its answer of 6."""
    ids, mask = prompt(40, rows), torch.ones(rows, 40, dtype=torch.int64)
    if rows > 1:
        ids[0, :3] = mask[0, :3] = 0
    options = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 6} | options
    return model.generate(ids, **options)


def behind(said: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """A conversation's next prompt, and its mask."""
    ids = torch.cat([said, prompt(new, len(said), seed=5)], 1)
    return ids, (ids != 0).long()


@core_methods
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("slot", [3, 20, 39, 40, 44])
def test_another_prompt_is_refused(model, policy: Policy, rows: int, slot: int) -> None:
    """Whichever token is another: of the prompt, of the answer, in any row."""
    cache = EvictionCache(model, policy)
    said = talk(model, cache, rows)
    ids, mask = behind(said, 4)
    wrong = ids.clone()
    wrong[-1, slot] = 3 + (wrong[-1, slot] - 2) % 90
    told = f"does not continue the conversation of 45 tokens.*from token {slot} on"
    with pytest.raises(ConfigError, match=told):
        model.generate(wrong, attention_mask=mask, past_key_values=cache)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("tokens", [1, 20, 39, 44, 45])
@pytest.mark.parametrize("same", [True, False])
def test_so_is_one_that_is_no_longer(model, tokens: int, same: bool) -> None:
    cache = EvictionCache(model, H2O)
    said = talk(model, cache)
    ids = said[:, :tokens] if same else prompt(tokens, seed=9)
    with pytest.raises(ConfigError, match="does not continue the conversation.*reset"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    cache.reset()
    fresh = model.generate(ids, past_key_values=EvictionCache(model, H2O), max_new_tokens=9)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=9), fresh)


@pytest.mark.parametrize("rows", [1, 2])
def test_ways_to_go_on(model, rows: int) -> None:
    """All that was said; new tokens alone; a prompt that was read by hand, in chunks, in a copy."""
    answers = []
    for way in range(6):
        cache = EvictionCache(model, H2O)
        if way == 3:  # by hand, every step from the same buffer
            said = talk(model, EvictionCache(model, H2O), rows)
            mask, buffer = (said != 0).long(), torch.empty(rows, 1, dtype=torch.int64)
            at = (mask.cumsum(1) - 1).clamp(min=0)
            for end in range(40, 46):
                step = said[:, :40] if end == 40 else buffer.copy_(said[:, end - 1 : end])
                given = {"attention_mask": mask[:, :end], "past_key_values": cache}
                model(step, position_ids=at[:, end - step.shape[1] : end], **given)
        else:
            said = talk(model, cache, rows, **({"prefill_chunk_size": 16} if way == 4 else {}))
        ids, mask = behind(said, 4)
        kwargs = {"prefill_chunk_size": 3} if way == 5 else {}
        cache = cache.copy() if way == 2 else cache
        answer = model.generate(
            input_ids=ids[:, 45:] if way == 1 else ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=5,
            **kwargs,
        )
        if way < 4:
            answers.append(answer[:, -5:])
        if way >= 4:  # and still knows what it was told
            ids[-1, 30] += 1
            with pytest.raises(ConfigError, match="does not continue the conversation"):
                model.generate(torch.cat([ids, answer[:, -5:], ids], 1), past_key_values=cache)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_rows_that_change_places_are_told_apart(model) -> None:
    """Beams, several answers to one prompt, rows that were selected or repeated."""
    cache = EvictionCache(model, H2O)
    said = talk(model, cache, 3)
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    ids, mask = behind(said, 4)
    with pytest.raises(ConfigError, match="does not continue the conversation"):
        model.generate(ids[[2, 2, 0, 0]], past_key_values=cache)
    order = [0, 0, 2, 2]
    model.generate(ids[order], attention_mask=mask[order], past_key_values=cache, max_new_tokens=2)

    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    cache = EvictionCache(model, H2O)
    model(prompt(40), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    more, _ = behind(prompt(40), 3)
    with pytest.raises(ConfigError, match="does not continue the conversation"):
        model.generate(more.flip(1), past_key_values=cache, max_new_tokens=4, **options)
    model.generate(more, past_key_values=cache, max_new_tokens=4, **options)


def test_forks_are_not_for_generate(model) -> None:
    """They say what they want, and not that an attribute is missing."""
    cache = ForkedCache(model, [H2O, METHODS["buzz"]])
    with pytest.raises((ConfigError, RuntimeError), match="rows|mask"):
        model.generate(prompt(20), past_key_values=cache, max_new_tokens=3)


def test_what_is_not_known_is_not_compared(model) -> None:
    """Embeddings; and padding, which may be any token."""
    cache, ids = EvictionCache(model, H2O), prompt(30)
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    model(prompt(5, seed=1), past_key_values=cache)
    told = torch.cat([ids.flip(1), prompt(5, seed=1), prompt(3, seed=2)], 1)
    model.generate(told, past_key_values=cache, max_new_tokens=2)
    told[0, 31] += 1
    with pytest.raises(ConfigError, match="does not continue the conversation.*from token 31 on"):
        model.generate(torch.cat([told, told], 1), past_key_values=cache, max_new_tokens=2)

    cache = EvictionCache(model, H2O)
    ids, mask = behind(talk(model, cache, 2), 4)
    ids[0, 0] = 7
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


def test_a_long_conversation_is_remembered(model) -> None:
    """In one buffer, whatever the steps; a copy's is its own."""
    cache, ids = EvictionCache(model, METHODS["streaming_llm"]), prompt(300)
    for number, one in enumerate(ids.split(1, 1)):
        with torch.inference_mode(number % 2 == 0):
            model(one, past_key_values=cache)
    twin = cache.copy()
    model(ids[:, :9], past_key_values=twin)
    for slot in (0, 150, 299):
        other = torch.cat([ids, ids], 1)
        other[0, slot] += 1
        for one in (cache, twin):
            with pytest.raises(ConfigError, match=f"from token {slot} on"):
                model.generate(other, past_key_values=one)
    model.generate(torch.cat([ids, ids], 1), past_key_values=cache, max_new_tokens=2)


def test_models_are_copied_and_stored_as_before(model) -> None:
    """What stands before `generate` goes to a copy's own; other caches pass through it."""
    ids = prompt(20)
    own = tiny()
    plain = own.generate(ids, max_new_tokens=5)
    EvictionCache(own, H2O)
    EvictionCache(own, H2O)
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        twin.get_input_embeddings().weight.data.zero_()
        assert not torch.equal(twin.generate(ids, max_new_tokens=5), plain)
        assert torch.equal(own.generate(ids, max_new_tokens=5), plain)
    assert not hasattr(own.generate.__wrapped__, "check")  # once, for all caches


def test_a_generate_of_somebody_else_still_runs() -> None:
    own = tiny()
    own.generate = lambda inputs=None, **kwargs: sorted(kwargs)
    cache = EvictionCache(own, H2O)
    assert own.generate(prompt(5), past_key_values=cache, top_k=1) == ["past_key_values", "top_k"]


@pytest.mark.parametrize("by", ["batch_select_indices", "reorder_cache"])
def test_a_prompt_that_is_to_be_read_twice_follows_its_rows(by: str) -> None:
    """Rows that change places between its chunks: each is judged by what it was told."""
    model, policy = tiny(), KVzipPolicy(capacity=12, chunk=16)
    first, second = prompt(60, 2).split(30, 1)
    cache, alone = (EvictionCache(model, policy, hold_until=60) for _ in range(2))
    with torch.no_grad():
        model(first, past_key_values=cache)
        getattr(cache, by)(torch.tensor([1, 0]))
        model(second, past_key_values=cache)
        model(first.flip(0), past_key_values=alone)
        model(second, past_key_values=alone)
    assert torch.equal(cache.kept_positions(1), alone.kept_positions(1))
