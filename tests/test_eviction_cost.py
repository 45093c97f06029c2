"""The script that times selections against the size of the cache."""

from __future__ import annotations

import pandas as pd
import pytest

from baselines import H2OPolicy
from buzz import Budget, BuzzPolicy
from scripts import eviction_cost as cost


def test_how_often_a_full_cache_evicts() -> None:
    """As counted in a long decode."""
    policy, _ = Budget(200).policy(BuzzPolicy(), 400)
    lengths = policy.lengths([400] + [1] * 20_000)
    drops = sum(now <= before for before, now in zip(lengths, lengths[1:], strict=False))
    held, state, often = cost.evicting(policy, 200)
    assert drops / 20_000 == pytest.approx(often, rel=0.05)
    assert policy.survivors(held, state)[0] < held == 201
    assert cost.evicting(H2OPolicy(heavy=10, recent=10), 20) == (21, 0, 1)


def test_numbers_and_picture(tmp_path, capsys) -> None:
    out, picture = tmp_path / "cost.csv", tmp_path / "cost.png"
    arguments = ["--out", str(out), "--picture", str(picture)]
    assert cost.main([*arguments, "--largest", "2048"]) == 0
    frame = pd.read_csv(out)
    assert frame.groupby(["method", "when"]).entries.agg(list).tolist() == [[1024, 2048]] * 4
    assert (frame.eviction_s > 0).all()
    decode = frame[frame.when == "decode"]
    assert (decode.token_s < decode.eviction_s * 1.01).all()
    before = picture.read_bytes()
    assert cost.main([*arguments, "--draw"]) == 0 and picture.read_bytes() == before
    assert capsys.readouterr().out.count("h2o prompt: n^") == 2
