"""From a configuration to records: check, load, generate, score, record, summarize."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Policy
from evals.results.compare import compare
from evals.results.environment import Neighbours, busy, environment, process
from evals.results.records import (
    FIDELITY,
    RunFailed,
    RunFolder,
    digest,
    writing,
)
from evals.results.runs import Run
from evals.results.schema import Record
from evals.results.statistics import mean
from evals.run.comparison import compare_answers
from evals.run.console import console
from evals.run.faults import LengthMismatch, attempt
from evals.run.forced import read
from evals.run.generate import generate
from evals.run.interrupt import deferred_signals
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand
from evals.run.prompt import Prompt
from evals.run.prompts import batch_size, batches, load_prompts
from evals.run.questions import answer
from evals.run.sampling import Sampling
from evals.run.work import Work, finished, identity


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


def _execute(plan: Plan) -> Path:
    folder = RunFolder(plan.folder)
    with folder.lock():
        work = _begin(plan, folder)
        rescored = work.rescore()
        if rescored:
            _say(
                f"{folder.path}: {rescored} answers scored again, their references or metrics are"
                " others"
            )
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
    plan = dataclasses.replace(plan, policy=plan.policy.for_tokenizer(tokenizer))
    rows = batch_size(plan, asked.prompts, model)
    done = finished(folder, records, asked.prompts)
    if done:
        _say(f"{folder.path}: {len(done)} of {len(asked.prompts)} samples are there already")
    folder.write("config.yaml", OmegaConf.to_yaml(plan.config))
    folder.write("prompts.json", asked.stored)
    return Work(plan, folder, asked.prompts, records, done, model, tokenizer, rows)


def _make(work: Work) -> Run | None:
    """Answers, and their comparison with those of the full cache, whose run is returned."""
    try:
        with deferred_signals() as stop_here:
            _generate(work, stop_here)
            full = _reference(work.plan)
            if full and work.plan.compares:
                compare_answers(work, full.by_id, stop_here)
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


def _generate(work: Work, stop_here: Callable[[], None]) -> None:
    if len(work.done) == len(work.prompts):
        return
    # What runs once per process (kernels, allocator pools) must not count in the first sample.
    # Should it fail, the first sample will and is recorded.
    with suppress(Exception):
        first, options = [work.prompts[0].ids[:32]], work.plan.cache_options
        generate(work.model, work.tokenizer, first, work.plan.policy, 2, (), options)
    parameters = sum(weights.numel() for weights in work.model.parameters())
    now = environment(str(work.model.device), work.plan.config["seed"], parameters)
    made = {"environment": work.folder.note(now), "process": process()}
    neighbours = Neighbours()
    headline = work.plan.task.headline
    columns = (
        TextColumn(f"{work.plan.label:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(work.prompts), completed=len(work.done), status="")
        for batch in batches(work.prompts, work.batch_size):
            if all(prompt.sample.id in work.done for prompt in batch):
                continue
            found = _run_batch(work, batch)
            conditions = made | _load_of(neighbours, work.model.device)
            for record in found:
                if record["id"] not in work.done:
                    work.add(record | conditions)
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

    make = _read if work.plan.task.mode == "read" else _answer

    def results(rows: list[Prompt]) -> list[Record]:
        found = make(work, rows, policy, batch)
        for prompt, record in zip(rows, found, strict=True):
            record |= {"status": "ok", "batch_size": len(rows)}
            record["scores"] = work.score(prompt, record)
            record.pop("losses", None)  # as long as the text
        return found

    try:
        found = attempt(batch, results, work.model.device)
    except LengthMismatch as error:
        failed = {"batch_size": len(batch), "status": "failed", "error": str(error)}
        for prompt in batch:
            work.folder.append(identity(prompt) | frame | failed)
        raise
    return [identity(p) | frame | result for p, result in zip(batch, found, strict=True)]


def _answer(
    work: Work, batch: list[Prompt], policy: Policy, together: list[Prompt]
) -> list[Record]:
    """Records of a batch's answers. Of a conversation, all that is asked is answered again.

    Args:
        together: the whole batch, of which some rows may run alone.
    """
    task, options = work.plan.task, work.plan.cache_options
    if batch[0].sample.shared:
        asked = together if task.conversation else batch
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
            sampling=None if sampled is None else Sampling(*sampled),
        )
    return [generation.record() for generation in generations]


NO_ANSWER = {"prediction": "", "tokens": [], "generated_tokens": 0, "stop_reason": "end"}


def _read(work: Work, batch: list[Prompt], policy: Policy, together: list[Prompt]) -> list[Record]:
    task, options = work.plan.task, work.plan.cache_options
    found = []
    for prompt in batch:
        starts = prompt.sample.starts
        measured, losses = read(work.model, prompt.ids, policy, task.chunk, options, starts)
        blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
        found.append(NO_ANSWER | measured.record() | {"losses": losses, "blocks": blocks})
    return found
