"""Whether runs held what they were given: what was measured beside the budget, and beside others.

A budget is B entries per layer and KV head, by one of two measures: under `budget_by: peak` never
more, from the end of the prompt's eviction to the last token; under `budget_by: mean` on average.
What a run held is taken from its records, over what was really decoded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from evals.results.schema import Record

TOLERANCE = 0.05  # of the memory, by which runs may differ and still be equal
MARK = "†"  # of a run that holds more than its budget and TOLERANCE


def held_over_budget(records: Iterable[Record]) -> float | None:
    """Entries held, by the run's measure, over the budget: the mean over the samples that ran.

    Returns:
        1.0 for a budget met exactly; None where no sample has a budget and says by what measure
        (records of earlier versions do not).
    """
    shares = [
        record[f"kv_entries_{record['budget_by']}"] / record["budget_entries"]
        for record in records
        if record["status"] == "ok" and record.get("budget_by") and record.get("budget_entries")
    ]
    return statistics.fmean(shares) if shares else None


def is_over(held: float | None) -> bool:
    """Whether a run with this :func:`held_over_budget` is to be marked."""
    return held is not None and held > 1 + TOLERANCE


def at_equal_memory(own: Iterable[Record], other: Iterable[Record]) -> float | None:
    """Bytes of keys and values held by one run over those of another, on the samples that both ran.

    Held, not allocated: what a method needs, whatever its buffers are for. Of runs with `peak`
    budgets the mean over samples of the peak bytes, otherwise of the mean bytes.

    Returns:
        1.0 for equal memory, see :func:`is_equal`; None where the runs share no sample.
    """
    ran = [{r["id"]: r for r in records if r["status"] == "ok"} for records in (own, other)]
    shared = ran[0].keys() & ran[1].keys()
    if not shared:
        return None
    peak = all(run[name].get("budget_by") == "peak" for run in ran for name in shared)
    measure = "kv_nbytes_peak" if peak else "kv_nbytes_mean"
    mine, theirs = (sum(run[name][measure] for name in shared) for run in ran)
    return mine / theirs if theirs else None


def is_equal(ratio: float | None) -> bool:
    """Whether two runs of this ratio of memory, either way round, held as much as one another."""
    return ratio is not None and ratio > 0 and max(ratio, 1 / ratio) <= 1 + TOLERANCE
