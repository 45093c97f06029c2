"""Recomputes recorded LongBench scores: `python tests/tools/verify_scores.py FILE`.

FILE is a JSON list of {dataset, prediction, answers, all_classes, score}, score 0..100. Prints per
data set how many agree and the largest difference; exits with 1 if any exceeds the tolerance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evals.tasks.longbench import score

TOLERANCE = 0.01


def main(path: str) -> int:
    differences: dict[str, list[float]] = {}
    for case in json.loads(Path(path).read_text(encoding="utf-8")):
        ours = score(case["dataset"], case["prediction"], case["answers"], case["all_classes"])
        differences.setdefault(case["dataset"], []).append(abs(ours - case["score"]))
    agreeing = total = 0
    for dataset, values in differences.items():
        good = sum(value <= TOLERANCE for value in values)
        print(f"{dataset:22} {good:3} of {len(values):3} agree, largest off by {max(values):.4f}")
        agreeing, total = agreeing + good, total + len(values)
    print(f"{agreeing} of {total} scores agree to {TOLERANCE}")
    return 0 if agreeing == total else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
