"""From prompts to records: generate or read, score, record."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from buzz import Policy
from evals.results.environment import Neighbours, busy, environment, process
from evals.results.schema import Record
from evals.results.statistics import mean
from evals.run.console import console
from evals.run.faults import LengthMismatch, attempt
from evals.run.forced import read
from evals.run.generate import generate
from evals.run.prompt import Prompt
from evals.run.prompts import batches
from evals.run.questions import answer
from evals.run.sampling import Sampling
from evals.run.work import Work, identity

NO_ANSWER = {"prediction": "", "tokens": [], "generated_tokens": 0, "stop_reason": "end"}


def make_answers(work: Work, stop_here: Callable[[], None]) -> None:
    """Answers what is asked and not there yet, batch by batch, and records each.

    Args:
        stop_here: called after each batch, when a run may end.

    Raises:
        LengthMismatch: the cache did not do what the method says; recorded too.
    """
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


def _read(work: Work, batch: list[Prompt], policy: Policy, together: list[Prompt]) -> list[Record]:
    task, options = work.plan.task, work.plan.cache_options
    found = []
    for prompt in batch:
        starts = prompt.sample.starts
        measured, losses = read(work.model, prompt.ids, policy, task.chunk, options, starts)
        blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
        found.append(NO_ANSWER | measured.record() | {"losses": losses, "blocks": blocks})
    return found
