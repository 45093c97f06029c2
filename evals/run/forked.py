"""One pass for several methods: one prefill a prompt, then every method is a row of one batch.

Every row answers by itself; beside that, a copy of all rows may be fed the full cache's answer,
token by token, so that their next-token distributions can be compared with the full cache's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import CACHE_ARGUMENT, ForkedCache, Policy
from evals.results.folder import sha256
from evals.results.record import Record
from evals.run.faults import LengthMismatch, NotFinite
from evals.run.generate import Ends, Generation
from evals.run.lengths import Lengths
from evals.run.prompt import Prompt
from evals.run.sampling import Sampling

Found = Record | Exception  # what became of one row


@dataclass(frozen=True)
class Fidelity:
    """How near a method's next-token distributions are to the full cache's, on one answer of its.

    Over the answer's tokens but the first, which is predicted before any eviction; where the
    context is compressed before the question is read, over all. None if there is none of these.

    Attributes:
        kl_to_full, kl_median: KL(full || method) in nats, mean and median over the tokens.
        top1_to_full: share of tokens where both have the same likeliest one.
        kl_tokens: KL of each, to four digits.
    """

    kl_to_full: float | None
    kl_median: float | None
    top1_to_full: float | None
    kl_tokens: list[float]

    @classmethod
    def of(cls, kl: Sequence[float], same: Sequence[float], dtype: torch.dtype) -> Fidelity:
        """Over the positions of one answer.

        Raises:
            NotFinite: a divergence is NaN or infinite.
        """
        if not kl:
            return cls(None, None, None, [])
        wrong = [position for position, nats in enumerate(kl, start=1) if not math.isfinite(nats)]
        if wrong:
            raise NotFinite("the KL divergence was", wrong[0], dtype)
        digits = [float(f"{nats:.4g}") for nats in kl]
        return cls(statistics.fmean(kl), statistics.median(kl), statistics.fmean(same), digits)


class Rows:
    """Methods that share a prefill and are decoded as rows of one batch.

    Attributes:
        cache: of all rows; `cache.forks[i]` is row i's.
        steps: tokens fed by each step.
        logits: of the last token read, [rows, vocab], or [1, vocab] while it is the same for all.
    """

    def __init__(
        self, model: PreTrainedModel, policies: Sequence[Policy], options: dict[str, Any]
    ) -> None:
        self.model = model
        self.cache = ForkedCache(model, policies, **options)
        self.lengths = [
            Lengths(fork, policy) for fork, policy in zip(self.cache.forks, policies, strict=True)
        ]
        self.steps: list[int] = []
        self.logits = torch.empty(0)

    def copy(self) -> Rows:
        """Rows that go on from here by themselves."""
        other = Rows.__new__(Rows)
        other.model, other.cache = self.model, self.cache.copy()
        pairs = zip(self.lengths, other.cache.forks, strict=True)
        other.lengths = [known.of_copy(fork) for known, fork in pairs]
        other.steps, other.logits = list(self.steps), self.logits
        return other

    def feed(self, ids: Sequence[int], chunk: int | None = None) -> None:
        """Feeds the same tokens to every row.

        Args:
            chunk: tokens of the chunks in which the first step is read, as if they were one.
        """
        first = not self.steps and chunk and len(ids) > chunk
        if first:
            self.cache.hold_until = len(ids)
        self._step(torch.tensor([list(ids)], device=self.model.device), chunk if first else None)

    def _step(self, ids: Tensor, chunk: int | None = None) -> None:
        """Feeds ids [rows, new], or [1, new] to every row."""
        if self.steps:
            ids = ids.expand(len(self.lengths), -1)
        given: dict[str, Any] = {CACHE_ARGUMENT: self.cache}
        with torch.inference_mode():
            for part in ids.split(chunk or ids.shape[1], dim=1):
                self.logits = self.model(part, **given, logits_to_keep=1).logits[:, -1]
        self.steps.append(ids.shape[1])
        for held in self.lengths:
            held.note()

    def answer(
        self, tokens: int, ends: Ends, sampling: Sampling | None
    ) -> tuple[list[list[int]], list[int | None]]:
        """Every row's own answer.

        Rows that ended are fed on until the last one has; nobody looks at that.

        Args:
            tokens: at most.
            sampling: None: the likeliest tokens; else with a seed for each row.

        Returns:
            The answers, each with the token that ended it; and by row the first of its tokens that
            was made of NaN or infinite logits, or None.
        """
        rows, device = len(self.lengths), self.logits.device
        processors = [] if sampling is None else sampling.processors(device)
        last = torch.tensor(sorted(ends.all), device=device)
        over = torch.zeros(rows, dtype=torch.bool, device=device)
        chosen, sound = [], []
        nothing = torch.empty(rows, 0, dtype=torch.long, device=device)
        while True:
            logits = self.logits.expand(rows, -1)
            sound.append(logits.amax(-1).isfinite())
            if not chosen and ends.stop:  # as LongBench does: an answer does not begin with its end
                logits = logits.index_fill(1, last, -math.inf)
            for processor in processors:
                logits = processor(nothing, logits)
            chosen.append(logits.argmax(-1))
            over = over | torch.isin(chosen[-1], last)
            if len(chosen) == tokens or over.all():
                break
            self._step(chosen[-1][:, None])
        answers = [ends.cut(row) for row in torch.stack(chosen, dim=1).tolist()]
        wrong = [
            row.index(False) if False in row[: len(answer)] else None
            for row, answer in zip(torch.stack(sound, dim=1).tolist(), answers, strict=True)
        ]
        return answers, wrong

    def forced(self, answer: Sequence[int]) -> tuple[list[list[float]], list[list[float]]]:
        """Feeds every row an answer of row 0, the full cache, token by token.

        Where all rows have the same logits still, as behind a prompt that was read as one, there is
        nothing to compare.

        Returns:
            Of each row, by token: KL(full || row) in nats, and whether both find the same token the
            likeliest (0 or 1).
        """
        found: list[Tensor] = []  # [2, rows]
        for number in range(len(answer)):
            if number:
                self._step(torch.tensor([[answer[number - 1]]], device=self.logits.device))
            if len(self.logits) > 1:
                own = log_softmax(self.logits, dim=-1, dtype=torch.float32)
                full = own[:1]
                kl = (full.exp() * (full - own)).sum(-1)
                found.append(torch.stack([kl, full.argmax(-1) == own.argmax(-1)]))
        if not found:
            return [[] for _ in self.lengths], [[] for _ in self.lengths]
        kls, same = torch.stack(found, dim=-1).tolist()  # the only wait for the device
        return kls, same


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    policies: Sequence[Policy],
    options: dict[str, Any],
    sampling: Sequence[tuple[float, float, list[int]] | None],
    references: Sequence[list[int] | None],
    own: bool,
    kl: bool,
    chunk: int | None = None,
) -> list[list[Found]]:
    """Every method's answers to a prompt, or to several questions on one context.

    Args:
        prompts: one, or several of one context, which is read once and each continues a copy of.
        policies: with `kl` the full cache is the first.
        options: of the cache, see :class:`buzz.ForkedCache`.
        sampling: of each prompt, as :meth:`evals.tasks.base.Task.sampling` has it for one sample.
        references: the full cache's answer to each prompt; None: the one that row 0 gives now.
        own: whether every row answers; otherwise all `references` must be there.
        kl: whether the rows are compared on the full cache's answer.
        chunk: as of :meth:`Rows.feed`.

    Returns:
        For each prompt and policy the fields of a record, or what was wrong with that row.
    """
    rows = Rows(model, policies, options)
    read = 0
    for step in prompts[0].before:
        rows.feed(prompts[0].ids[read : read + step], chunk)
        read += step
    found = []
    for prompt, sampled, reference in zip(prompts, sampling, references, strict=True):
        now = rows.copy() if len(prompts) > 1 else rows
        now.feed(prompt.ids[read:], chunk)
        forced = now.copy() if own and kl else now
        made: list[Found] = [{} for _ in policies]
        if own:
            ends = Ends.of(model, tokenizer, prompt.sample.stop)
            drawn = None if sampled is None else Sampling(*sampled[:2], sampled[2] * len(policies))
            answers, wrong = now.answer(prompt.max_new_tokens, ends, drawn)
            reference = reference or answers[0]
            made = [
                _record(now, row, answers[row], wrong[row], prompt, ends, tokenizer)
                for row in range(len(policies))
            ]
        if kl:
            assert reference is not None
            kls, same = forced.forced(reference)
            for row, one in enumerate(made[1:], start=1):
                made[row] = _compared(one, forced, row, kls[row], same[row], reference)
        found.append(made)
    return found


def _record(
    rows: Rows,
    row: int,
    answer: list[int],
    wrong: int | None,
    prompt: Prompt,
    ends: Ends,
    tokenizer: PreTrainedTokenizerBase,
) -> Found:
    """What a row's record has of its answer and what it took."""
    try:
        if wrong is not None:
            raise NotFinite("the logits were", wrong, rows.model.dtype)
        fork, before = rows.cache.forks[row], len(prompt.before)
        steps = rows.steps[: max(1, before + 1) + len(answer) - 1]
        earlier = max(0, before - 1)  # steps before the one that ends the context
        held = rows.lengths[row]
        lengths = held.verified(0, steps)[earlier:]
        return Generation(
            text=tokenizer.decode(answer, skip_special_tokens=True),
            tokens=answer,
            prompt_tokens=len(prompt.ids),
            generated_tokens=len(answer),
            stop_reason=ends.reason(answer),
            lengths=lengths,
            evictions=held.evictions(0, len(steps)),
            entry_nbytes=fork.entry_nbytes,
            window_nbytes=[fork.window_nbytes(seen) for seen in accumulate(steps)][earlier:],
            allocated_nbytes=held.allocated,
        ).record()
    except (NotFinite, LengthMismatch) as error:
        return error


def _compared(
    found: Found,
    rows: Rows,
    row: int,
    kl: list[float],
    same: list[float],
    answer: list[int],
) -> Found:
    """A row's record with its distance to the full cache."""
    if isinstance(found, Exception):
        return found
    try:
        rows.lengths[row].verified(0, rows.steps)
        near = Fidelity.of(kl, same, rows.model.dtype)
    except (NotFinite, LengthMismatch) as error:
        return error
    return found | vars(near) | {"reference_sha256": sha256(answer)}
