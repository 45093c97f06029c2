"""Every method at about 24 entries, and which of them a test runs with what.

Methods differ in what they keep, models in how they rotate and project: each is tested with all
that the other kind has only where that can matter. The core methods (no scores, sums of scores, an
eviction now and then, none at all) meet every model, every method meets one.
"""

from __future__ import annotations

import pytest
import torch

from baselines import FullPolicy, H2OPolicy, LocalPolicy, StreamingLLMPolicy
from buzz import POLICIES, BuzzFastPolicy, BuzzPolicy, BuzzStridedPolicy, Policy

HIVE = {"sink": 2, "window": 12, "stride": 3, "threshold": 12}
METHODS: dict[str, Policy] = {
    "full": FullPolicy(),
    "local": LocalPolicy(window=24),
    "streaming_llm": StreamingLLMPolicy(sink=2, window=20),
    "h2o": H2OPolicy(heavy=12, recent=12),
    "h2o-mean": H2OPolicy(heavy=12, recent=12, scoring="mean"),
    "buzz": BuzzPolicy(**HIVE),
    "buzz-local_max": BuzzPolicy(**HIVE, history="local_max", compact="until_fits"),
    "buzz_strided": BuzzStridedPolicy(**HIVE),
    "buzz_fast": BuzzFastPolicy(**HIVE),
}
METHODS |= {name: POLICIES[name]().fit(24) for name in POLICIES if name not in METHODS}
CORE = ["full", "streaming_llm", "h2o", "buzz"]
# It reads keys, values, queries and the output projection.
SEES_ALL = "defensive_kv"

every_method = pytest.mark.parametrize("policy", METHODS.values(), ids=METHODS)
core_methods = pytest.mark.parametrize("policy", [METHODS[name] for name in CORE], ids=CORE)
both_positions = pytest.mark.parametrize("positions", ["cache", "true"])


def in_turn(first: str) -> pytest.MarkDecorator:
    """Every method at one kind of positions: cache and true by turns, beginning with `first`."""
    turns = ["cache", "true"] if first == "cache" else ["true", "cache"]
    pairs = [(METHODS[name], turns[i % 2]) for i, name in enumerate(METHODS)]
    return pytest.mark.parametrize(("policy", "positions"), pairs, ids=METHODS)


def generate(model, ids, cache, tokens=30, mask=None, **kwargs):
    """Greedy tokens [batch, tokens] and logits [batch, tokens, vocab]."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **kwargs},
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)
