"""Claims, what was measured of them, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evals.report.marks import PAPERS_MODEL
from evals.results.runs import Run
from evals.results.statistics import Interval

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided at this n", "not run"
UNEQUAL = "not at equal memory"
ELSEWHERE = f"not run on {PAPERS_MODEL}"
PROCESSES = 5  # that a verdict on speed needs
LEAST_N = 30  # samples that one on scores needs


@dataclass(frozen=True)
class Measurement:
    """One number with its 95% interval.

    Attributes:
        n: samples behind it.
        of: the runs it compares, in words.
        condition: the verdict on something that the claim takes for granted; "holds" if nothing.
        memory: where the claim is about equal memory and it is not equal, the ratios.
        processes: of timings, how many independent processes they come from.
        limits: why it speaks for its model alone; None if it does not.
        papers_model: whether the model is the one that the paper's claims are about.
    """

    value: float | None
    interval: Interval
    n: int
    model: str
    machine: str
    of: str
    condition: str = HOLDS
    memory: tuple[float, ...] = ()
    processes: int | None = None
    limits: str | None = None
    papers_model: bool = True


@dataclass(frozen=True)
class Claim:
    """A statement that runs can confirm or refute.

    Attributes:
        unit: what the number is.
        bar: the least value (`at_least`) or the largest for which the statement is true.
        least_n: samples below which nothing is decided.
        of_papers_model: whether it is a statement about that model.
        top: of a range that begins at the bar, the end; a verdict says where the number is.
    """

    statement: str
    unit: str
    bar: float
    source: str
    measure: Callable[[Sequence[Run]], Iterator[Measurement]]
    at_least: bool = True
    least_n: int = LEAST_N
    of_papers_model: bool = False
    top: float | None = None

    @property
    def bar_text(self) -> str:
        if self.top is not None:
            return f"{self.bar:g} to {self.top:g}"
        return f"{'≥' if self.at_least else '≤'} {self.bar:g}"


def verdict(
    interval: Interval, bar: float, at_least: bool, n: int, least_n: int, condition: str = HOLDS
) -> str:
    """What an interval says about a statement.

    It holds if the whole interval is on the right side of the bar (which belongs to that side) and
    its condition holds; it does not if the whole interval is on the wrong side, or its condition
    does not hold; everything else is undecided.

    >>> verdict((0.991, 1.02), 0.99, True, 200, 30)
    'holds'
    >>> verdict((0.97, 1.02), 0.99, True, 200, 30)
    'undecided at this n'
    """
    if n < least_n or interval is None:
        return UNDECIDED
    low, high = interval if at_least else (-interval[1], -interval[0])
    limit = bar if at_least else -bar
    if high < limit or condition == FAILS:
        return FAILS
    return HOLDS if low >= limit and condition == HOLDS else UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim with one measurement, or with none if it was not run."""

    claim: Claim
    measured: Measurement | None

    @property
    def kind(self) -> str:
        """HOLDS, FAILS, UNDECIDED, UNEQUAL, NOT_RUN, or ELSEWHERE: a claim about another model."""
        if self.measured is None:
            return NOT_RUN
        m = self.measured
        return ELSEWHERE if self.claim.of_papers_model and m.limits else self._found[0]

    @property
    def verdict(self) -> str:
        """The kind, with what limits or explains it."""
        if self.measured is None:
            return NOT_RUN
        m, (_, text) = self.measured, self._found
        if m.limits is None:
            other = self.claim.of_papers_model and not m.papers_model
            return f"{text}, on {m.model}" if other else text
        where = f"{m.model} ({m.limits})"
        if self.claim.of_papers_model:
            return f"{ELSEWHERE}; on {where}: {text}"
        return f"{text}, for {where} alone"

    @property
    def _found(self) -> tuple[str, str]:
        """What the number says of its own model: kind and text."""
        m, c = self.measured, self.claim
        assert m is not None
        if m.memory:
            ends = dict.fromkeys(f"{end:.2f}x" for end in (min(m.memory), max(m.memory)))
            return UNEQUAL, f"{UNEQUAL}: {' to '.join(ends)}"
        if m.processes is not None and m.processes < PROCESSES:
            return UNDECIDED, f"undecided: needs {PROCESSES} processes, has {m.processes}"
        kind = verdict(m.interval, c.bar, c.at_least, m.n, c.least_n, m.condition)
        if kind != HOLDS or c.top is None or m.interval is None:
            return kind, kind
        low, high = m.interval
        where = "within" if high <= c.top else "above" if low > c.top else "within or above"
        return kind, f"{kind}, {where} {c.bar_text}"
