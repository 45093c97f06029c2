"""One pass for several methods: each prompt is read once, then every method is a row of one batch.

Every row gives its own answer. With KL, a copy of all rows is fed the full cache's answer token by
token (teacher forcing), and next-token distributions are compared with the full cache's.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import ForkedCache, Policy
from evals.results.folder import sha256
from evals.results.record import Record
from evals.run.faults import LengthMismatch, NotFinite
from evals.run.generate import Ends, Generation, forward, left_padded
from evals.run.lengths import Lengths
from evals.run.prompts import Prompt
from evals.run.sampling import Sampling

Found = Record | Exception  # the fields of one row's record, or its error


@dataclass(frozen=True)
class Fidelity:
    """KL divergence and top-1 agreement with the full cache, on the full cache's own answer.

    The answer's first token does not count, as it is predicted before any eviction, unless the
    context was compressed before the question. None if no token counts.

    Attributes:
        kl_to_full, kl_median: KL(full || method) in nats, mean and median over the tokens.
        top1_to_full: share of tokens where both have the same likeliest one.
        kl_tokens: KL of each token, to four digits.
    """

    kl_to_full: float | None
    kl_median: float | None
    top1_to_full: float | None
    kl_tokens: list[float]

    @classmethod
    def of(cls, kl: Sequence[float], same: Sequence[float], dtype: torch.dtype) -> Fidelity:
        """Of one answer.

        Args:
            kl, same: of each of its tokens.

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
    """Methods that share a prefill and are decoded as rows of one batch, on one prompt or several.

    Attributes:
        cache: of all rows; `cache.forks[i]` is row i's: the methods on the first prompt, then those
            on the second.
        padding: tokens before each prompt's first.
        logits: of the last token read, [rows, vocab], or [prompts, vocab] while methods agree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policies: Sequence[Sequence[Policy]],
        options: dict[str, Any],
    ) -> None:
        """
        Args:
            policies: for each prompt, of the same methods in the same order.
            options: of the cache, see :class:`buzz.ForkedCache`.
        """
        self.model = model
        self.cache = ForkedCache(model, policies, **options)
        each = [policy for own in policies for policy in own]
        pairs = zip(self.cache.forks, each, strict=True)
        self.lengths = [Lengths(fork, policy) for fork, policy in pairs]
        self.padding = [0] * len(policies)
        self.logits = torch.empty(0)
        self._steps: list[int] = []  # tokens fed by each, padding included
        self._mask: Tensor | None = None  # of what was fed, [prompts, seen], if there is padding

    def copy(self) -> Rows:
        """Rows that continue from here independently."""
        other = copy.copy(self)
        other.cache = self.cache.copy()
        pairs = zip(self.lengths, other.cache.forks, strict=True)
        other.lengths = [known.of_copy(fork) for known, fork in pairs]
        other._steps = list(self._steps)
        return other

    def steps(self, row: int) -> list[int]:
        """Tokens fed by each step to one row, without padding."""
        first, *later = self._steps
        return [first - self.padding[self.cache.prompts[row]], *later]

    def feed(self, ids: Sequence[Sequence[int]], chunk: int | None = None) -> None:
        """Feeds every method the tokens of each prompt.

        Args:
            ids: equally many of each prompt; in the first step shorter ones are padded.
            chunk: tokens of the chunks in which the first step is read, as if they were one.
        """
        tokens, mask = left_padded(ids, 0).to(self.model.device)
        if not self._steps and not mask.all():
            self.padding, self._mask = (1 - mask).sum(-1).tolist(), mask[:, :0]
        chunked = not self._steps and chunk and tokens.shape[1] > chunk
        chunked = chunked and mask[:, chunk - 1].all()  # else a row's first chunk is padding alone
        if chunked:
            self.cache.hold_until = tokens.shape[1]
        self._step(tokens, mask, chunk if chunked else None)

    def _step(self, ids: Tensor, mask: Tensor | None = None, chunk: int | None = None) -> None:
        """Feeds ids [prompts or rows, new]; mask [prompts, new], None: no padding."""
        prompts = self.cache.prompts
        if self._steps and len(ids) < len(prompts):
            ids = ids[prompts]
        whole, seen = None, sum(self._steps)
        if self._mask is not None:
            fresh = self._mask.new_ones(len(self._mask), ids.shape[1]) if mask is None else mask
            self._mask = torch.cat([self._mask, fresh], dim=1)
            whole = self._mask[prompts] if self._steps else self._mask
        for part in ids.split(chunk or ids.shape[1], dim=1):
            seen += part.shape[1]
            padded = None if whole is None else whole[:, :seen]
            self.logits = forward(self.model, self.cache, part, padded, 1)[:, -1]
        self._steps.append(ids.shape[1])
        for held in self.lengths:
            held.note()

    def answer(
        self, tokens: int, ends: Ends, sampling: Sampling | None
    ) -> tuple[list[list[int]], list[int | None]]:
        """Every row's own answer.

        Rows that have ended are still fed until the last one has; what they give then is ignored.

        Args:
            tokens: at most.
            sampling: None: the likeliest tokens; else with a seed for each row.

        Returns:
            The answers, each with the token that ended it; and for each row the first of its tokens
            whose logits were NaN or infinite, or None.
        """
        rows, device = len(self.lengths), self.logits.device
        processors = [] if sampling is None else sampling.processors(device)
        last = torch.tensor(sorted(ends.all), device=device)
        over = torch.zeros(rows, dtype=torch.bool, device=device)
        chosen, sound = [], []
        nothing = torch.empty(rows, 0, dtype=torch.long, device=device)
        while True:
            logits = self.logits if len(self.logits) == rows else self.logits[self.cache.prompts]
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

    def teacher_forced(
        self, answers: Sequence[Sequence[int]]
    ) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
        """Feeds every method the full cache's answers token by token. The full cache is method 0.

        Tokens for which all methods still have the same logits are left out, as is the first one
        after prompts that were read in one step.

        Args:
            answers: one to each prompt.

        Returns:
            For each prompt and method, by token: KL(full || method) in nats, and whether both have
            the same likeliest token (0 or 1).
        """
        prompts, found = len(answers), []
        for number in range(max(map(len, answers))):
            if number:  # after an answer's end its last token again, which is ignored
                fed = [[answer[min(number, len(answer)) - 1]] for answer in answers]
                self._step(torch.tensor(fed, device=self.logits.device))
            if len(self.logits) > prompts:
                own = log_softmax(self.logits, dim=-1, dtype=torch.float32)
                own = own.unflatten(0, (prompts, -1))
                full = own[:, :1]
                kl = (full.exp() * (full - own)).sum(-1)
                found.append(torch.stack([kl, full.argmax(-1) == own.argmax(-1)]))  # [2, p, m]
        shape = 2, prompts, len(self.lengths) // prompts, 0
        kls, same = (torch.stack(found, dim=-1) if found else torch.empty(shape)).tolist()
        agreed = max(map(len, answers)) - len(found)  # tokens that were left out
        for values in (kls, same):
            for answer, of_prompt in zip(answers, values, strict=True):
                of_prompt[:] = [tokens[: max(0, len(answer) - agreed)] for tokens in of_prompt]
        return kls, same


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    policies: Sequence[Sequence[Policy]],
    options: dict[str, Any],
    sampling: Sequence[tuple[float, float, list[int]] | None],
    references: Sequence[list[int] | None],
    own: bool,
    kl: bool,
    chunk: int | None = None,
) -> list[list[Found]]:
    """Every method's answers to prompts, or to several questions on one context.

    Args:
        prompts: of one batch, see :func:`evals.run.prompts.batches`. A context that they share is
            read once, and each continues a copy.
        policies: for each prompt; with `kl` the full cache is the first.
        options: of the cache, see :class:`buzz.ForkedCache`.
        sampling: of each prompt, as :meth:`evals.tasks.base.Task.sampling` has it for one sample.
        references: the full cache's answer to each prompt; None: the one that row 0 gives now.
        own: whether every row answers; otherwise all `references` must be there.
        kl: whether the rows are compared on the full cache's answer.
        chunk: as of :meth:`Rows.feed`.

    Returns:
        For each prompt and policy the fields of a record, or the error of that row.
    """
    shared = bool(prompts[0].sample.shared)
    read = prompts[:1] if shared else prompts
    rows = Rows(model, policies[: len(read)], options)
    for step in zip(*(prompt.steps[:-1] for prompt in read), strict=True):
        rows.feed(step, chunk)
    found = []
    asked = list(zip(prompts, sampling, references, strict=True))
    for part in ([one] for one in asked) if shared else [asked]:
        now = rows.copy() if len(asked) > len(part) else rows
        now.feed([prompt.steps[-1] for prompt, _, _ in part], chunk)
        found += _answers(now, tokenizer, part, len(policies[0]), own, kl)
    return found


def _answers(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Prompt, tuple[float, float, list[int]] | None, list[int] | None]],
    methods: int,
    own: bool,
    kl: bool,
) -> list[list[Found]]:
    """The result of :func:`answer_together`, for prompts that have been read.

    Args:
        asked: each with its sampling, and the full cache's answer, if there is one.
        methods: how many there are.
    """
    forced = rows.copy() if own and kl else rows
    made: list[list[Found]] = [[{} for _ in range(methods)] for _ in asked]
    references = [reference for _, _, reference in asked]
    if own:
        first, sampled, _ = asked[0]
        ends = Ends.of(rows.model, tokenizer, first.sample.stop)
        seeds = [draw[2][0] for _, draw, _ in asked if draw for _ in range(methods)]
        drawn = None if sampled is None else Sampling(*sampled[:2], seeds)
        answers, wrong = rows.answer(first.max_new_tokens, ends, drawn)
        for number, (prompt, _, _) in enumerate(asked):
            references[number] = references[number] or answers[number * methods]
            made[number] = [
                _record(rows, row, answers[row], wrong[row], prompt, ends, tokenizer)
                for row in range(number * methods, (number + 1) * methods)
            ]
    if kl:
        given = [reference for reference in references if reference is not None]
        assert len(given) == len(asked)
        kls, same = forced.teacher_forced(given)
        for number, answer in enumerate(given):
            for method in range(1, methods):
                distance = kls[number][method], same[number][method]
                row = number * methods + method
                made[number][method] = _compared(
                    made[number][method], forced, row, *distance, answer
                )
    return made


def _record(
    rows: Rows,
    row: int,
    answer: list[int],
    wrong: int | None,
    prompt: Prompt,
    ends: Ends,
    tokenizer: PreTrainedTokenizerBase,
) -> Found:
    """The fields of a row's record: its answer, and what it took."""
    try:
        if wrong is not None:
            raise NotFinite("the logits were", wrong, rows.model.dtype)
        before = len(prompt.before)
        steps = rows.steps(row)[: before + len(answer)]
        earlier = max(0, before - 1)  # steps before the one that ends the context
        return Generation(
            text=tokenizer.decode(answer, skip_special_tokens=True),
            tokens=answer,
            prompt_tokens=len(prompt.ids),
            generated_tokens=len(answer),
            stop_reason=ends.reason(answer),
            **rows.lengths[row].measured(0, steps, earlier),
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
    """A row's record with its distance from the full cache."""
    if isinstance(found, Exception):
        return found
    try:
        rows.lengths[row].verified(0, rows.steps(row))
        near = Fidelity.of(kl, same, rows.model.dtype)
    except (NotFinite, LengthMismatch) as error:
        return error
    return found | vars(near) | {"reference_sha256": sha256(answer)}
