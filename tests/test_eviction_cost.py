"""The script that times selections against the size of the cache."""

from __future__ import annotations

import pandas as pd
import pytest

from baselines import H2OPolicy
from buzz import POLICIES, Budget, BuzzPolicy, HoneycombPolicy
from scripts import eviction_cost as cost


def test_how_often_a_full_cache_evicts() -> None:
    """As counted in a long decode."""
    policy, _ = Budget(200).policy(BuzzPolicy(), 400)
    lengths = policy.lengths([400] + [1] * 20_000)
    drops = sum(now <= before for before, now in zip(lengths, lengths[1:], strict=False))
    held, state, often = cost.evicting(policy, 200)
    assert drops / 20_000 == pytest.approx(often, rel=0.05)
    assert policy.next_length(held, state)[0] < held == 201
    assert cost.evicting(H2OPolicy(heavy=10, recent=10), 20) == (21, 0, 1)


def test_scores_count_and_prompt_methods_have_no_decoding(monkeypatch) -> None:
    """Honeycomb ranks by two signals, which takes longer than the choice; H2O's are there."""
    monkeypatch.setattr(cost, "LEAST", 0)
    every = cost.measure(cost.TIMED, [1024])
    steady = {name for name in cost.TIMED if POLICIES[name].evicts == "always"}
    assert set(every[every.when == "decode"].method) == steady > {"honeycomb", "lag_kv"}
    assert set(every[every.when == "prompt"].method) == {*cost.TIMED} > {"compactor"}
    scored = []
    monkeypatch.setattr(HoneycombPolicy, "score", lambda policy, entries: scored.append(entries))
    monkeypatch.setattr(HoneycombPolicy, "select", lambda policy, held, state, scores: held)
    cost.measure(["honeycomb"], [1024])
    assert {one.held for one in scored} == {1024 + 1, 2048} and len(scored) == 2 * (1 + 5)
    assert scored[0].keys.shape == (1, 1, 1025, cost.DIMENSIONS)


def test_numbers_and_picture(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cost, "LEAST", 0)
    out, picture = tmp_path / "cost.csv", tmp_path / "cost.png"
    arguments = ["--out", str(out), "--picture", str(picture)]
    assert cost.main([*arguments, "--largest", "2048"]) == 0
    frame = pd.read_csv(out)
    assert frame.groupby(["method", "when"]).entries.agg(list).tolist() == [[1024, 2048]] * 6
    assert (frame.eviction_s > 0).all()
    decode = frame[frame.when == "decode"]
    assert (decode.token_s < decode.eviction_s * 1.01).all()
    before = picture.read_bytes()
    assert cost.main([*arguments, "--draw"]) == 0 and picture.read_bytes() == before
    assert capsys.readouterr().out.count("h2o prompt: n^") == 2
