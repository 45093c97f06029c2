"""Texts that are read with one cache, whole or line by line."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny
from torch.nn.functional import cross_entropy

from baselines import FullPolicy, LocalPolicy
from evals.run.plan import reading_steps
from evals.run.read import fed_and_scored, read


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_every_token_but_the_last_is_fed_once() -> None:
    assert reading_steps(10, 3) == [3, 3, 3]
    assert reading_steps(12, 3) == [3, 3, 3, 2]
    assert reading_steps(4, 1) == [1, 1, 1]


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("starts", [(0,), (0, 1, 12, 13, 30)], ids=["whole", "lines"])
def test_the_full_cache_reads_as_one_forward_pass(model, chunk: int, starts) -> None:
    """A token's loss is that of the step that feeds the token before it, in lines too."""
    ids = prompt(60)[0].tolist()
    fed, scored = fed_and_scored(ids, starts)
    lines = [(1, 12), (13, 30), (30, 60)] if len(starts) > 1 else [(0, 60)]
    assert fed == [token for start, end in lines for token in ids[start : end - 1]]
    assert scored == [token for start, end in lines for token in ids[start + 1 : end]]
    measured, losses = read(model, ids, FullPolicy(), chunk, {}, starts)
    logits = model(torch.tensor([fed])).logits[0]
    expected = cross_entropy(logits, torch.tensor(scored), reduction="none")
    torch.testing.assert_close(torch.tensor(losses), expected, atol=1e-4, rtol=1e-4)
    assert measured.lengths[-1] == len(fed) and measured.prompt_tokens == 60
    evicting, _ = read(model, ids, LocalPolicy(window=9), 1, {}, starts)
    assert evicting.lengths == [*range(1, 9), *[9] * (len(fed) - 8)]  # one cache throughout


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
