"""The types of a configuration, checked by pydantic without any conversion: `no` is no boolean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, StringConstraints

from buzz.cache import positions_of
from evals.run.compress import Compress
from evals.tasks.build import STRICT, validate

# Run folders are named by these, and must stay inside `output`.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+@-]{1,60}$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Group(BaseModel):
    model_config = STRICT
    name: Name


class Protocol(Group):
    budgets: bool


class Cache(BaseModel):
    model_config = STRICT
    positions: Literal["cache", "true", True]  # what YAML reads `true` as
    logn_base: Annotated[float, Field(gt=1)] | None
    logn_clamp: bool


class Config(BaseModel):
    """What every configuration has; method, task and model check the rest of their sections."""

    model_config = STRICT
    method: Group
    task: Group
    model: Group
    logger: Group
    protocol: Protocol
    cache: Cache
    budget: Any  # see buzz.Budget, which checks both
    budget_by: Literal["peak", "mean"]
    compress: Compress
    compress_chunk: PositiveInt
    kl: bool
    seed: Seed
    device: Text
    output: Text
    sweep_name: str | None = None
    objectives: list[str] | None = None


def check_config(config: dict[str, Any]) -> None:
    """Raises ConfigError unless a configuration has all of :class:`Config`.

    `cache.positions` is written as the name that it stands for, so that equal ones are equal.
    """
    validate(Config, config)
    config["cache"]["positions"] = positions_of(config["cache"]["positions"])
