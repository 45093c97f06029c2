"""One prompt, read once; then many methods beside the full cache, each a row of one batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, ForkedCache, Policy
from evals.results.schema import Record
from evals.run.forced import fidelity_of
from evals.run.lengths import Lengths


class Rows:
    """The full cache, which is row 0, and other methods beside it.

    Attributes:
        logits: of the last token read, [rows, vocab], or [1, vocab] while it is the same for all.
    """

    def __init__(self, model: PreTrainedModel, policies: Sequence[Policy], **options: Any) -> None:
        self.model = model
        every = [FullPolicy(), *policies]
        self.cache = ForkedCache(model, every, **options)
        self.lengths = [Lengths(*pair) for pair in zip(self.cache.forks, every, strict=True)]
        self.logits = torch.empty(0)

    def read(self, prompt: Sequence[int], later: Sequence[int] = ()) -> None:
        """Reads a prompt; `later` are the tokens of the steps behind the first."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        for part in ids.split([len(prompt) - sum(later), *later], dim=1):
            self._step(part)

    def _step(self, ids: Tensor) -> None:
        """Feeds ids [1, new] to every row."""
        first = not self.cache.get_seq_length()
        self.logits = self._forward(self.cache, ids if first else ids.expand(len(self.lengths), -1))
        for held in self.lengths:
            held.note()

    def _forward(self, cache: ForkedCache, ids: Tensor) -> Tensor:
        given: dict[str, Any] = {CACHE_ARGUMENT: cache}
        with torch.inference_mode():
            return self.model(ids, **given, logits_to_keep=1).logits[:, -1]

    def own_answers(self, tokens: int, ends: AbstractSet[int]) -> list[list[int]]:
        """Every row's own greedy answer, by a copy: the rows stay where they are.

        Args:
            tokens: at most.
            ends: tokens that end one.
        """
        cache, logits = self.cache.copy(), self.logits
        last = torch.tensor(sorted(ends), device=logits.device)
        chosen: list[Tensor] = []
        over = torch.zeros(len(self.lengths), dtype=torch.bool, device=logits.device)
        while True:
            chosen.append(logits.argmax(-1).expand(len(over)))
            over = over | torch.isin(chosen[-1], last)
            if len(chosen) == tokens or over.all():
                break
            logits = self._forward(cache, chosen[-1][:, None])
        answers = torch.stack(chosen, dim=1).tolist()
        stops = [next((i for i, one in enumerate(row) if one in ends), tokens) for row in answers]
        return [row[: stop + 1] for row, stop in zip(answers, stops, strict=True)]

    def forced(
        self, tokens: int, eos: AbstractSet[int]
    ) -> tuple[list[int], list[list[float]], list[list[float]]]:
        """Feeds every row the full cache's greedy answer, token by token.

        Where all rows have the same logits still, as behind a prompt that was read as one, there is
        nothing to compare.

        Returns:
            The answer, at most `tokens`, the token that ended it included; and of each row but the
            full cache's, by token: KL(full || row) in nats, and whether both find the same token
            the likeliest (0 or 1).
        """
        answer: list[int] = []
        steps: list[Tensor] = []  # [2, rows - 1]
        while True:
            found = log_softmax(self.logits, dim=-1, dtype=torch.float32)
            full, own = found[:1], found[1:]
            if len(own):
                kl = (full.exp() * (full - own)).sum(-1)
                steps.append(torch.stack([kl, full.argmax(-1) == own.argmax(-1)]))
            token = full.argmax(-1)
            answer.append(int(token))
            if len(answer) == tokens or answer[-1] in eos:
                break
            self._step(token[:, None])
        if not steps:
            return answer, *([[] for _ in self.lengths[1:]] for _ in range(2))
        kls, same = torch.stack(steps, dim=-1).tolist()
        return answer, kls, same


def compare(
    model: PreTrainedModel,
    prompt: Sequence[int],
    policies: Sequence[Policy],
    tokens: int,
    eos: AbstractSet[int],
    cache_options: dict[str, Any],
    later: Sequence[int] = (),
    own_tokens: int = 0,
    stop: AbstractSet[int] = frozenset(),
) -> tuple[list[int], list[Record], list[list[int]]]:
    """One prompt, read once; then `policies` beside the full cache, on its greedy answer.

    Where the context is compressed before the question is read, every method reads the question by
    itself, and the answer's first token is compared, too.

    Args:
        cache_options: of all caches, the full one among them.
        later: tokens of the steps behind the first in which the prompt is read, see
            :mod:`evals.run.compress`.
        own_tokens: of each row's own greedy answer, at most; 0: none is made.
        stop: tokens that end own answers too.

    Returns:
        The answer, at most `tokens`, the token that ended it included; for each policy kl,
        kl_median, top1 (see :class:`evals.run.forced.Fidelity`; None of an answer of one token),
        kl_tokens, entries_mean, entries_peak (held after each step), evictions; and the own
        answers, the full cache's first.

    Raises:
        LengthMismatch: a cache held another number of entries than its policy's recurrence says.
        NotFinite: a divergence is NaN or infinite.
    """
    rows = Rows(model, policies, **cache_options)
    rows.read(prompt, later)
    answers = rows.own_answers(own_tokens, eos | stop) if own_tokens else []
    answer, kls, same = rows.forced(tokens, eos)
    steps = [len(prompt) - sum(later), *later] + [1] * (len(answer) - 1)
    held = [lengths.verified(0, steps) for lengths in rows.lengths]
    results: list[Record] = []
    for kl, agreed, entries, fork in zip(kls, same, held[1:], rows.cache.forks[1:], strict=True):
        near = fidelity_of(kl, agreed, model.dtype)
        results.append(
            {
                "kl": near.kl_to_full,
                "kl_median": statistics.median(kl) if kl else None,
                "top1": near.top1_to_full,
                "kl_tokens": [float(f"{nats:.4g}") for nats in kl],
                "entries_mean": statistics.fmean(entries),
                "entries_peak": max(entries),
                "evictions": fork.evictions[0],
            }
        )
    return answer, results, answers
