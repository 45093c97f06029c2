"""A sweep's methods and budgets as one job for each setting, so that they can share one pass.

Hydra finds its plugins in packages of this name.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from evals.run.console import command

# Overrides of these make another row of a setting; all others make another setting.
ROW = ("method", "budget", "budget_by", "cache", "label")
# These do so only in timed tasks; in others they, too, make another setting (see Plan.variant).
TIMED = ("model.compile", "task.prefill_chunk", "task.hold")


class OnePassSweeper(BasicSweeper):
    """Hydra's own sweeper, with the jobs of one setting put together.

    `-m method=h2o,buzz budget=0.1,0.25 seed=0,1` is two jobs of four rows. The overrides of each
    row are passed to its job as `rows`, a list of lists.
    """

    @staticmethod
    def split_arguments(
        overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        (every,) = BasicSweeper.split_arguments(overrides, None)
        settings: dict[tuple[str, ...], list[list[str]]] = {}
        for job in every:
            own = [one for one in job if is_row(one)]
            shared = tuple(one for one in job if one not in own)
            settings.setdefault(shared, []).append(own)
        jobs = [[*shared, *of_rows(rows)] for shared, rows in settings.items()]
        command.jobs = len(jobs)  # in this process: workers of a launcher run theirs side by side
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))


# Replaces Hydra's own by name: it is the default, and others (optuna) can still be chosen.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="basic",
    node={
        "_target_": f"{OnePassSweeper.__module__}.{OnePassSweeper.__name__}",
        "max_batch_size": None,
        "params": None,
    },
    provider="buzz-bench",
)


def is_row(override: str) -> bool:
    """Whether an override makes another row, not another setting."""
    key = override.partition("=")[0].lstrip("+~")
    return key in TIMED or key.partition(".")[0].partition("@")[0] in ROW


def of_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """The overrides of a job with these rows; if there is one row, its own."""
    if len(rows) == 1:
        return list(rows[0])
    quoted = (["'" + one.replace("'", "\\'") + "'" for one in row] for row in rows)
    return [f"rows=[{','.join('[' + ','.join(row) + ']' for row in quoted)}]"]
