"""Texts that are read."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny
from torch.nn.functional import cross_entropy

from baselines import FullPolicy, LocalPolicy
from evals.run.read import read, reading_steps


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_every_token_but_the_last_is_fed_once() -> None:
    assert reading_steps(10, 3) == [3, 3, 3]
    assert reading_steps(12, 3) == [3, 3, 3, 2]
    assert reading_steps(4, 1) == [1, 1, 1]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_full_cache_reads_as_one_forward_pass(model, chunk: int) -> None:
    ids = prompt(60)
    measured, losses = read(model, ids[0].tolist(), FullPolicy(), chunk, {})
    logits = model(ids).logits[0]
    expected = cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(losses), expected, atol=1e-4, rtol=1e-4)
    assert measured.lengths[-1] == 59 and measured.prompt_tokens == 60


def test_reading_sees_only_what_the_cache_kept(model) -> None:
    """With a window of w and steps of one token, a token is predicted from w + 1 positions."""
    ids = prompt(40)[0].tolist()
    measured, losses = read(model, ids, LocalPolicy(window=5), 1, {})
    assert measured.lengths == [1, 2, 3, 4] + [5] * 35 and measured.evictions == 34
    other = [token + 1 if token < 90 else 5 for token in ids[:8]] + ids[8:]
    _, changed = read(model, other, LocalPolicy(window=5), 1, {})
    layers = model.config.num_hidden_layers  # what is gone lives on in later layers' entries
    assert losses[:8] != changed[:8]
    assert losses[7 + 6 * layers :] == pytest.approx(changed[7 + 6 * layers :], abs=1e-5)
