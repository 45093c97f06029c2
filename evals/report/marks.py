"""What a reader must know of a run before comparing it: memory beyond its budget, a small model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import baselines  # noqa: F401  (registers its policies)
from buzz import POLICIES
from evals.report.chosen import left_to_budget
from evals.results.compare import REFERENCE
from evals.results.equal_memory import MARK, TOLERANCE, held_over_budget, is_over
from evals.results.runs import Run
from evals.results.schema import Record
from evals.results.statistics import mean

PAPERS_MODEL = "Llama-2-7B"
SMALL = 1_000_000_000  # parameters below which a model's verdicts are its own


def held(run: Run) -> float | None:
    """What a run held over what it was given, see :func:`held_over_budget`."""
    return held_over_budget(run.records)


def mark(run: Run) -> str:
    """MARK if a run holds more than its budget, else nothing."""
    return MARK if is_over(held(run)) else ""


def budget_text(run: Run, share: float | None) -> str:
    """A run's budget, its measure if that is the mean, and MARK if more is held.

    A method without a budget has sizes of its own, the full cache has none.
    """
    if run.budget is None:
        return "-" if run.method == REFERENCE else "own"
    by_mean = " mean" if run.config.get("budget_by") == "mean" else ""
    return f"{run.budget}{by_mean}{MARK if is_over(share) else ''}"


def label(run: Run, runs: Sequence[Run]) -> str:
    """A run's method, budget and what else tells it from `runs`."""
    parts = [run.method]
    if run.budget is not None:
        parts.append(f"@{budget_text(run, held(run))}")
    parts.append(varied(run, [other for other in runs if other.setting == run.setting]))
    if len({other.compress for other in runs}) > 1:
        parts.append(f"compress={run.compress}")
    if len({other.model for other in runs}) > 1:
        parts.append(f"({run.model})")
    return " ".join(filter(None, parts))


def varied(run: Run, runs: Iterable[Run]) -> str:
    """The parameters in which runs of the same method differ, without sizes that a budget chose.

    So is which of them a budget left alone (`fixed`), where that is all that differs.
    """
    alike = [other for other in runs if other.method == run.method]
    own = run.parameters
    varying = [key for key in own if any(one.parameters.get(key) != own[key] for one in alike)]
    parts = [f"{key}={own[key]}" for key in varying if not left_to_budget(run, key)]
    twins = [one for one in alike if one.parameters == own and one.budget == run.budget]
    if any(one.fixed != run.fixed for one in twins):
        parts.append(f"fixed={'+'.join(run.fixed) or 'none'}")
    return " ".join(parts)


def over_note(rows: Iterable[tuple[Run, float | None]]) -> str:
    """What MARK means, and by how much each row that has it is over; nothing if none has."""
    over: dict[str, list[float]] = {}
    for run, share in rows:
        if share is not None and is_over(share):
            over.setdefault(f"{run.method} @{budget_text(run, share)}", []).append(share)
    if not over:
        return ""
    found = []
    for name, shares in over.items():
        ends = dict.fromkeys(f"{end:.2f}x" for end in (min(shares), max(shares)))
        found.append(f"{name} {' to '.join(ends)}")
    return (
        f"{MARK} holds over {TOLERANCE:.0%} more than its budget, over what was decoded:"
        f" {', '.join(found)}."
    )


def thins_only_the_prompt(run: Run) -> bool:
    """Whether the method's cache grows with the answer."""
    return getattr(POLICIES.get(run.method), "evicts", "always") == "prompt"


def growth(run: Run, records: Iterable[Record]) -> float | None:
    """Entries that such a method holds at an answer's end beyond its budget, mean over samples."""
    if not thins_only_the_prompt(run):
        return None
    return mean(
        record["kv_entries_peak"] - record["budget_entries"]
        for record in records
        if record.get("budget_entries")
    )


def parameters(run: Run) -> int | None:
    """How many the model has; None if that is not known."""
    known = run.environment.get("model_parameters")
    if known is None and run.model.startswith("llama2_7b"):
        return 6_738_415_616
    return known


def is_papers_model(run: Run) -> bool:
    """Whether the model is one of the size and family that the paper's claims are about."""
    path = str(run.config["model"].get("name_or_path") or "").rstrip("/").lower()
    named = run.model.startswith("llama2_7b") or path.rpartition("/")[2].startswith("llama-2-7b")
    return named and limits(run) is None


def limits(run: Run) -> str | None:
    """Why a verdict from the run's model is of that model alone; None if it is not."""
    count = parameters(run)
    if "hidden_size" in run.config["model"]:
        return "random weights"
    if count is None:
        return "a model of unknown size"
    return f"{count / 1e6:,.0f}M parameters" if count < SMALL else None
