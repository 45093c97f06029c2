"""Gemma 3 270M, whose set-up is opt-in: what is said without it, and a prompt of the real model."""

from __future__ import annotations

import pytest
import torch

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, POLICIES, Budget, EvictionCache, ForkedCache
from buzz.errors import ConfigError
from evals.run.checkpoints import ROOT, source_of
from evals.run.models import check_model, load_model, named_config

GEMMA = named_config("gemma3_270m")
TOKENS, CHUNK, NEW = 700, 256, 6  # more than a window of 512
is_there = pytest.mark.skipif(
    not (ROOT / "models" / GEMMA["gguf_file"]).is_file(), reason="`make model-gemma` sets it up"
)


def test_without_its_set_up_the_make_target_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf_file=.*`make model-gemma` sets it up"):
        source_of(GEMMA | {"name_or_path": str(tmp_path)})


@is_there
def test_a_context_beyond_its_positions_is_refused_with_the_number() -> None:
    with pytest.raises(ConfigError, match=r"max_length=40000: the model has 32,768 positions"):
        check_model(GEMMA | {"max_length": 40_000})


@is_there
def test_methods_in_one_pass_give_what_they_give_alone_to_a_prompt_in_chunks() -> None:
    model, tokenizer = load_model(GEMMA, "cpu")
    assert tokenizer.chat_template is None
    text = (ROOT / "docs" / "methods.md").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
    names = "h2o", "tova", "keydiff", "buzz", "snapkv"
    policies = [FullPolicy(), *(Budget(0.25).policy(POLICIES[n](), TOKENS)[0] for n in names)]

    def logits(cache: EvictionCache, rows: int, answer: torch.Tensor) -> torch.Tensor:
        cache.hold_until = TOKENS
        with torch.inference_mode():
            for chunk in ids.split(CHUNK, dim=1):
                model(chunk, **{CACHE_ARGUMENT: cache})
            steps = [model(one.expand(rows, 1), **{CACHE_ARGUMENT: cache}).logits for one in answer]
        return torch.cat(steps, dim=1)

    answer = ids[0, :NEW, None, None]
    forked = ForkedCache(model, policies)
    together = logits(forked, len(policies), answer)
    for policy, own, fork in zip(policies, together, forked.forks, strict=True):
        alone = EvictionCache(model, policy)
        torch.testing.assert_close(own, logits(alone, 1, answer)[0], atol=1e-3, rtol=0)
        layer = alone.layers.index(alone.evicting[0])
        assert fork.lengths == alone.lengths
        assert torch.equal(fork.kept_positions(layer), alone.kept_positions(layer)), policy.name
