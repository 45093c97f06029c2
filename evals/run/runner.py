"""The steps of a run: plan, prompts, answers, comparison with the full cache, summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.results.compare import compare
from evals.results.records import FIDELITY, RunFailed, RunFolder, digest, writing
from evals.results.runs import Run
from evals.results.schema import Record
from evals.run.answers import make_answers
from evals.run.comparison import compare_answers
from evals.run.console import console
from evals.run.faults import LengthMismatch
from evals.run.interrupt import deferred_signals
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand
from evals.run.prompts import batch_size, load_prompts
from evals.run.work import Work, finished


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
            make_answers(work, stop_here)
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
