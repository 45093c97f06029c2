"""Finished runs by what makes them comparable, beside the full cache's; what to know of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buzz.errors import ConfigError
from evals.results.compare import REFERENCE, compare, differing
from evals.results.equal_memory import MARK, TOLERANCE, is_over
from evals.results.reading import find_references, left_out, put_together, read_run
from evals.results.runs import Run, reference_of
from evals.results.summary import summarize
from evals.tasks.base import Task
from evals.tasks.build import build, check_fields

Summary = dict[str, Any]


def summary_of(run: Run) -> Summary:
    """What a run comes to, as in its summary.json, made anew from the records that count.

    Raises:
        ConfigError: its task is not there any more, or reads what the records do not have.
    """
    task: Task = build("task", run.config["task"], Task)
    check_fields("task", task)
    try:
        return summarize(run.config, task, run.records, run.stale)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        problem = f"records lack what task={run.task} makes of them ({error!r}); run it again"
        raise ConfigError("run", str(run.folders[0]), problem) from error


@dataclass(frozen=True)
class Setting:
    """Runs whose scores may be compared, and the full-cache runs that they are compared with.

    Attributes:
        rows: what the runs come to.
        full: the full-cache runs, of these or else of those in the same folder, with their rows.
    """

    runs: list[Run]
    rows: list[Summary]
    full: list[tuple[Run, Summary]]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> list[Setting]:
        """The finished runs by setting, both in the order given."""
        return cls.and_others(folders)[0]

    @classmethod
    def and_others(cls, folders: Sequence[Path]) -> tuple[list[Setting], list[Run]]:
        """The finished runs by setting, and the runs that cannot be shown."""
        settings: dict[str, list[tuple[Run, Summary]]] = {}
        runs = put_together([read_run(folder) for folder in dict.fromkeys(folders)])
        shown, others = _summarized([run for run in runs if run.finished])
        for run, row in shown:
            settings.setdefault(run.setting, []).append((run, row))
        found = []
        for pairs in settings.values():
            own = [(run, row) for run, row in pairs if run.is_reference and run.scored]
            full = own or _summarized(_earlier(pairs[0][0]))[0]
            found.append(cls([run for run, _ in pairs], [row for _, row in pairs], full))
        return found, [run for run in runs if not run.finished] + others

    @property
    def reference(self) -> Run | None:
        return self.full[0][0] if self.full else None

    def beside(self, run: Run) -> tuple[Summary | None, Summary | None]:
        """The full cache's row; and the same if it ran on the run's machine, for its timings."""
        full = reference_of(run, [one for one, _ in self.full])
        row = next((row for one, row in self.full if one is full), None)
        return row, row if full and full.machine == run.machine else None

    @property
    def names(self) -> list[str]:
        """The rows' methods, with the settings that tell those of one method apart."""
        known = [
            {"budget": row["budget"], "budget_by": row.get("budget_by")}
            | run.parameters
            | {"fixed": "+".join(run.fixed) or "none", "machine": run.machine}
            for row, run in zip(self.rows, self.runs, strict=True)
        ]
        names = []
        for row, own in zip(self.rows, known, strict=True):
            pairs = zip(self.rows, known, strict=True)
            alike = [other for r, other in pairs if r["method"] == row["method"]]
            varying = [key for key in own if any(other.get(key) != own[key] for other in alike)]
            names.append(" ".join([row["method"], *(f"{key}={own[key]}" for key in varying)]))
        return names

    def against_full(self) -> list[dict[str, Any] | None]:
        """Per run, its comparison with the full cache; None for the full cache itself."""
        if self.reference is None:
            return [None] * len(self.rows)
        full = self.reference.by_id
        return [
            None
            if run.is_reference
            else compare(run.by_id, full, row, {one["id"]: one for one in run.fidelity})
            for run, row in zip(self.runs, self.rows, strict=True)
        ]

    def notes(self) -> list[str]:
        """What a reader should know before comparing the rows."""
        rows = dict(zip(self.names, self.rows, strict=True))
        if self.reference and not any(run is self.reference for run in self.runs):
            rows[f"earlier {REFERENCE}"] = self.full[0][1]
        task = self.rows[0]["task"]
        notes = [
            f"{task}: rows differ in {condition}: {'; '.join(values)}"
            for condition, values in differing(rows).items()
        ]
        for name, row in zip(self.names, self.rows, strict=True):
            if is_over(row.get("budget_held")):
                notes.append(
                    f"{MARK} {task}: {name} holds {row['budget_held']:.2f}x its budget"
                    f" ({row['budget_by']}): not at equal memory"
                )
        for budget, by in dict.fromkeys((row["budget"], row.get("budget_by")) for row in self.rows):
            held = [
                row["kv_entries_mean"] if budget is None else row.get("budget_held")
                for row in self.rows
                if (row["budget"], row.get("budget_by")) == (budget, by)
                and row["method"] != REFERENCE
                and row["n"]
            ]
            known = [share for share in held if share]
            if known and max(known) > (1 + TOLERANCE) * min(known):
                given = "no budget" if budget is None else f"budget={budget} ({by})"
                ratio = max(known) / min(known)
                notes.append(f"{task}: rows of {given} hold up to {ratio:.2f}x as much as others")
        for name, run in zip(self.names, self.runs, strict=True):
            notes += [f"{task}, {name}: {note}" for note in run.notes]
        return notes


def _summarized(runs: Iterable[Run]) -> tuple[list[tuple[Run, Summary]], list[Run]]:
    """Runs with what they come to; and those that come to nothing."""
    found, others = [], []
    for run in runs:
        try:
            found.append((run, summary_of(run)))
        except ConfigError as error:
            others.append(left_out(run, str(error)))
    return found, others


def _earlier(run: Run) -> list[Run]:
    """The full-cache runs of a run's setting that lie in the same folder."""
    found, _ = find_references(run.setting, run.folders[0].resolve().parent.iterdir())
    return [full for full in put_together(found) if full.scored]
