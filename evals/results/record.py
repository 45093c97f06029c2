"""The files of a setting's folder, field by field, and the check of what is read from them.

Fields that are not listed are kept unchecked. A file is checked when it is read, so no later code
meets a field of a wrong type, a NaN, or a record of another format.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

# The format of records. Raise it if a change makes older records unreadable or wrong.
FORMAT = 3

LOOSE = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Options(TypedDict, total=False):
    """A row's options, see :class:`buzz.EvictionCache` and :class:`buzz.Constrained`."""

    __pydantic_config__ = LOOSE

    positions: Required[Literal["cache", "true"]]
    logn_base: Required[float | None]
    logn_clamp: bool
    dtype: Literal["int8"] | None
    granularity: str
    page_score: str
    heads: str


class Record(TypedDict, total=False):
    """One sample under one method: a line of a row's file.

    Attributes:
        format: :data:`FORMAT` when it was written.
        row: the file's name without shard and ending.
        method, label, parameters, budget, budget_by, fixed, cache: the row's, see
            :class:`evals.run.plan.Plan`.
        id: the sample's, unique within the task.
        status: ``ok``, ``oom`` (out of memory) or ``failed``.
        prompt_sha256: hash of the prompt's token ids.
        sample_sha256: hash of all that decides a score: prompt, references, the scoring's version.
        group, unit, meta, references, stop, max_new_tokens: the sample's, see
            :class:`evals.tasks.base.Sample`.
        batch_size: prompts that a method running alone answered together; 1 in a shared pass.
        rows: methods that shared one prefill and were decoded together; 1: it ran alone.
        prefill_chunk: tokens of a chunk, if the prompt was read in chunks.
        policy: the method's parameters, fitted to the prompt; `budget_entries`: its budget.
        environment: key of environments.json.
        process: eight digits that name the process.
        threads: torch's threads on the CPU.
        load: mean number of cores that other processes kept busy meanwhile; None if unknown.
        loaded: whether that disturbed the timings, see `environment.busy`.
        error, asked_nbytes: the reason, and the bytes asked for, of a sample that is not ``ok``.
    """

    __pydantic_config__ = LOOSE

    format: Required[int]
    row: Required[str]
    method: Required[str]
    label: Required[str]
    parameters: Required[dict[str, Any]]
    budget: Required[float | int | None]
    budget_by: Required[Literal["peak", "mean"] | None]
    fixed: list[str]
    cache: Required[Options]
    id: Required[str]
    status: Required[Literal["ok", "oom", "failed"]]
    prompt_sha256: Required[str]
    sample_sha256: Required[str]
    group: str
    unit: str
    meta: dict[str, Any]
    references: list[str]
    stop: list[str]
    max_new_tokens: int
    prompt_tokens: int
    context_tokens: int
    truncated_tokens: int
    chat_template: bool
    batch_size: int
    rows: int
    prefill_chunk: int
    policy: dict[str, Any]
    budget_entries: int | None
    environment: str
    process: str
    threads: int
    load: float | None
    loaded: bool
    error: str
    asked_nbytes: int | None


class Measured(Record, total=False):
    """A record with status ``ok``; units as in :class:`evals.run.generate.Generation`.

    Attributes:
        scores: metrics by name.
        prediction: the answer's text.
        kv_nbytes_mean, kv_nbytes_peak: bytes of keys and values in all layers.
        kv_evicting_nbytes_mean, kv_evicting_nbytes_peak: the same for the layers that evict, which
            a budget governs; only of models with other layers besides.
        timed: whether the method ran alone for this sample, and has timings and memory peaks.
        kl_to_full, kl_median, top1_to_full, kl_tokens: with `kl=true`, see
            :class:`evals.run.forked.Fidelity`.
        reference_sha256: hash of the full cache's answer on which these were measured.
    """

    status: Required[Literal["ok"]]
    group: Required[str]
    references: Required[list[str]]
    prompt_tokens: Required[int]
    batch_size: Required[int]
    scores: Required[dict[str, float]]
    prediction: Required[str]
    generated_tokens: Required[int]
    kv_entries_mean: Required[float]
    kv_entries_peak: Required[float]
    kv_nbytes_mean: Required[float]
    kv_nbytes_peak: Required[float]
    kv_evicting_nbytes_mean: float
    kv_evicting_nbytes_peak: float
    allocated_nbytes: float
    evictions: int
    stop_reason: str
    tokens: list[int]
    trace: list[list[int]]
    blocks: list[float]
    timed: bool
    ttft_s: float
    decode_tokens_per_s: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    memory_peak_nbytes: float
    kl_to_full: float | None
    kl_median: float | None
    top1_to_full: float | None
    kl_tokens: list[float]
    reference_sha256: str


class Asked(TypedDict):
    """prompts.json: the samples that count. Every start of a run writes it.

    Attributes:
        samples: `sample_sha256` by id, in the task's order. A record with another hash is of other
            data; it stays in its file and does not count.
        of: number of samples of the whole task; a shard has a part of them.
        data: hash of all of them; shards with different hashes are of different data.
    """

    __pydantic_config__ = LOOSE

    samples: Annotated[dict[str, str], Field(min_length=1)]
    of: int
    data: str


class Environment(TypedDict, total=False):
    """An entry of environments.json, see :func:`evals.results.environment.environment`."""

    __pydantic_config__ = LOOSE

    device: str
    cpu: str
    threads: int
    cudnn_attention_deprioritized: str
    model_parameters: int
    git_revision: str | None
    template_date: str
    unused_generation_settings: dict[str, Any]
    versions: dict[str, str | None]


class Named(TypedDict):
    """The task or the model of a setting."""

    __pydantic_config__ = LOOSE

    name: str


class Metric(TypedDict):
    """A task's score, see :class:`evals.tasks.base.Task`."""

    __pydantic_config__ = LOOSE

    headline: str
    statistic: Literal["mean", "exp"]
    higher_is_better: bool
    grouped_by: str


class Setting(TypedDict, total=False):
    """setting.yaml: what all rows of the folder share."""

    __pydantic_config__ = LOOSE

    version: Required[int]
    task: Required[Named]
    model: Required[Named]
    metric: Required[Metric]
    seed: Required[int]
    compress: Required[Literal["prompt", "context", "stream"]]
    compress_chunk: int
    task_version: int
    model_digest: str | None


RECORD, MEASURED = TypeAdapter(Record), TypeAdapter(Measured)
CHECKS: dict[str, TypeAdapter[Any]] = {
    "prompts.json": TypeAdapter(Asked),
    "environments.json": TypeAdapter(dict[str, Environment]),
    "setting.yaml": TypeAdapter(Setting),
}


def problem_of(content: Any, name: str) -> str | None:
    """Checks a record, or the content of a file; the first problem in a few words, or None.

    Args:
        name: the file's name; one that is not in CHECKS is a row's, and `content` a record.
    """
    check = CHECKS.get(name)
    if check is None:
        told = content if isinstance(content, dict) else {}
        if told.get("format", FORMAT) != FORMAT:
            return f"written by another version (format {told['format']}, not {FORMAT})"
        check = MEASURED if told.get("status") == "ok" else RECORD
    try:
        check.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return None
