"""A run beside the full-cache run of the same setting, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from evals.results.records import sha256
from evals.results.schema import Record
from evals.results.statistics import INVERSES, bootstrap, lead, mean, score_of

REFERENCE = "full"  # the method that the others are compared with


def draws(record: Record, headline: str) -> list[float]:
    """What of a sample the bootstrap draws: its score, or its blocks' losses where a text has many.

    Several samples of one unit are drawn as one, see :func:`strata`.
    """
    return record.get("blocks") or [record["scores"][headline]]


def drawn(records: Iterable[Record], headline: str) -> list[list[float]]:
    """What the bootstrap draws from, by group."""
    return list(strata((record, draws(record, headline)) for record in records).values())


def values_of(records: Iterable[Record], metric: str, statistic: str) -> list[list[float]]:
    """A metric of the samples that have it, as what is averaged: of perplexities the logarithms."""
    inverse = INVERSES[statistic]
    having = [record for record in records if metric in record["scores"]]
    parts = strata((record, [float(inverse(record["scores"][metric]))]) for record in having)
    return list(parts.values())


def strata(parts: Iterable[tuple[Record, Sequence[Any]]]) -> dict[str, list[Any]]:
    """What samples contribute, by group: a score is the mean of the groups' means.

    Samples of one unit are in one group and not independent: they count once, as their mean.
    """
    groups: dict[str, list[Any]] = {}
    units: dict[str, list[Any]] = {}
    for record, values in parts:
        unit = record.get("unit")
        where, name = (units, unit) if unit else (groups, record["group"])
        where.setdefault(name, []).extend(values)
    if units:
        means = [np.mean(values, axis=0) for values in units.values()]
        groups.setdefault("", []).extend(means)
    return groups


def compare(
    records: Mapping[str, Record],
    full: Mapping[str, Record],
    summary: Mapping[str, Any],
    fidelity: Mapping[str, Record],
) -> dict[str, Any]:
    """Paired comparison over the samples that both runs finished.

    Args:
        records, full: the two runs' records by sample id.
        summary: the run's summary: `headline`, `statistic` and `higher_is_better` are read.
        fidelity: teacher-forced comparisons by sample id, where they were made.

    Returns:
        n; difference (own score less full's) with its 95% interval; relative (own over full);
        wins, ties, losses by sample (or block of a text); agreement: share of positions where both
        answers have the same token; prefix: share of the full answer before the first difference;
        kl_to_full and top1_to_full, see `evals.run.forced.Fidelity`, and the kl_n samples for
        which they are known. None for what is unknown.
    """
    ids = [
        name
        for name, record in records.items()
        if record["status"] == "ok" and name in full and same_sample(record, full[name])
    ]
    # A comparison with an answer that the full cache no longer gives says nothing.
    paired = set(ids)
    known = {
        name: one
        for name, one in fidelity.items()
        if name in paired and one.get("answer_sha256") in (None, sha256(full[name].get("tokens")))
    }
    parts = []
    for name in ids:
        both = (draws(run[name], summary["headline"]) for run in (records, full))
        parts.append((records[name], list(zip(*both, strict=True))))
    pairs = list(strata(parts).values())
    sign = 1 if summary["higher_is_better"] else -1
    gains = [sign * (own - theirs) for _, values in parts for own, theirs in values]
    own, theirs = (
        score_of(
            values_of((run[name] for name in ids), summary["headline"], summary["statistic"]),
            summary["statistic"],
        )
        for run in (records, full)
    )
    both_known = own is not None and theirs is not None
    answers = [(records[name].get("tokens"), full[name].get("tokens")) for name in ids]
    answers = [pair for pair in answers if all(pair)]
    return {
        "n": len(ids),
        "difference": own - theirs if both_known else None,
        "difference_ci95": bootstrap(pairs, summary["statistic"], lead),
        "relative": own / theirs if both_known and theirs else None,
        "wins": sum(gain > 0 for gain in gains),
        "ties": sum(gain == 0 for gain in gains),
        "losses": sum(gain < 0 for gain in gains),
        "agreement": mean(_agreement(*pair) for pair in answers),
        "prefix": mean(_prefix(*pair) / len(pair[1]) for pair in answers),
        **{
            key: mean(record.get(key) for record in known.values())
            for key in ("kl_to_full", "top1_to_full")
        },
        "kl_n": sum(record["kl_to_full"] is not None for record in known.values()),
    }


def paired(
    records: Mapping[str, Record],
    others: Mapping[str, Record],
    summary: Mapping[str, Any],
    fidelity: Iterable[Record],
    other_fidelity: Iterable[Record],
) -> dict[str, Any]:
    """What a run has more than another, of the samples that both finished.

    Returns:
        n and difference of scores, as :func:`compare`; kl: the mean difference of `kl_to_full`, in
        nats, over the kl_n samples for which both were compared with the same answer of the full
        cache. Intervals are 95% bootstrap intervals of the paired differences.
    """
    found = compare(records, others, summary, {})
    theirs = {one["id"]: one for one in other_fidelity}
    kls = [
        (one["kl_to_full"], theirs[one["id"]]["kl_to_full"])
        for one in fidelity
        if one["id"] in theirs
        and one.get("answer_sha256") == theirs[one["id"]].get("answer_sha256")
        and None not in (one["kl_to_full"], theirs[one["id"]]["kl_to_full"])
    ]
    return {
        **{key: found[key] for key in ("n", "difference", "difference_ci95")},
        "kl": mean(own - other for own, other in kls),
        "kl_ci95": bootstrap([kls], of=lead),
        "kl_n": len(kls),
    }


def same_sample(record: Record, other: Record) -> bool:
    """Whether both answered the same prompt and were scored against the same references."""
    return record["status"] == other["status"] == "ok" and all(
        record.get(key) == other.get(key) for key in ("prompt_sha256", "sample_sha256")
    )


def _agreement(own: list[int], full: list[int]) -> float:
    """Share of positions, of the longer answer, with the same token."""
    return sum(a == b for a, b in zip(own, full, strict=False)) / max(len(own), len(full))


def _prefix(own: list[int], full: list[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, full, strict=False)))


def differing(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """In which conditions of comparison runs differ: {condition: each run's, by its name}."""

    def show(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{key} {count}" for key, count in value.items())
        return str(value)

    conditions = {name: row["conditions"] for name, row in summaries.items()}
    first = next(iter(conditions.values()))
    return {
        condition: [f"{name} {show(own[condition])}" for name, own in conditions.items()]
        for condition in first
        if any(own[condition] != first[condition] for own in conditions.values())
    }
