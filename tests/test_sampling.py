"""Sampled answers: the distribution, and that nothing but its seed decides one."""

from __future__ import annotations

import torch
from tiny import prompt, tiny

from baselines import H2OPolicy
from evals.run.generate import generate
from evals.run.models import byte_tokenizer
from evals.run.sampling import Sampling

POLICY = H2OPolicy(heavy=12, recent=12)


def drawn(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    scores = logits.expand(len(sampling.seeds), -1)
    for processor in sampling.processors(torch.device("cpu")):
        scores = processor(torch.zeros(len(scores), 1, dtype=torch.int64), scores)
    return scores.argmax(-1)


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits, seeds = torch.tensor([[2.0, 1.0, 0.0, -1.0, -float("inf")]]), range(4000)
    for temperature in (0.5, 1.5):
        found = drawn(Sampling(temperature, 1.0, seeds), logits)
        shares = found.bincount(minlength=5) / len(seeds)
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=0.03, rtol=0)
        assert shares[-1] == 0
    found = drawn(Sampling(1.0, 0.6, seeds), logits)  # the first has 0.64
    assert found.unique().tolist() == [0]


def test_an_answer_depends_on_its_own_seed_alone() -> None:
    model, tokenizer = tiny(), byte_tokenizer()
    prompts = [prompt(tokens, seed=tokens)[0].tolist() for tokens in (40, 31)]

    def answers(rows: list[list[int]], *seeds: int) -> list[list[int]]:
        sampling = Sampling(1.0, 0.9, seeds)
        found = generate(model, tokenizer, rows, POLICY, 8, (), {}, sampling=sampling)
        return [one.tokens for one in found]

    together = answers(prompts, 1, 2)
    assert together == [*answers(prompts[:1], 1), *answers(prompts[1:], 2)]
    assert answers(prompts[:1], 3) != together[:1]
