"""From a configuration to records: check, load, generate, score, record, summarize."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Policy
from buzz.errors import ConfigError
from evals.results.compare import compare
from evals.results.environment import Neighbours, busy, environment, process
from evals.results.records import (
    FIDELITY,
    RunFailed,
    RunFolder,
    arithmetic_runs,
    digest,
    sha256,
    writing,
)
from evals.results.runs import Run
from evals.results.schema import FORMAT, Record
from evals.results.statistics import mean
from evals.results.summary import summarize
from evals.run.faults import LengthMismatch, attempt
from evals.run.forced import Fidelity, compare_with_full, read
from evals.run.generate import Generation, generate
from evals.run.interrupt import deferred_signals
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand
from evals.run.prompts import Asked, Prompt, batches, load_prompts
from evals.run.questions import answer
from evals.run.sampling import Sampling
from evals.tasks.base import StreamTask

console = Console(stderr=True)


def run(cfg: DictConfig, fixed: Iterable[str] = ()) -> Path:
    """Runs what is still missing of a configured run.

    Args:
        cfg: the composed configuration.
        fixed: names of the method's parameters that the user set, which a budget leaves alone.

    Returns:
        The run's folder.

    Raises:
        ConfigError: a setting cannot be served.
        RunFailed: the cache did not do what the method says, no sample could be run, or nothing
            can be written. A sample that fails beside others that don't is only recorded.
        Interrupted: by a signal, after the sample in flight.
    """
    return _execute(Plan.of(cfg, fixed))


def run_all(cfg: DictConfig, fixed: Iterable[str] = ()) -> list[Path]:
    """As :func:`run`, for every task of a suite; all are checked before the first one runs."""
    fixed = frozenset(fixed)
    return [_execute(plan) for plan in [Plan.of(one, fixed) for one in expand(cfg)]]


@dataclass
class Work:
    """A run under way: what its steps (prompts, answers, comparison, summary) hand on.

    Attributes:
        records: by sample id, those that are not of this run's data among them.
        done: ids of the samples that need not run again.
    """

    plan: Plan
    folder: RunFolder
    asked: Asked
    records: dict[str, Record]
    done: set[str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def prompts(self) -> list[Prompt]:
        return self.asked.prompts

    @property
    def ordered(self) -> list[Record]:
        """The records that are there, in the order of their prompts."""
        names = (prompt.sample.id for prompt in self.prompts)
        return [self.records[name] for name in names if name in self.records]

    @property
    def stale(self) -> int:
        """Records of other data."""
        return len(self.records.keys() - {prompt.sample.id for prompt in self.prompts})

    def summary(self) -> dict[str, Any]:
        return summarize(self.plan.config, self.plan.task, self.ordered, self.stale)


def _execute(plan: Plan) -> Path:
    folder = RunFolder(plan.folder)
    with folder.lock():
        work = _begin(plan, folder)
        rescored = _rescore(work)
        if work.stale:
            _say(f"{folder.path}: {work.stale} more records are of other data and do not count")
        before = len(work.done)
        full = _make(work)
        summary = _sum_up(work, full)
        if rescored or before < len(work.prompts):
            plan.logger.log(folder.path, plan.config, work.ordered, summary)
    return folder.path


def _begin(plan: Plan, folder: RunFolder) -> Work:
    """What is asked for and what of it is there, before anything is written."""
    records = folder.read()
    folder.read(FIDELITY), folder.environments()  # refuse now what could not be added to
    torch.manual_seed(plan.config["seed"])
    asked = load_prompts(plan, _tokenizer(plan))
    lengths = [prompt.context for prompt in asked.prompts]
    for tokens in (min(lengths), max(lengths)):
        plan.fit(tokens)  # refuse a budget that cannot be met now, not later
    model, tokenizer = _load(plan)
    done = _finished(folder, records, asked.prompts)
    if done:
        _say(f"{folder.path}: {len(done)} of {len(asked.prompts)} samples are there already")
    folder.write("config.yaml", OmegaConf.to_yaml(plan.config))
    folder.write("prompts.json", asked.stored())
    return Work(plan, folder, asked, records, done, model, tokenizer)


def _make(work: Work) -> Run | None:
    """Answers, and their comparison with those of the full cache, whose run is returned."""
    try:
        with deferred_signals() as stop_here:
            _generate(work, stop_here)
            full = _reference(work.plan)
            if full and work.plan.compares:
                _compare(work, full.by_id, stop_here)
            return full
    except LengthMismatch as error:
        work.folder.write("summary.json", {"status": "failed", "error": str(error)})
        raise RunFailed(str(error)) from error
    except KeyboardInterrupt:
        there = f"{len(work.ordered)} of {len(work.prompts)} samples"
        unfinished = {"status": "interrupted", "error": f"interrupted after {there}; run it again"}
        work.folder.write("summary.json", work.summary() | unfinished)
        raise


def _sum_up(work: Work, full: Run | None) -> dict[str, Any]:
    """Writes the summary, and the task's picture."""
    folder, records = work.folder, work.ordered
    _report_failed(folder, records)
    summary = work.summary()
    if full:
        own = {record["id"]: record for record in records}
        fidelity = {id: one for id, one in folder.read(FIDELITY).items() if id in own}
        summary["against_full"] = compare(own, full.by_id, summary, fidelity)
        summary["failed"] += _name_failed("comparison of", fidelity.values())
    folder.write("summary.json", summary)
    with writing(folder.path):
        work.plan.task.draw([r for r in records if r["status"] == "ok"], folder.path)
    return summary


def _report_failed(folder: RunFolder, records: list[Record]) -> None:
    """Names the samples that failed.

    Raises:
        RunFailed: all of them did.
    """
    if _name_failed("sample", records) == len(records):
        error = f"all {len(records)} samples failed, the first with {records[0]['error']}"
        folder.write("summary.json", {"status": "failed", "error": error})
        raise RunFailed(error)


def _name_failed(what: str, records: Iterable[Record]) -> int:
    """Prints a line for each record of a failure; how many there are."""
    failed = [record for record in records if record.get("status") == "failed"]
    for record in failed:
        _say(f"{what} {record['id']} failed: {record['error']}")
    return len(failed)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _reference(plan: Plan) -> Run | None:
    """The full-cache run to compare with; names what lies beside it and cannot be read."""
    full, unreadable = plan.reference()
    for folder in unreadable:
        _say(f"left out: {folder}")
    return full


_loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


def _load(plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, kept for the next run of this process as long as that wants the same."""
    if _key(plan) not in _loaded:
        _loaded.clear()
        _loaded[_key(plan)] = load_model(plan.config["model"], plan.config["device"])
    return _loaded[_key(plan)]


def _tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer alone: what is wrong with prompts shows before a model is loaded."""
    known = _loaded.get(_key(plan))
    return known[1] if known else load_tokenizer(plan.config["model"])


def _key(plan: Plan) -> str:
    return digest([plan.config[name] for name in ("model", "model_digest", "device")])


def _finished(folder: RunFolder, records: dict[str, Record], prompts: list[Prompt]) -> set[str]:
    """Ids of the samples that need not run again."""
    done = set()
    for prompt in prompts:
        record = records.get(prompt.sample.id)
        if record is None or record["status"] == "failed":
            continue
        if any(record.get(key) != value for key, value in prompt.question.items()):
            raise ConfigError(
                "output",
                str(folder.path),
                f"sample {prompt.sample.id} had another prompt then; give another output, or"
                " remove the folder",
            )
        done.add(prompt.sample.id)
    return done


def _rescore(work: Work) -> int:
    """Scores answers again whose references, or the version of what scores them, were changed.

    Losses of a text that was read are not on file: it is read again.

    Returns:
        How many it scored.
    """
    count = 0
    for prompt in work.prompts:
        record = work.records.get(prompt.sample.id, {})
        if prompt.sample.id not in work.done or record.get("sample_sha256") == prompt.sample_sha256:
            continue
        if isinstance(work.plan.task, StreamTask):
            work.done.remove(prompt.sample.id)
            continue
        record = record | _identity(prompt)
        if record["status"] == "ok":
            try:
                record["scores"] = _finite(work.plan.task.score_record(prompt.sample, record))
            except Exception:  # it is run again, and recorded as what it then is
                work.done.remove(prompt.sample.id)
                continue
        work.folder.append(record)
        work.records[record["id"]] = record
        count += 1
    if count:
        _say(
            f"{work.folder.path}: {count} answers scored again, their references or metrics are"
            " others"
        )
    return count


def _generate(work: Work, stop_here: Callable[[], None]) -> None:
    if len(work.done) == len(work.prompts):
        return
    # What runs once per process (kernels, allocator pools) must not count in the first sample.
    # Should it fail, the first sample will and is recorded.
    with suppress(Exception):
        first, options = [work.prompts[0].ids[:32]], work.plan.config["cache"]
        generate(work.model, work.tokenizer, first, work.plan.policy, 2, (), options)
    parameters = sum(weights.numel() for weights in work.model.parameters())
    now = environment(str(work.model.device), work.plan.config["seed"], parameters)
    made = {"environment": work.folder.note(now), "process": process()}
    neighbours = Neighbours()
    headline = work.plan.task.headline
    columns = (
        TextColumn(f"{work.plan.config['method']['name']:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(work.prompts), completed=len(work.done), status="")
        for batch in batches(work.prompts, work.plan.task.batch_size):
            if all(prompt.sample.id in work.done for prompt in batch):
                continue
            found = _run_batch(work, batch)
            conditions = made | _load_of(neighbours, work.model.device)
            for record in found:
                if record["id"] not in work.done:
                    work.folder.append(record | conditions)
                    work.records[record["id"]] = record | conditions
                    progress.advance(bar)
            stop_here()
            ran = [record for record in work.ordered if record["status"] == "ok"]
            if ran:
                score = statistics.fmean(record["scores"][headline] for record in ran)
                speed = mean(record["decode_tokens_per_s"] for record in ran) or 0
                progress.update(bar, status=f"{headline} {score:.3g}  {speed:.1f} tok/s")


def _load_of(neighbours: Neighbours, device: torch.device) -> Record:
    """How busy the machine was with other things while a batch ran."""
    threads, load = torch.get_num_threads(), neighbours.load()
    needed = threads if device.type == "cpu" else 1
    loaded = busy(load, needed, psutil.cpu_count() or 1)
    return {"threads": threads, "load": load, "loaded": loaded}


def _run_batch(work: Work, batch: list[Prompt]) -> list[Record]:
    """The batch's records. Rows that are run again in a smaller one keep the batch's budget."""
    policy, entries = work.plan.fit(min(prompt.context for prompt in batch))
    frame = {
        "policy": dataclasses.asdict(policy),
        "budget_entries": entries,
        "budget_by": None if entries is None else work.plan.config["budget_by"],
        "batch_size": 1,  # of a row that fails: see attempt()
    }

    def results(rows: list[Prompt]) -> list[Record]:
        if isinstance(work.plan.task, StreamTask):
            found = [_read(work, work.plan.task, prompt, policy) for prompt in rows]
        else:
            found = _answer(work, rows, policy, batch)
        return [{"batch_size": len(rows), "status": "ok"} | one for one in found]

    try:
        found = attempt(batch, results, work.model.device)
    except LengthMismatch as error:
        failed = {"batch_size": len(batch), "status": "failed", "error": str(error)}
        for prompt in batch:
            work.folder.append(_identity(prompt) | frame | failed)
        raise
    return [_identity(p) | frame | result for p, result in zip(batch, found, strict=True)]


def _answer(work: Work, batch: list[Prompt], policy: Policy, context: list[Prompt]) -> list[Record]:
    """Records of a batch's answers. Of a conversation all in its `context` are given again."""
    task, options = work.plan.task, work.plan.config["cache"]
    if batch[0].sample.shared:
        asked = context if task.conversation else batch
        found = answer(work.model, work.tokenizer, asked, policy, options, task.conversation)
        generations = [found[asked.index(prompt)] for prompt in batch]
    else:
        sampled = task.sampling([prompt.sample for prompt in batch])
        generations = generate(
            work.model,
            work.tokenizer,
            [prompt.ids for prompt in batch],
            policy,
            batch[0].max_new_tokens,
            batch[0].sample.stop,
            options,
            batch[0].later,
            **({} if sampled is None else {"sampling": Sampling(*sampled)}),
        )
    measured = [_measurements(generation) for generation in generations]
    return [
        {"scores": _finite(work.plan.task.score_record(prompt.sample, record))} | record
        for prompt, record in zip(batch, measured, strict=True)
    ]


def _read(work: Work, task: StreamTask, prompt: Prompt, policy: Policy) -> Record:
    options, starts = work.plan.config["cache"], prompt.sample.starts
    measured, losses = read(work.model, prompt.ids, policy, task.chunk, options, starts)
    blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
    scores = _finite(task.score_losses(prompt.sample, losses))
    return {"scores": scores, "blocks": blocks} | _measurements(measured)


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """The scores, none of which may be NaN or infinite."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ArithmeticError(f"the score {name} is {value}")
    return scores


def _compare(work: Work, full: Mapping[str, Record], stop_here: Callable[[], None]) -> None:
    """Teacher-forces the method over the full run's answers, as far as that was not done before."""
    before = work.folder.read(FIDELITY)

    def theirs(prompt: Prompt) -> list[int] | None:
        """The full cache's answer, if there is something left to compare it for."""
        own, other = work.records[prompt.sample.id], full.get(prompt.sample.id, {})
        if own["status"] != "ok" or other.get("prompt_sha256") != own["prompt_sha256"]:
            return None
        tokens = other.get("tokens")
        earlier = before.get(prompt.sample.id, {})
        done = earlier.get("answer_sha256") == sha256(tokens) and "status" not in earlier
        return None if done else tokens

    def results(rows: list[Prompt]) -> list[Record]:
        policy = dataclasses.replace(work.plan.policy, **work.records[rows[0].sample.id]["policy"])
        ids, answers = [prompt.ids for prompt in rows], [theirs(prompt) or [] for prompt in rows]
        pad, options = work.tokenizer.pad_token_id, work.plan.config["cache"]
        later = rows[0].later
        found = compare_with_full(work.model, ids, answers, policy, pad, options, later)
        return [dataclasses.asdict(one) for one in found]

    todo = [
        [prompt for prompt in part if theirs(prompt)]
        for batch in batches(work.prompts, work.plan.task.batch_size)
        for part in ([[one] for one in batch] if batch[0].sample.shared else [batch])
    ]
    unknown = dataclasses.asdict(Fidelity(None, None))
    for batch in track(
        [batch for batch in todo if batch], "KL to full", console=console, transient=True
    ):
        for prompt, result in zip(batch, attempt(batch, results, work.model.device), strict=True):
            identity = {"id": prompt.sample.id, "answer_sha256": sha256(theirs(prompt))}
            work.folder.append(identity | unknown | result, FIDELITY)
        stop_here()


def _identity(prompt: Prompt) -> Record:
    sample = prompt.sample
    return {
        "format": FORMAT,
        "id": sample.id,
        "group": sample.group,
        "unit": sample.unit,
        "meta": sample.meta,
        "references": list(sample.references),
        **prompt.question,
        "sample_sha256": prompt.sample_sha256,
        "prompt_tokens": len(prompt.ids),
        "truncated_tokens": prompt.truncated,
        "chat_template": prompt.chat,
        **({"context_tokens": prompt.context} if prompt.before else {}),
    }


def _measurements(generation: Generation) -> Record:
    record = dataclasses.asdict(generation)
    if generation.question_s is None:
        for name in ("question_s", "context_peak_nbytes", "question_peak_nbytes"):
            del record[name]
    lengths, entry = record.pop("lengths"), record.pop("entry_nbytes")
    average, peak = statistics.fmean(lengths), max(lengths)
    return {
        "prediction": record.pop("text"),
        **record,
        "kv_entries_mean": average,
        "kv_entries_peak": peak,
        "kv_nbytes_mean": average * entry,
        "kv_nbytes_peak": peak * entry,
        "trace": arithmetic_runs([round(held) for held in lengths]),
    }
