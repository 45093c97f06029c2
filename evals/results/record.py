"""What the files of a setting's folder hold, field by field, and what is wrong with others.

Fields that are not listed are kept and not looked at. A file is checked where it is read, so that
nothing behind that point meets a field of another type, a NaN, or a record of another format.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

# Of records; raise it with any change after which older ones cannot be read rightly.
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
        row: the file's name, without shard and ending.
        method, label, parameters, budget, budget_by, fixed, cache: what the row is, see
            :class:`evals.run.plan.Plan`.
        id: of the sample, unique within the task.
        status: ``ok``, ``oom`` or ``failed``; `error` says more of the latter two.
        prompt_sha256: names the prompt's token ids; rows with an equal one had the same prompt.
        sample_sha256: names all that decides a record: prompt, references, the scoring's version.
        group, unit, meta, references, stop, max_new_tokens: the sample's, see
            :class:`evals.tasks.base.Sample`.
        batch_size: prompts that the method answered together, running alone; 1 in a pass.
        rows: methods that shared their prefill and were decoded together, whatever the number of
            prompts; 1: it ran alone.
        prefill_chunk: tokens of the chunks in which the prompt was read, if it was.
        policy: the method's parameters as fitted to the prompt; `budget_entries`: its budget.
        environment: names the one of environments.json in which it was measured.
        process: eight digits of the process that measured it.
        threads: torch's, on the CPU.
        load: cores that other processes kept busy meanwhile, on average; None if unknown.
        loaded: whether that was enough to disturb the timings, see `environment.busy`.
        error, asked_nbytes: of a sample that was out of memory or failed.
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
    """A record with status ``ok``; units are those of :class:`evals.run.generate.Generation`.

    Attributes:
        scores: metrics by name.
        prediction: the answer's text.
        kv_nbytes_mean, kv_nbytes_peak: of all layers.
        kv_evicting_nbytes_mean, kv_evicting_nbytes_peak: of the layers that evict, which is what a
            budget governs; there if not all layers do.
        timed: whether the method ran alone for it; then the timings and memory peaks are there too.
        kl_to_full, kl_median, top1_to_full, kl_tokens: with `kl=true`, see
            :class:`evals.run.forked.Fidelity`.
        reference_sha256: names the full cache's answer that both were given for these.
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


class Missed(Record, total=False):
    """A record of a sample that was out of memory or failed."""

    status: Required[Literal["oom", "failed"]]


class Asked(TypedDict):
    """prompts.json, written by every start: what the setting is of, with the data as they are then.

    Attributes:
        samples: in the task's order, each sample's id and the `sample_sha256` that its record must
            have to count. Records beside them are of other data; they stay and do not count.
        of: samples of the whole task, of which a shard has a part.
        data: names them all, so that shards of different data are told apart.
    """

    __pydantic_config__ = LOOSE

    samples: Annotated[dict[str, str], Field(min_length=1)]
    of: int
    data: str


class Environment(TypedDict, total=False):
    """One of environments.json, see :func:`evals.results.environment.environment`."""

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
    """What a task's score is, see :class:`evals.tasks.base.Task`."""

    __pydantic_config__ = LOOSE

    headline: str
    statistic: Literal["mean", "exp"]
    higher_is_better: bool
    grouped_by: str


class Setting(TypedDict, total=False):
    """setting.yaml: what all rows of a folder share."""

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


RECORD: TypeAdapter[Any] = TypeAdapter(Annotated[Measured | Missed, Field(discriminator="status")])
CHECKS: dict[str, TypeAdapter[Any]] = {
    "prompts.json": TypeAdapter(Asked),
    "environments.json": TypeAdapter(dict[str, Environment]),
    "setting.yaml": TypeAdapter(Setting),
}


def problem_of(content: Any, name: str) -> str | None:
    """What is wrong with a record, or with the content of a file, in a few words; None if nothing.

    Args:
        name: the file's; names that are not in CHECKS are those of rows, whose lines are records.
    """
    is_record = name not in CHECKS
    if is_record and isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        return f"written by another version (format {content['format']}, not {FORMAT})"
    try:
        CHECKS.get(name, RECORD).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:] if is_record else first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return None
