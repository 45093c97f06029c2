"""Texts that are read, and answers that are compared with the full cache's."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from baselines import FullPolicy, H2OPolicy, LocalPolicy, StreamingLLMPolicy
from buzz import EvictionCache
from evals.run.forked import answer_together
from evals.run.models import byte_tokenizer
from evals.run.prompt import Prompt
from evals.run.read import read, reading_steps
from evals.tasks.base import Sample


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


def compared(model, ids: list[int], answer: list[int], policy) -> dict:
    """A method on an answer, as a row beside the full cache."""
    prompts = [Prompt(Sample("0", "", ()), ids, 0, False, len(answer))]
    policies = [FullPolicy(), policy]
    made = answer_together(
        model, byte_tokenizer(), prompts, policies, {}, [None], [answer], own=False, kl=True
    )
    return made[0][1]


def test_comparison_with_full_equals_two_plain_loops(model) -> None:
    policy = StreamingLLMPolicy(sink=2, window=10)
    for tokens, new in ((30, 45), (22, 9)):
        ids, answer = (prompt(n, seed=n)[0].tolist() for n in (tokens, new))
        found = compared(model, ids, answer, policy)
        distributions = []
        for method in (FullPolicy(), policy):
            cache = EvictionCache(model, method)
            model(torch.tensor([ids]), past_key_values=cache)
            logits = [
                model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                for token in answer[:-1]
            ]
            distributions.append(log_softmax(torch.stack(logits), dim=-1))
        full, own = distributions
        kl = kl_div(own, full, reduction="batchmean", log_target=True).item()
        same = (full.argmax(-1) == own.argmax(-1)).float().mean().item()
        assert found["kl_to_full"] == pytest.approx(kl, rel=1e-3) and kl > 0.01
        assert found["top1_to_full"] == pytest.approx(same)


def test_a_method_that_evicts_nothing_is_the_full_cache(model) -> None:
    ids, answer = prompt(20)[0].tolist(), prompt(40, seed=1)[0].tolist()
    found = compared(model, ids, answer, H2OPolicy(heavy=50, recent=50))
    assert found["kl_to_full"] == pytest.approx(0, abs=1e-5) and found["top1_to_full"] == 1


def test_an_answer_of_one_token_has_nothing_to_compare(model) -> None:
    found = compared(model, prompt(20)[0].tolist(), [5], LocalPolicy(window=4))
    assert found["kl_to_full"] is None and found["top1_to_full"] is None
