"""Any task of lm-evaluation-harness under any of our methods, as its model `buzz`.

    python -m evals.lm_eval run --model buzz --tasks TASK \
        --model_args pretrained=smollm2,method=h2o,budget=0.25

See docs/lm_eval.md. lm-eval finds no third-party models by itself, so this module registers one and
hands over to lm-eval's own command line; in Python, importing it before `lm_eval.simple_evaluate`
does the same. Needs `pip install lm-eval`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

import baselines  # noqa: F401  (registers its methods)
from buzz import CACHE_ARGUMENT, POLICIES, Budget, ConfigError, EvictionCache, Policy
from buzz.cache import check_dtype, positions_of
from buzz.granularity import constrained
from buzz.policy import BudgetBy
from evals.run.models import (
    NAMED,
    clear_settings,
    device_of,
    load_model,
    named_config,
    set_date,
)

Pair = tuple[list[int], list[int]]  # token ids of a context and of the continuation to score
Scored = tuple[float, bool]  # log-likelihood in nats, and whether each token was the likeliest


@register_model("buzz")
class EvictionLM(HFLM):
    """lm-eval's Hugging Face model, with an evicting cache in every forward pass.

    Generation is stock `model.generate` with the cache. A continuation is scored as in decoding:
    one step reads its context without the last token, then the method evicts; from that last token
    on, every step feeds one token and gives the probability of the next. So every scored token,
    also the first, sees a thinned cache, and is scored before it can influence an eviction. A text
    that is scored as a whole (`loglikelihood_rolling`) goes through one cache in the same way.

    Args:
        pretrained: a name in configs/model (`smollm2` is the embedded model), else what HFLM takes.
        method: a name in :data:`buzz.POLICIES`; its parameters are arguments of their own.
        budget: KV entries, or a fraction of the prompt, as in `run.py`. It sets the parameters that
            are not given. The budget of a batch is that of its shortest prompt (for
            `loglikelihood_rolling`, text).
        budget_by: as in :class:`buzz.Budget`.
        chunk: scored tokens fed per step. More than 1 is faster; evictions then happen after each
            chunk, whose tokens all see what its first one saw.
        positions, logn_base, logn_clamp: as in :class:`buzz.EvictionCache`.
        cache_dtype: its `dtype`; that of HFLM is the model's.
        granularity, page_score, heads: as in :class:`buzz.Constrained`.
        batch_size: a number; `auto` is refused.
        kwargs: the method's parameters, and HFLM's own arguments; `device` is CUDA where there is
            one, unless it is given.

    Raises:
        ConfigError: unknown method or parameter, impossible value or budget, unsupported model.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        method: str = "buzz",
        budget: float | int | None = None,
        budget_by: BudgetBy = "peak",
        chunk: int = 1,
        positions: Any = "cache",
        logn_base: float | None = None,
        logn_clamp: bool = False,
        cache_dtype: str | None = None,
        granularity: str = "token",
        page_score: str = "mean",
        heads: str = "each",
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        self.policy, self.fixed = _make_policy(method, kwargs)
        self.constraints = {"granularity": granularity, "page_score": page_score, "heads": heads}
        self.budget, self.chunk = None if budget is None else Budget(budget, budget_by), chunk
        self.cache_options = {
            "positions": positions_of(positions),
            "logn_base": logn_base,
            "logn_clamp": logn_clamp,
            "dtype": cache_dtype,
        }
        check_dtype(cache_dtype, self.cache_options["positions"])
        if not isinstance(chunk, int) or chunk < 1:
            raise ConfigError("chunk", chunk, "give a whole number of at least 1")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError("batch_size", batch_size, "give a whole number of at least 1")
        policy = constrained(self.policy, **self.constraints)
        if self.budget is None:
            policy.next_length(1, 0)  # raises if pages are too large for its sizes
        elif isinstance(self.budget.size, int):
            self.fitted(self.budget.size)
        if not kwargs.get("parallelize"):  # lm-eval would ask for CUDA whether it is there or not
            kwargs["device"] = str(device_of(kwargs.get("device") or "auto"))
        if isinstance(pretrained, str) and pretrained in NAMED:
            settings = named_config(pretrained)
            pretrained, kwargs["tokenizer"] = load_model(settings, kwargs.pop("device"))
            kwargs.setdefault("max_length", settings["max_length"])
        super().__init__(pretrained, batch_size=int(batch_size), **kwargs)
        if pretrained is not self.model:  # else load_model has done so
            clear_settings(self.model)
        set_date(self.tokenizer)
        self.policy = self.policy.for_tokenizer(self.tokenizer)
        self.new_cache(self.policy)  # refuses a model that no cache can serve

    def fitted(self, prompt_tokens: int) -> Policy:
        """The policy for a prompt of so many tokens."""
        policy = constrained(self.policy, **self.constraints)
        if self.budget is None:
            return policy
        return self.budget.policy(policy, prompt_tokens, self.fixed)[0]

    def new_cache(self, policy: Policy) -> EvictionCache:
        return EvictionCache(self.model, policy, **self.cache_options)

    # --- what lm-eval asks --------------------------------------------------------------------

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        shortest = int(generation_kwargs["attention_mask"].sum(-1).min())
        cache = self.new_cache(self.fitted(shortest))
        return super()._model_generate(
            context, max_length, stop, **{CACHE_ARGUMENT: cache}, **generation_kwargs
        )

    def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("one forward pass over everything would be a full cache")

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Scored]:
        # A context that is too long for the model loses its beginning, as in HFLM.
        rooms = (max(1, self.max_length + 1 - len(target)) for *_, target in requests)
        pairs = [(c[-room:], t) for (_, c, t), room in zip(requests, rooms, strict=True)]
        lengths = [len(context) for context, _ in pairs]
        scores = self._score(pairs, lengths, "loglikelihood", disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = self._windows(self.tok_encode(request.args[0]))
            pairs += windows
            owners += [owner] * len(windows)
        lengths = [len(context) + len(target) - 1 for context, target in pairs]
        totals = [0.0] * len(requests)
        scores = self._score(pairs, lengths, "loglikelihood_rolling", disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- scoring ------------------------------------------------------------------------------

    def _windows(self, tokens: list[int]) -> list[Pair]:
        """The parts of a text that are each scored with one cache, after the prefix token.

        A text is one part, unless it is longer than the model's context and the method would attend
        more entries than that, or positions are the true ones: then parts are HFLM's windows.
        """
        limit = self.max_length
        if len(tokens) > limit and self.cache_options["positions"] == "cache":
            steps = [self.chunk] * -(-len(tokens) // self.chunk)
            most = max(self.fitted(len(tokens)).lengths(steps))
            if most + self.chunk <= limit:
                limit = len(tokens)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, limit, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _score(
        self, pairs: list[Pair], prompt_tokens: list[int], name: str, disable_tqdm: bool
    ) -> list[Scored]:
        """Scores in the order of `pairs`. Equal contexts are put into one batch where possible.

        Args:
            prompt_tokens: tokens that a fractional budget is a fraction of, per pair.
        """
        # Longest first: if memory runs out, it does so at once. Contexts of one token have no
        # prompt step, so they never share a batch with longer ones.
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i]))
        scores: dict[int, Scored] = {}
        progress = tqdm(total=len(pairs), desc=f"Running {name} requests", disable=disable_tqdm)
        for _, group in groupby(order, key=lambda i: len(pairs[i][0]) > 1):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                policy = self.fitted(min(prompt_tokens[i] for i in batch))
                found = self._score_batch([pairs[i] for i in batch], policy)
                scores |= zip(batch, found, strict=True)
                progress.update(len(batch))
        progress.close()
        return [scores[i] for i in range(len(pairs))]

    def _score_batch(self, pairs: list[Pair], policy: Policy) -> list[Scored]:
        """Teacher-forced decoding of the continuations with one cache."""
        cache = self.new_cache(policy)
        prompts = [tuple(context[:-1]) for context, _ in pairs]
        mask = torch.ones(len(pairs), 0, dtype=torch.int64, device=self.device)
        if prompts[0]:
            distinct = list(dict.fromkeys(prompts))
            ids, mask = self._padded(distinct, side="left")
            self._step(cache, ids, mask)
            rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
            cache.batch_select_indices(rows)
            mask = mask[rows]

        # Rows that have ended are fed padding, and the result is ignored.
        inputs, _ = self._padded([[*c[-1:], *target[:-1]] for c, target in pairs], side="right")
        targets, counts = self._padded([target for _, target in pairs], side="right")
        total = torch.zeros(len(pairs), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(pairs), dtype=torch.bool, device=self.device)
        for start in range(0, inputs.shape[1], self.chunk):
            now = slice(start, start + self.chunk)
            mask = torch.cat([mask, torch.ones_like(inputs[:, now])], dim=1)
            logits = self._step(cache, inputs[:, now], mask)
            found = log_softmax(logits, dim=-1, dtype=self.softmax_dtype or torch.float32)
            found = found.gather(-1, targets[:, now, None]).squeeze(-1)
            valid = counts[:, now].bool()
            total += found.double().where(valid, 0).sum(-1)
            greedy &= ((logits.argmax(-1) == targets[:, now]) | ~valid).all(-1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _step(self, cache: EvictionCache, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of a step's tokens, [rows, new, vocab]; of a prompt only the last are computed.

        Args:
            ids: int64 [rows, new].
            mask: int64 [rows, seen + new], 0 in padding.
        """
        new = ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        with (
            torch.inference_mode(),
            torch.autocast(
                self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            return self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                **{CACHE_ARGUMENT: cache},
                logits_to_keep=min(new, self.chunk),
            ).logits

    def _padded(self, rows: Iterable[Any], side: str) -> tuple[Tensor, Tensor]:
        """Token ids, and 1 where they are not padding: two int64 [rows, longest]."""
        rows = [torch.tensor(row, device=self.device) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, True, self.tokenizer.pad_token_id, padding_side=side
        )
        ones = [torch.ones_like(row) for row in rows]
        return ids, torch.nn.utils.rnn.pad_sequence(ones, True, 0, padding_side=side)


def _make_policy(method: str, arguments: dict[str, Any]) -> tuple[Policy, frozenset[str]]:
    """The policy, and the names of its parameters that were given: taken out of `arguments`."""
    if method not in POLICIES:
        raise ConfigError("method", method, f"choose one of {', '.join(POLICIES)}")
    names = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in POLICIES.items()}
    known = {name for fields in names.values() for name in fields}
    given = {name: arguments.pop(name) for name in known & arguments.keys()}
    for name, value in given.items():
        if name not in names[method]:
            takes = ", ".join(names[method]) or "none"
            raise ConfigError(name, value, f"{method} has no such parameter; it takes {takes}")
    return POLICIES[method](**given), frozenset(given)


def main() -> int:
    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
