"""A short soak; the long one is `python tests/tools/soak.py`."""

from __future__ import annotations

import pytest
import torch
from tools import soak

from buzz import EvictionCache


@pytest.mark.parametrize(
    "name", ["buzz", "h2o", pytest.param("streaming_llm", marks=pytest.mark.slow)]
)
def test_nothing_grows_or_drifts(name: str) -> None:
    policy, bound = soak.METHODS[name]
    found = soak.soak(policy, bound, 2000)
    assert found.wrong_lengths == 0 and found.longest == bound
    assert found.evictions >= 30  # buzz, the rarest: one in 61 tokens
    assert found.error < 5e-5 and found.growth <= soak.MOST_GROWTH


def test_a_drifted_key_is_noticed() -> None:
    model, policy = soak.tiny_llama(), soak.METHODS["h2o"][0]
    cache = EvictionCache(model, policy)
    ids = torch.arange(300)[None]
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        assert soak.key_error(model, cache, ids)[0] < 1e-6
        cache.layers[0].view(cache.layers[0].store.keys)[0, 1, -1] += 1e-3
        assert soak.key_error(model, cache, ids)[0] > 1e-4
