"""From a configuration to records: check, load, generate, score, record, summarize."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

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
from evals.compare import compare
from evals.environment import Neighbours, busy, environment, process
from evals.faults import attempt
from evals.forced import Fidelity, compare_with_full, read
from evals.generate import Generation, LengthMismatch, generate
from evals.interrupt import deferred_signals
from evals.metrics import mean
from evals.models import load_model, load_tokenizer
from evals.plan import Plan, expand
from evals.prompts import Prompt, batches, load_prompts
from evals.records import (
    FIDELITY,
    RunFailed,
    RunFolder,
    arithmetic_runs,
    digest,
    sha256,
    writing,
)
from evals.results import Run
from evals.schema import FORMAT, Record
from evals.summary import summarize
from evals.task import StreamTask

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


def _execute(plan: Plan) -> Path:
    folder = RunFolder(plan.folder)
    with folder.lock():
        records = folder.read()
        folder.read(FIDELITY), folder.environments()  # refuse now what could not be added to
        torch.manual_seed(plan.config["seed"])
        asked = load_prompts(plan, _tokenizer(plan))
        prompts = asked.prompts
        lengths = [len(prompt.ids) for prompt in prompts]
        for tokens in (min(lengths), max(lengths)):
            plan.fit(tokens)  # refuse a budget that cannot be met now, not later
        model, tokenizer = _load(plan)
        done = _finished(folder, records, prompts)
        if done:
            _say(f"{folder.path}: {len(done)} of {len(prompts)} samples are there already")
        folder.write("config.yaml", OmegaConf.to_yaml(plan.config))
        folder.write("prompts.json", asked.stored())
        rescored = _rescore(plan, folder, records, prompts, done)
        stale = len(records.keys() - asked.stored()["samples"].keys())
        if stale:
            _say(f"{folder.path}: {stale} more records are of other data and do not count")
        try:
            with deferred_signals() as stop_here:
                _generate(plan, folder, records, prompts, done, model, tokenizer, stop_here)
                full = _reference(plan)
                theirs = full.by_id if full else {}
                if full and plan.compares:
                    _compare(plan, folder, records, theirs, prompts, model, tokenizer, stop_here)
        except LengthMismatch as error:
            folder.write("summary.json", {"status": "failed", "error": str(error)})
            raise RunFailed(str(error)) from error
        except KeyboardInterrupt:
            so_far = [records[p.sample.id] for p in prompts if p.sample.id in records]
            error = f"interrupted after {len(so_far)} of {len(prompts)} samples; run it again"
            unfinished = {"status": "interrupted", "error": error}
            summary = summarize(plan.config, plan.task, so_far, stale)
            folder.write("summary.json", summary | unfinished)
            raise
        ordered = [records[prompt.sample.id] for prompt in prompts]
        _report_failed(folder, ordered)
        summary = summarize(plan.config, plan.task, ordered, stale)
        if full:
            by_id = {record["id"]: record for record in ordered}
            fidelity = {id: one for id, one in folder.read(FIDELITY).items() if id in by_id}
            summary["against_full"] = compare(by_id, theirs, summary, fidelity)
            summary["failed"] += _name_failed("comparison of", fidelity.values())
        folder.write("summary.json", summary)
        with writing(folder.path):
            plan.task.draw([record for record in ordered if record["status"] == "ok"], folder.path)
        if rescored or len(done) < len(prompts):
            plan.logger.log(folder.path, plan.config, ordered, summary)
    return folder.path


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


def _rescore(
    plan: Plan,
    folder: RunFolder,
    records: dict[str, Record],
    prompts: list[Prompt],
    done: set[str],
) -> int:
    """Scores answers again whose references, or the version of what scores them, were changed.

    Losses of a text that was read are not on file: it is read again.

    Returns:
        How many it scored.
    """
    count = 0
    for prompt in prompts:
        record = records.get(prompt.sample.id, {})
        if prompt.sample.id not in done or record.get("sample_sha256") == prompt.sample_sha256:
            continue
        if isinstance(plan.task, StreamTask):
            done.remove(prompt.sample.id)
            continue
        record = record | _identity(prompt)
        if record["status"] == "ok":
            try:
                record["scores"] = _finite(plan.task.score_record(prompt.sample, record))
            except Exception:  # it is run again, and recorded as what it then is
                done.remove(prompt.sample.id)
                continue
        folder.append(record)
        records[record["id"]] = record
        count += 1
    if count:
        _say(f"{folder.path}: {count} answers scored again, their references or metrics are others")
    return count


def _generate(
    plan: Plan,
    folder: RunFolder,
    records: dict[str, Record],
    prompts: list[Prompt],
    done: set[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_here: Callable[[], None],
) -> None:
    if len(done) == len(prompts):
        return
    # What runs once per process (kernels, allocator pools) must not count in the first sample.
    # Should it fail, the first sample will and is recorded.
    with suppress(Exception):
        generate(model, tokenizer, [prompts[0].ids[:32]], plan.policy, 2, (), plan.config["cache"])
    parameters = sum(weights.numel() for weights in model.parameters())
    now = environment(str(model.device), plan.config["seed"], parameters)
    made = {"environment": folder.note(now), "process": process()}
    neighbours = Neighbours()
    headline = plan.task.headline
    columns = (
        TextColumn(f"{plan.config['method']['name']:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(prompts), completed=len(done), status="")
        for batch in batches(prompts, plan.task.batch_size):
            if all(prompt.sample.id in done for prompt in batch):
                continue
            found = _run_batch(plan, folder, batch, model, tokenizer)
            conditions = made | _load_of(neighbours, model.device)
            for record in found:
                if record["id"] not in done:
                    folder.append(record | conditions)
                    records[record["id"]] = record | conditions
                    progress.advance(bar)
            stop_here()
            ran = [records[p.sample.id] for p in prompts if p.sample.id in records]
            ran = [record for record in ran if record["status"] == "ok"]
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


def _run_batch(
    plan: Plan,
    folder: RunFolder,
    batch: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Record]:
    """The batch's records. Rows that are run again in a smaller one keep the batch's budget."""
    policy, entries = plan.fit(min(len(prompt.ids) for prompt in batch))
    frame = {
        "policy": dataclasses.asdict(policy),
        "budget_entries": entries,
        "budget_by": None if entries is None else plan.config["budget_by"],
        "batch_size": 1,  # of a row that fails: see attempt()
    }

    def results(rows: list[Prompt]) -> list[Record]:
        if isinstance(plan.task, StreamTask):
            found = [_read(plan.task, plan, prompt, policy, model) for prompt in rows]
        else:
            found = _answer(plan, rows, policy, model, tokenizer)
        return [{"batch_size": len(rows), "status": "ok"} | one for one in found]

    try:
        found = attempt(batch, results, model.device)
    except LengthMismatch as error:
        failed = {"batch_size": len(batch), "status": "failed", "error": str(error)}
        for prompt in batch:
            folder.append(_identity(prompt) | frame | failed)
        raise
    return [_identity(p) | frame | result for p, result in zip(batch, found, strict=True)]


def _answer(
    plan: Plan,
    batch: list[Prompt],
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Record]:
    generations = generate(
        model,
        tokenizer,
        [prompt.ids for prompt in batch],
        policy,
        batch[0].max_new_tokens,
        batch[0].sample.stop,
        plan.config["cache"],
    )
    measured = [_measurements(generation) for generation in generations]
    return [
        {"scores": _finite(plan.task.score_record(prompt.sample, record))} | record
        for prompt, record in zip(batch, measured, strict=True)
    ]


def _read(
    task: StreamTask, plan: Plan, prompt: Prompt, policy: Policy, model: PreTrainedModel
) -> Record:
    options, starts = plan.config["cache"], prompt.sample.starts
    measured, losses = read(model, prompt.ids, policy, task.chunk, options, starts)
    blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
    scores = _finite(task.score_losses(prompt.sample, losses))
    return {"scores": scores, "blocks": blocks} | _measurements(measured)


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """The scores, none of which may be NaN or infinite."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ArithmeticError(f"the score {name} is {value}")
    return scores


def _compare(
    plan: Plan,
    folder: RunFolder,
    records: dict[str, Record],
    full: dict[str, Record],
    prompts: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_here: Callable[[], None],
) -> None:
    """Teacher-forces the method over the full run's answers, as far as that was not done before."""
    before = folder.read(FIDELITY)

    def answer(prompt: Prompt) -> list[int] | None:
        """The full cache's answer, if there is something left to compare it for."""
        own, theirs = records[prompt.sample.id], full.get(prompt.sample.id, {})
        if own["status"] != "ok" or theirs.get("prompt_sha256") != own["prompt_sha256"]:
            return None
        tokens = theirs.get("tokens")
        earlier = before.get(prompt.sample.id, {})
        done = earlier.get("answer_sha256") == sha256(tokens) and "status" not in earlier
        return None if done else tokens

    def results(rows: list[Prompt]) -> list[Record]:
        policy = dataclasses.replace(plan.policy, **records[rows[0].sample.id]["policy"])
        ids, answers = [prompt.ids for prompt in rows], [answer(prompt) or [] for prompt in rows]
        pad, options = tokenizer.pad_token_id, plan.config["cache"]
        found = compare_with_full(model, ids, answers, policy, pad, options)
        return [dataclasses.asdict(one) for one in found]

    todo = [
        [prompt for prompt in batch if answer(prompt)]
        for batch in batches(prompts, plan.task.batch_size)
    ]
    unknown = dataclasses.asdict(Fidelity(None, None))
    for batch in track(
        [batch for batch in todo if batch], "KL to full", console=console, transient=True
    ):
        for prompt, result in zip(batch, attempt(batch, results, model.device), strict=True):
            identity = {"id": prompt.sample.id, "answer_sha256": sha256(answer(prompt))}
            folder.append(identity | unknown | result, FIDELITY)
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
    }


def _measurements(generation: Generation) -> Record:
    record = dataclasses.asdict(generation)
    lengths, entry = record.pop("lengths"), record.pop("entry_nbytes")
    average, peak = statistics.fmean(lengths), max(lengths)
    return {
        "prediction": record.pop("text"),
        **record,
        "kv_entries_mean": average,
        "kv_entries_peak": peak,
        "kv_nbytes_mean": average * entry,
        "kv_nbytes_peak": peak * entry,
        "trace": arithmetic_runs(lengths),
    }
