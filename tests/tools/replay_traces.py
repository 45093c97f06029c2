"""Replay recorded evictions through the policies: does each keep what its original kept?

    python tests/tools/replay_traces.py PREFIX

reads PREFIX.json, a list of {case, policy, params, kv_heads, chunks}, and PREFIX.npz with, for
every case and step, `{case}/{step}/scores` (float32 [kv_heads, n], what each of the n entries
received in that step) and `{case}/{step}/kept` (int32 [kv_heads, kept], token indices held after
it). Each step goes through the cache's own append, accumulate and evict. Prints, per policy, cases,
steps and mismatching steps; exits with 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import baselines  # noqa: F401  (registers its policies)
from buzz.layer import EvictionLayer
from buzz.policy import POLICIES
from buzz.rope import Rope


def replay(case: dict[str, Any], arrays: Any) -> list[int]:
    """Steps of one case after which other entries are held than recorded."""
    policy = POLICIES[case["policy"]](**case["params"])
    layer = EvictionLayer(policy, Rope(None))
    mismatches = []
    for step, new in enumerate(case["chunks"]):
        nothing = torch.zeros(1, case["kv_heads"], new, 1)
        layer.update(nothing, nothing)
        received = torch.from_numpy(arrays[f"{case['case']}/{step}/scores"])[None]
        layer.after_attention(received if layer.wants_scores else None)
        assert layer.store is not None
        held = layer.view(layer.store.positions)[0].numpy()
        if not np.array_equal(held, arrays[f"{case['case']}/{step}/kept"]):
            mismatches.append(step)
            break  # what follows a wrong eviction says nothing more
    return mismatches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", help="path of the recording without .json / .npz")
    prefix = parser.parse_args().prefix
    try:
        cases = json.loads(Path(f"{prefix}.json").read_text())
        arrays = np.load(f"{prefix}.npz", allow_pickle=False)
    except OSError as error:
        print(f"error: prefix={prefix}: cannot read the recording ({error})", file=sys.stderr)
        return 2
    totals: dict[str, Counter[str]] = {}
    with torch.inference_mode():
        for case in cases:
            wrong = replay(case, arrays)
            count = totals.setdefault(case["policy"], Counter())
            count.update(cases=1, steps=len(case["chunks"]), mismatches=len(wrong))
            for step in wrong:
                print(f"case {case['case']} ({case['policy']} {case['params']}): step {step}")
    for policy, count in totals.items():
        print(
            f"{policy:15} {count['cases']:4} cases {count['steps']:6} steps"
            f" {count['mismatches']:4} mismatches"
        )
    return int(any(count["mismatches"] for count in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
