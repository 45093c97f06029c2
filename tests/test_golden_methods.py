"""Policies keep, through the real cache, the tokens that their originals keep.

The originals leave entries at their true positions. Without a rotation the cache does so too, since
only what moves is turned: everything else, the attention included, is what a run computes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tools import make_golden_methods as golden

from baselines import (
    A2SFPolicy,
    ChunkKVPolicy,
    CompactorPolicy,
    CriticalKVPolicy,
    DefensiveKVPolicy,
    ExpectedAttentionPolicy,
    H2OPolicy,
    KeyDiffPolicy,
    KnormPolicy,
    KVzipPolicy,
    LagKVPolicy,
    PyramidKVPolicy,
    RandomPolicy,
    RKVPolicy,
    SnapKVEveryPolicy,
    SnapKVPolicy,
    TOVAPolicy,
    TriAttentionPolicy,
    VATPPolicy,
)
from buzz import EvictionCache
from buzz.entries import Entries
from buzz.policy import Policy
from buzz.rope import Rope

GOLDEN = Path(__file__).parent / "golden"
RECORDS = json.loads((GOLDEN / "methods.json").read_text())

Case = dict[str, Any]


def sized(case: Case, **names: str) -> dict[str, Any]:
    """Parameters of a policy: each by its name in the recording."""
    return {ours: case[theirs] for ours, theirs in names.items()}


def window(case: Case) -> dict[str, int]:
    return sized(case.get("scorer", case), window="window_size", kernel="kernel_size")


def older(case: Case, recent: str) -> dict[str, int]:
    """The budget, of which so many are the last."""
    return {"recent": case[recent], "heavy": case["budget"] - case[recent]}


def snapkv(case: Case) -> Policy:
    pooling = {"avgpool": "avg", "maxpool": "max"}[case["pooling"]]
    return SnapKVPolicy(capacity=case["budget"], pooling=pooling, **window(case))


def pyramid_kv(case: Case) -> Policy:
    return PyramidKVPolicy(**vars(snapkv(case)), beta=case.get("beta", 20))


def kvzip(case: Case) -> Policy:
    policy = KVzipPolicy(capacity=case["budget"], chunk=case["chunk"])
    return policy.asking(case["first"], case["later"], case["suffix"])


def chunk_kv(case: Case) -> Policy:
    """The original keeps a share of the chunks, whole: so many entries, the last chunk's among."""
    length, chunk = case["length"], case["chunk_length"]
    chunks = -(-length // chunk)
    share = max(1, int(chunks * (case["budget"] + 0.5) / length))
    kept = (share - 1) * chunk + length - (chunks - 1) * chunk
    return ChunkKVPolicy(capacity=kept, chunk=chunk, **window(case))


def triattention(case: Case) -> Policy:
    """At distances of 1, 2, 4, ... up to the farthest, with queries of the same text."""
    sizes = sized(case, size="budget", every="every")
    policy = TriAttentionPolicy(**sizes, distances=int(case["farthest"]).bit_length())
    return policy.for_tokenizer(SimpleNamespace(encode=lambda *_, **__: case["text"]))


class PressesNumbers(RandomPolicy):
    """The press draws the same numbers in every layer, and protects nothing."""

    def score(self, entries: Entries) -> torch.Tensor:
        own = torch.Generator().manual_seed(self.seed)
        return torch.rand(entries.positions.shape, generator=own)


POLICIES: dict[str, Callable[[Case], Policy]] = {
    "h2o": lambda case: H2OPolicy(**sized(case, heavy="heavy", recent="recent")),
    "h2o_grouped": lambda case: H2OPolicy(**older(case, "window_size")),
    "tova": lambda case: TOVAPolicy(size=case["budget"]),
    "snapkv": snapkv,
    "snapkv_max": snapkv,
    "snapkv_grouped": snapkv,
    "random": lambda case: PressesNumbers(size=case["budget"], sink=0, window=0, seed=case["seed"]),
    "vatp": lambda case: VATPPolicy(**sized(case, heavy="heavy", recent="recent", sink="sink")),
    "a2sf": lambda case: A2SFPolicy(decay=case["forgetting"], **older(case, "recent")),
    "a2sf_grouped": lambda case: A2SFPolicy(decay=case["forgetting"], **older(case, "recent")),
    "knorm": lambda case: KnormPolicy(**sized(case, size="budget", every="every")),
    "keydiff": lambda case: KeyDiffPolicy(**sized(case, size="budget", every="every")),
    "lag_kv": lambda case: LagKVPolicy(
        **sized(case, size="budget", every="every", sink="n_sink", lag="lag_size")
    ),
    "compactor": lambda case: CompactorPolicy(
        **sized(case, capacity="budget", chunk="chunk_size", sketch="sketch_dimension")
    ),
    "triattention": triattention,
    "critical_kv": lambda case: CriticalKVPolicy(capacity=case["budget"], **window(case)),
    "snapkv_every": lambda case: SnapKVEveryPolicy(
        **sized(case, size="budget", every="every"), **window(case)
    ),
    "r_kv": lambda case: RKVPolicy(
        **sized(case, size="budget", every="every", trade="mix_lambda"), **window(case)
    ),
    "chunk_kv": chunk_kv,
    "expected_attention": lambda case: ExpectedAttentionPolicy(capacity=case["budget"]),
    "kvzip": kvzip,
    "pyramid_kv": pyramid_kv,
    "pyramid_kv_max": pyramid_kv,
    "defensive_kv": lambda case: DefensiveKVPolicy(capacity=case["budget"], **window(case)),
}

model_of = functools.cache(golden.model_of)


def held_by(policy: Policy, name: str, case: Case, true_positions: bool = True) -> Iterator[Any]:
    """Which tokens the cache holds after the prompt and each token: bool [layers, heads, seen]."""
    model = model_of(RECORDS[name]["model"])
    cache = EvictionCache(model, policy)
    if true_positions:
        for layer in cache.evicting:
            layer.rope = Rope(None)
    length, steps = case["length"], RECORDS[name]["steps"]
    tokens = golden.tokens_of(length, case["prompt_seed"])[: length + steps]
    with torch.no_grad(), golden.watched_cuts([]):  # the earliest of equals
        for part in tokens.split([length] + [1] * steps):
            model(part[None], past_key_values=cache)
            seen = cache.layers[0].get_seq_length()
            each = [cache.kept_positions(i)[0] for i in range(golden.LAYERS)]
            yield torch.stack(
                [torch.zeros(len(k), seen, dtype=torch.bool).scatter_(1, k, True) for k in each]
            )


def steps_that_differ(name: str, case: Case, left: np.ndarray, **options: bool) -> list[int]:
    held = held_by(POLICIES[name](case), name, case, **options)
    wanted = (golden.held_after(left, case["length"], s) for s in range(RECORDS[name]["steps"] + 1))
    both = zip(held, wanted, strict=True)
    return [step for step, (ours, theirs) in enumerate(both) if not np.array_equal(ours, theirs)]


@pytest.mark.parametrize("name", POLICIES)
def test_the_original_keeps_the_same_tokens(name) -> None:
    for case, left in golden.recorded(name):
        assert steps_that_differ(name, case, left) == [], case


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_positions_in_the_cache_are_what_differs(name) -> None:
    # The prompt is attended before anything moves.
    differing = [
        steps_that_differ(name, case, left, true_positions=False)
        for case, left in list(golden.recorded(name))[::6]
    ]
    assert all(0 not in steps for steps in differing)
    assert any(differing)


def test_a_mean_over_queries_ranks_as_the_press_does() -> None:
    for case, left in golden.recorded("h2o_mean"):
        policy = H2OPolicy(heavy=case["budget"], recent=1, scoring="mean")
        (ours,) = held_by(policy, "h2o_mean", case)
        theirs = torch.from_numpy(golden.held_after(left, case["length"], 0))
        # The press does not protect the last token: where it keeps it, one of the others is out.
        more = ours[..., :-1] & ~theirs[..., :-1]
        assert not (theirs[..., :-1] & ~ours[..., :-1]).any()
        assert torch.equal(more.sum(-1), theirs[..., -1].long())


def test_a_wrong_recording_is_noticed() -> None:
    case, left = next(golden.recorded("h2o"))
    wrong = left.copy()
    wrong[1, 2, :5] = 0
    assert 0 in steps_that_differ("h2o", case, wrong)


def test_every_recording_names_its_source() -> None:
    size = sum((GOLDEN / f"methods.{kind}").stat().st_size for kind in ("json", "npz"))
    assert size < 300_000
    assert list(RECORDS) == list(golden.METHODS)
    commits = {*golden.COMMITS.values(), golden.A2SF_OF_THE_PAPER}
    for name, record in RECORDS.items():
        assert {source["commit"] for source in record["sources"]} <= commits
        assert all(re.fullmatch("[0-9a-f]{40}", s["commit"]) for s in record["sources"])
        assert record["smallest_gap"] >= golden.SMALLEST_GAP
        cases = list(golden.recorded(name))
        assert len({case["length"] for case, _ in cases}) == 6 and len(cases) == 18
        assert sum(left.size for _, left in cases) == np.load(GOLDEN / "methods.npz")[name].size


def test_the_decoder_of_the_recordings_computes_what_the_model_does() -> None:
    golden.check_decoder()
