"""Every answer of a run beside the full cache's, token by token, as far as that is not on file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from rich.progress import track

from evals.results.records import FIDELITY, sha256
from evals.results.schema import Record
from evals.run.console import console
from evals.run.faults import attempt
from evals.run.forced import Fidelity, compare_with_full
from evals.run.prompt import Prompt
from evals.run.prompts import batches
from evals.run.work import Work


def compare_answers(work: Work, full: Mapping[str, Record], stop_here: Callable[[], None]) -> None:
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
        pad, options = work.tokenizer.pad_token_id, work.plan.cache_options
        later = rows[0].later
        found = compare_with_full(work.model, ids, answers, policy, pad, options, later)
        return [dataclasses.asdict(one) for one in found]

    todo = [
        [prompt for prompt in part if theirs(prompt)]
        for batch in batches(work.prompts, work.batch_size)
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
