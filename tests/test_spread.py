"""The same digits in one cell, in neighbouring cells, over the prompt; and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny

from baselines import StreamingLLMPolicy
from buzz import BuzzStridedPolicy, ConfigError, EvictionCache
from evals.run.models import byte_tokenizer
from evals.tasks.needle import SPREADS, Needle
from scripts import spread as script

TOKENIZER = byte_tokenizer()


def needle(spread: str | None) -> Needle:
    return Needle(name="needle", spread=spread, lengths=[2000], depths=[20], repeats=1)


@pytest.mark.parametrize("spread", SPREADS)
def test_digits_stand_where_they_are_said_to(spread: str) -> None:
    (sample,) = needle(spread).load(TOKENIZER)
    (key,) = sample.references
    places = script.digit_tokens(sample.prompt, TOKENIZER, spread)
    assert "".join(sample.prompt[place] for place in places) == key
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    sentence = len("The second digit of the pass key is 7. ")
    if spread == "cell":
        assert gaps == [1] * 4
    elif spread == "neighbours":
        assert max(gaps) <= sentence
    else:
        assert min(gaps) > 3 * sentence
    begin = sample.prompt.index("\n\n")
    assert 0.1 < (places[0] - begin) / len(sample.prompt) < 0.35
    assert len(sample.prompt) <= 2000


def test_the_passkey_of_before_is_what_it_was() -> None:
    (sample,) = needle(None).load(TOKENIZER)
    assert sample.prompt.count(sample.references[0]) == 2


def test_spread_is_of_a_single_passkey() -> None:
    task = Needle(name="needle", spread="cell", variant="multikey")
    with pytest.raises(ConfigError, match=r"task.spread='cell'"):
        task.check()


def test_of_five_digits_in_one_cell_one_is_kept() -> None:
    model, ids = tiny(), prompt(80)
    cache = EvictionCache(model, BuzzStridedPolicy(sink=2, window=10, stride=5, threshold=24))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert script.kept(cache, range(20, 25)) == (1.0, 0.0)
    cache = EvictionCache(model, StreamingLLMPolicy(sink=2, window=10))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert script.kept(cache, range(70, 75)) == (5.0, 1.0)
    assert script.kept(cache, range(68, 73)) == (3.0, 0.0)
