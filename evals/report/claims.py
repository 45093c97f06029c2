"""What the paper promises and what reviewers doubt, claim by claim, against the runs.

A claim is a statement about one number, a bar, and the least number of samples that may decide it.
Verdicts come from the 95% interval alone, see :func:`evals.report.verdicts.verdict`. Of a swept
method only runs with the paper's own parameters are judged (a budget may have changed window and
threshold): picking the best of a sweep would not be a test.
"""

from __future__ import annotations

from collections.abc import Sequence

from evals.report.quality import (
    BEYOND,
    MEMORY,
    QUALITY,
    better_than_others,
    beyond_32k,
    documents,
    memory_saved,
    quality_kept,
    sensitivity,
    spread_facts,
)
from evals.report.speed import faster_at_32k, growth, latency_alone, throughput_in_batches
from evals.report.verdicts import Claim, Judged
from evals.results.runs import Run

PAPER = "arXiv 2410.23079, abstract"
EXPECTED = "an expectation of this project, not a published number"
LIMIT = "a limit that reviewers name"
OVER_FULL = "score / full cache's"
SPEED = "tokens per second / full cache's"


def judge(runs: Sequence[Run]) -> list[Judged]:
    """Every claim with every measurement that bears on it."""
    judged = []
    for claim in CLAIMS:
        measured = list(claim.measure(runs))
        judged += [Judged(claim, m) for m in measured] or [Judged(claim, None)]
    return judged


def _sensitivity(parameter: str) -> Claim:
    return Claim(
        f"The score depends little on the {parameter}: best less worst within 10% of the full"
        " cache's",
        "range of scores / full cache's score",
        0.1,
        LIMIT,
        sensitivity(parameter),
        at_least=False,
    )


CLAIMS = (
    Claim(
        "At 2.5x less KV memory, long-text summaries keep 99% of the full cache's quality",
        OVER_FULL,
        QUALITY,
        PAPER,
        quality_kept,
        of_papers_model=True,
    ),
    Claim(
        "KV memory shrinks 2.5x at 99% of the full cache's quality",
        "full cache's allocated KV bytes / BUZZ's",
        MEMORY,
        PAPER,
        memory_saved,
        of_papers_model=True,
    ),
    Claim(
        "10-QA: 7.69% over the best other method at equal memory, read as points of the score",
        "points over the other's score",
        7.69,
        f"{PAPER}: a percentage that does not say of what",
        better_than_others(relative=False),
        of_papers_model=True,
    ),
    Claim(
        "10-QA: 7.69% over the best other method at equal memory, read as a share of its score",
        "% of the other's score",
        7.69,
        f"{PAPER}: a percentage that does not say of what; 1/13, one right answer more than 13",
        better_than_others(relative=True),
        of_papers_model=True,
    ),
    Claim(
        "Questions over several documents are answered with 99% of the full cache's quality",
        OVER_FULL,
        QUALITY,
        EXPECTED,
        documents,
    ),
    Claim(
        f"Beyond 32K tokens (prompts of more than {BEYOND:,}) 99% of the full cache's quality is"
        " kept",
        OVER_FULL,
        QUALITY,
        LIMIT,
        beyond_32k,
    ),
    Claim(
        "Important facts spread widely over the prompt are found as with the full cache",
        OVER_FULL,
        QUALITY,
        LIMIT,
        spread_facts,
    ),
    *map(_sensitivity, ("window", "sink", "threshold", "stride")),
    Claim(
        "Decoding is 1.3x to 1.5x faster at 32K tokens",
        SPEED,
        1.3,
        EXPECTED,
        faster_at_32k,
        least_n=5,
        top=1.5,
    ),
    Claim(
        "Decoding in batches is no slower than with the full cache in batches of the same size",
        SPEED,
        1.0,
        LIMIT,
        throughput_in_batches,
        least_n=5,
    ),
    Claim(
        "Work that is not parallel (batch of 1, prompts below 4K) is not slowed down",
        "time per token / full cache's",
        1.0,
        LIMIT,
        latency_alone,
        at_least=False,
        least_n=5,
    ),
    Claim(
        "Time per token grows with the prompt no faster than log n",
        "growth / growth of log n",
        1.0,
        f"{PAPER}: cache maintenance in log n; measured on whole decoding steps",
        growth,
        at_least=False,
        least_n=10,
        of_papers_model=True,
    ),
)
