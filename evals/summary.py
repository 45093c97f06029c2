"""What a run comes to: summary.json."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from evals.compare import units
from evals.metrics import STATISTICS, bootstrap_interval
from evals.plan import Plan
from evals.records import Record, digest

MEASURED = (
    "prompt_tokens",
    "generated_tokens",
    "budget_entries",
    "kv_entries_mean",
    "kv_nbytes_mean",
    "ttft_s",
    "decode_tokens_per_s",
    "itl_p50_ms",
    "itl_p95_ms",
    "evictions",
)
PEAKS = ("kv_entries_peak", "kv_nbytes_peak", "allocated_nbytes", "memory_peak_nbytes")


def summarize(plan: Plan, records: list[Record]) -> dict[str, Any]:
    """Means over the samples that ran; with groups, the score is the mean of the groups' means.

    Intervals are 95% bootstrap intervals, None where a group has a single sample. KV entries and
    bytes are per sample, over its decode phase: mean, and highest over all samples.
    """
    config, task = plan.config, plan.task
    ran = [record for record in records if record["status"] == "ok"]
    groups: dict[str, list[float]] = {}
    counts = Counter(record["group"] for record in ran)
    for record in ran:
        groups.setdefault(record["group"], []).extend(units(record, task.headline))
    scores = {
        name: [record["scores"][name] for record in ran if name in record["scores"]]
        for name in sorted({name for record in ran for name in record["scores"]})
    }
    finish = STATISTICS[task.statistic]
    means = {name: statistics.fmean(values) for name, values in groups.items()}
    return {
        "status": "complete",
        "task": config["task"]["name"],
        "method": config["method"]["name"],
        "model": config["model"]["name"],
        "protocol": config["protocol"]["name"],
        "seed": config["seed"],
        "budget": plan.budget,
        "parameters": {k: v for k, v in config["method"].items() if k not in ("name", "_target_")},
        "cache": config["cache"],
        "setting": plan.setting,
        "headline": task.headline,
        "statistic": task.statistic,
        "higher_is_better": task.higher_is_better,
        "grouped_by": task.grouped_by,
        "score": float(finish(statistics.fmean(means.values()))) if means else None,
        "score_ci95": bootstrap_interval(list(groups.values()), task.statistic),
        "scores": {name: statistics.fmean(values) for name, values in scores.items()},
        "scores_ci95": {name: bootstrap_interval([values]) for name, values in scores.items()},
        "groups": {
            name: {
                "n": counts[name],
                "score": float(finish(value)),
                "ci95": bootstrap_interval([groups[name]], task.statistic),
            }
            for name, value in means.items()
        },
        "breakdown": task.breakdown(ran) if ran else {},
        "n": len(ran),
        "oom": len(records) - len(ran),
        "truncated": sum(record["truncated_tokens"] > 0 for record in ran),
        "conditions": _conditions(ran),
        **{name: mean(record[name] for record in ran) for name in MEASURED},
        **{name: max((record[name] for record in ran), default=None) for name in PEAKS},
    }


def _conditions(records: list[Record]) -> dict[str, Any]:
    """What runs should have in common before their scores are compared."""
    return {
        "samples": len(records),
        "prompts": digest(sorted(record["prompt_sha256"] for record in records)),
        "prompt tokens": sum(record["prompt_tokens"] for record in records),
        "truncated prompts": sum(record["truncated_tokens"] > 0 for record in records),
        "chat templates": sum(record["chat_template"] for record in records),
        "stop reasons": dict(sorted(Counter(r["stop_reason"] for r in records).items())),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
