"""What the files of a run's folder hold, field by field, and what is wrong with one that does not.

Fields that are not listed are kept and not looked at. A file is checked where it is read, so that
nothing behind that point meets a field of another type, a NaN, or a record of another format.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

# Of records and summaries; raise it with any change after which older ones cannot be read rightly.
FORMAT = 2

LOOSE = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Record(TypedDict, total=False):
    """One line of samples.jsonl.

    Attributes:
        format: :data:`FORMAT` when it was written.
        id: of the sample, unique within the task.
        status: ``ok``, ``oom`` or ``failed``; `error` says more of the latter two.
        prompt_sha256: names the prompt's token ids. Records of two runs are of the same prompt if
            it is equal.
        sample_sha256: names all that decides a record: prompt, references, the scoring's version.
        group, unit, meta, references, stop, max_new_tokens: the sample's, see
            :class:`evals.tasks.base.Sample`.
        environment: names the one of environment.json in which it was measured.
        process: eight digits of the process that measured it.
        threads: torch's, on the CPU.
        load: cores that other processes kept busy meanwhile, on average; None if unknown.
        loaded: whether that was enough to disturb the timings, see `environment.busy`.
        scores: metrics by name.
        prediction: the answer's text.
    """

    __pydantic_config__ = LOOSE

    format: Required[int]
    id: Required[str]
    status: Required[Literal["ok", "oom", "failed"]]
    prompt_sha256: Required[str]
    sample_sha256: str
    group: str
    unit: str
    meta: dict[str, Any]
    references: list[str]
    stop: list[str]
    max_new_tokens: int
    prompt_tokens: int
    truncated_tokens: int
    chat_template: bool
    batch_size: int
    policy: dict[str, Any]
    environment: str
    process: str
    threads: int
    load: float | None
    loaded: bool
    error: str
    asked_nbytes: int | None


class Measured(Record, total=False):
    """A record with status ``ok``; units are those of :class:`evals.run.generate.Generation`."""

    status: Required[Literal["ok"]]
    group: Required[str]
    references: Required[list[str]]
    prompt_tokens: Required[int]
    batch_size: Required[int]
    scores: Required[dict[str, float]]
    prediction: Required[str]
    generated_tokens: Required[int]
    ttft_s: Required[float]
    decode_tokens_per_s: Required[float | None]
    itl_p50_ms: Required[float | None]
    kv_nbytes_mean: Required[float]
    kv_nbytes_peak: Required[float]
    memory_peak_nbytes: Required[float]
    itl_p95_ms: float | None
    kv_entries_mean: float
    kv_entries_peak: float
    allocated_nbytes: float
    budget_entries: int | None
    evictions: int
    stop_reason: str
    tokens: list[int]
    trace: list[list[int]]
    blocks: list[float]


class Missed(Record, total=False):
    """A record of a sample that was out of memory or failed."""

    status: Required[Literal["oom", "failed"]]


class Comparison(TypedDict, total=False):
    """One line of fidelity.jsonl, see :class:`evals.run.forced.Fidelity`.

    Attributes:
        answer_sha256: names the full cache's answer that both were given.
    """

    __pydantic_config__ = LOOSE

    id: Required[str]
    kl_to_full: Required[float | None]
    top1_to_full: float | None
    answer_sha256: str
    status: str
    error: str


class Asked(TypedDict):
    """prompts.json, written by every start: what the run is of, with the data as they are then.

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


class Summary(TypedDict, total=False):
    """summary.json of a finished run, see :func:`evals.results.summary.summarize`."""

    __pydantic_config__ = LOOSE

    status: Required[Literal["complete"]]
    headline: Required[str]
    statistic: Required[Literal["mean", "exp"]]
    higher_is_better: Required[bool]
    format: int
    setting: str
    method: str
    n: int
    failed: int


class Unfinished(TypedDict, total=False):
    """summary.json of a run that was interrupted, or failed as a whole."""

    __pydantic_config__ = LOOSE

    status: Required[Literal["interrupted", "failed"]]
    error: Required[str]


class Environment(TypedDict, total=False):
    """One of environment.json, see :func:`evals.results.environment.environment`."""

    __pydantic_config__ = LOOSE

    device: str
    cpu: str
    threads: int
    model_parameters: int
    git_revision: str | None
    versions: dict[str, str | None]


class Named(TypedDict):
    """A section of config.yaml."""

    __pydantic_config__ = LOOSE

    name: str


class OfTask(Named, total=False):
    shard: Annotated[str, StringConstraints(pattern=r"^\d+/[1-9]\d*$")] | None


class Attention(TypedDict):
    __pydantic_config__ = LOOSE

    logn_base: float | None


class Configuration(TypedDict, total=False):
    """config.yaml, as far as tables depend on it."""

    __pydantic_config__ = LOOSE

    method: Required[Named]
    task: Required[OfTask]
    model: Required[Named]
    cache: Required[Attention]
    seed: Required[int]
    budget: Required[float | int | None]
    budget_by: Literal["peak", "mean"]
    compress: Literal["prompt", "context", "stream"]
    compress_chunk: int
    fixed: list[str]
    task_version: int
    model_digest: str | None
    protocol: Named


CHECKS: dict[str, TypeAdapter[Any]] = {
    "samples.jsonl": TypeAdapter(Annotated[Measured | Missed, Field(discriminator="status")]),
    "fidelity.jsonl": TypeAdapter(Comparison),
    "prompts.json": TypeAdapter(Asked),
    "summary.json": TypeAdapter(Annotated[Summary | Unfinished, Field(discriminator="status")]),
    "environment.json": TypeAdapter(Environment | list[Environment]),
    "config.yaml": TypeAdapter(Configuration),
}


def problem_of(content: Any, name: str) -> str | None:
    """What is wrong with a record of a file, or with its content, in a few words; None if nothing.

    Args:
        name: the file's; of other files nothing is known but that their lines have an id.
    """
    is_record = name == "samples.jsonl" and isinstance(content, dict) and "id" in content
    if is_record and content.get("format") != FORMAT:
        return f"written by another version (format {content.get('format', 1)}, not {FORMAT})"
    try:
        if name in CHECKS:
            CHECKS[name].validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        by_status = name in ("samples.jsonl", "summary.json")
        where = ".".join(map(str, first["loc"][1:] if by_status else first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return None
