"""Heads that share their layer's budget."""

from __future__ import annotations

import torch

from baselines import SnapKVPolicy
from scripts.shared_heads import FLOOR, shared, spy


def test_a_layer_keeps_as_many_and_its_best_wherever_they_are() -> None:
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    scores[2, :30] += 2  # a head whose entries are worth more than any others
    policy = SnapKVPolicy(window=4).fit(14)
    window, each = policy.num_recent, 14
    kept = shared(scores, policy, each)
    assert kept.sum() == 3 * each and kept[:, -window:].all()
    floor = int(FLOOR * (each - window))
    assert kept[:, :-window].sum(1).tolist() == [floor, floor, 3 * (each - window) - 2 * floor]
    for head in range(3):  # those that it keeps are its best
        own = scores[head, :-window]
        assert own[kept[head, :-window]].min() > own[~kept[head, :-window]].max()


def test_the_spy_chooses_as_its_policy() -> None:
    policy, seen = SnapKVPolicy(window=4).fit(14), []
    scores = torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(1))
    assert (spy(policy, seen).select(40, 0, scores) == policy.select(40, 0, scores)).all()
    assert (seen[0] == scores[0]).all()
