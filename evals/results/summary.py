"""What a run comes to: summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from evals.results.compare import drawn, values_of
from evals.results.equal_memory import held_over_budget
from evals.results.records import digest
from evals.results.runs import comparable
from evals.results.schema import FORMAT, Record
from evals.results.statistics import bootstrap, mean, score_of

MEASURED = (
    "prompt_tokens",
    "generated_tokens",
    "budget_entries",
    "kv_entries_mean",
    "kv_nbytes_mean",
    "ttft_s",
    "question_s",
    "decode_tokens_per_s",
    "itl_p50_ms",
    "itl_p95_ms",
    "evictions",
)
PEAKS = (
    "kv_entries_peak",
    "kv_nbytes_peak",
    "allocated_nbytes",
    "memory_peak_nbytes",
    "context_peak_nbytes",
    "question_peak_nbytes",
)


class Scored(Protocol):
    """What a summary reads of a task, see :class:`evals.tasks.base.Task`."""

    headline: str
    statistic: str
    higher_is_better: bool
    grouped_by: str

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]: ...


def summarize(
    config: dict[str, Any], task: Scored, records: list[Record], stale: int = 0
) -> dict[str, Any]:
    """Means over the samples that ran; with groups, a score is the mean of the groups' means.

    Samples that were out of memory or failed are counted, with the most bytes that one asked for;
    so are those whose timings other processes disturbed. Intervals are 95% bootstrap intervals,
    None where a group has a single sample. KV entries and bytes are per sample, from the prompt's
    eviction on: mean, and highest over all samples. `budget_held` is what was held over the budget,
    see :func:`evals.results.equal_memory.held_over_budget`.

    Args:
        records: those that belong to the run, in its order.
        stale: how many more lie beside them, of other data.
    """
    ran, oom = ([r for r in records if r["status"] == status] for status in ("ok", "oom"))
    groups: dict[str, list[Record]] = {}
    for record in ran:
        groups.setdefault(record["group"], []).append(record)
    names = sorted({name for record in ran for name in record["scores"]})
    values = {name: values_of(ran, name, task.statistic) for name in names}
    scores = {name: score_of(found, task.statistic) for name, found in values.items()}
    parts = values | {task.headline: drawn(ran, task.headline)}
    intervals = {name: bootstrap(found, task.statistic) for name, found in parts.items()}
    return {
        "status": "complete",
        "format": FORMAT,
        "task": config["task"]["name"],
        "method": config["method"]["name"],
        "model": config["model"]["name"],
        "protocol": config.get("protocol", {}).get("name"),
        "seed": config["seed"],
        "budget": config["budget"],
        "budget_by": config["budget_by"] if config["budget"] is not None else None,
        "fixed": config.get("fixed", []),
        "parameters": {k: v for k, v in config["method"].items() if k not in ("name", "_target_")},
        "cache": config["cache"],
        "setting": comparable(config),
        "model_digest": config.get("model_digest"),
        "headline": task.headline,
        "statistic": task.statistic,
        "higher_is_better": task.higher_is_better,
        "grouped_by": task.grouped_by,
        "score": scores.get(task.headline),
        "score_ci95": intervals[task.headline],
        "scores": scores,
        "scores_ci95": {name: intervals[name] for name in names},
        "groups": {
            name: {
                "n": len(found),
                "score": score_of(values_of(found, task.headline, task.statistic), task.statistic),
                "ci95": bootstrap(drawn(found, task.headline), task.statistic),
            }
            for name, found in groups.items()
        },
        "breakdown": task.breakdown(ran) if ran else {},
        "n": len(ran),
        "oom": len(oom),
        "oom_asked_nbytes": max(filter(None, (r.get("asked_nbytes") for r in oom)), default=None),
        "failed": len(records) - len(ran) - len(oom),
        "budget_held": held_over_budget(records),
        "stale": stale,
        "loaded": sum(bool(record.get("loaded")) for record in ran),
        "environments": sorted({r["environment"] for r in records if "environment" in r}),
        "truncated": sum(record.get("truncated_tokens", 0) > 0 for record in ran),
        "conditions": _conditions(ran),
        **{name: mean(record.get(name) for record in ran) for name in MEASURED},
        **{name: _peak(record.get(name) for record in ran) for name in PEAKS},
    }


def _peak(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _conditions(records: list[Record]) -> dict[str, Any]:
    """What runs should have in common before their scores are compared."""
    return {
        "samples": len(records),
        "prompts or references": digest(
            sorted(record.get("sample_sha256", record["prompt_sha256"]) for record in records)
        ),
        "prompt tokens": sum(record["prompt_tokens"] for record in records),
        "truncated prompts": sum(record.get("truncated_tokens", 0) > 0 for record in records),
        "chat templates": sum(record.get("chat_template", False) for record in records),
        "stop reasons": dict(sorted(Counter(r.get("stop_reason") for r in records).items())),
    }
