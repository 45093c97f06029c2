"""The types of a configuration, checked by pydantic without conversion: `no` is not a boolean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, StringConstraints

from buzz.cache import check_clamp, check_dtype, positions_of
from buzz.errors import ConfigError
from buzz.granularity import check as check_granularity
from evals.tasks.build import KNOWN, STRICT, validate

# Names of folders, which must stay inside `output`.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+@-]{1,60}$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Compress = Literal["prompt", "context", "stream"]  # see evals.run.prompts

CHUNK = 512  # default of compress_chunk


class Group(BaseModel):
    model_config = STRICT
    name: Name


class Protocol(Group):
    model_config = KNOWN
    budgets: bool


class Cache(BaseModel):
    model_config = KNOWN
    positions: Literal["cache", "true", True]  # what YAML reads `true` as
    logn_base: Annotated[float, Field(gt=1)] | None
    logn_clamp: bool
    dtype: str | None
    granularity: str
    page_score: str
    heads: str


class Config(BaseModel):
    """What every configuration has; method, task and model check the rest of their sections."""

    model_config = KNOWN
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
    prefill_chunk: PositiveInt | None
    kl: bool
    label: Name | None
    variants: list[list[str]] | None
    rows: list[list[str]] | None
    time_samples: NonNegativeInt
    seed: Seed
    device: Text
    output: Text
    sweep_name: str | None = None
    objectives: list[str] | None = None


def check_config(config: dict[str, Any]) -> None:
    """Raises ConfigError unless a configuration has all of :class:`Config`, and they fit together.

    A `cache.positions` of true, as YAML reads it, becomes the name that it stands for.
    """
    validate(Config, config)
    chunk = config["compress_chunk"]
    if chunk != CHUNK and config["compress"] != "stream":
        raise ConfigError("compress_chunk", chunk, "applies to compress=stream; write that, too")
    if config["budget_by"] == "mean" and config["budget"] is None:
        raise ConfigError("budget_by", "mean", "says what the budget limits; give budget, too")
    config["cache"]["positions"] = positions_of(config["cache"]["positions"])
    check_clamp(config["cache"]["logn_base"], config["cache"]["logn_clamp"])
    check_dtype(config["cache"]["dtype"], config["cache"]["positions"])
    check_granularity(*(config["cache"][name] for name in ("granularity", "page_score", "heads")))
