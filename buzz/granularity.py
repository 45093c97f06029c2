"""What a server can free: whole pages of tokens, which all heads of a layer, or of all, agree on.

A constraint comes between a method's scores and its choice, and changes neither. Tokens are scored
by the method as it is. It then chooses among pages as among entries, with its sizes in pages
(`window`, `heavy`, `capacity`, ...): a beehive has cells of pages, StreamingLLM sinks of pages.
Heads that agree choose by the sum of their scores.

A page is `page` tokens that came one behind the other, so that what is held at any time are whole
pages and the newest, which fills up: entry i of a row is on page i // page, and where pages are
follows from lengths alone. It counts as a page from its first token on, and stays until it is full.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from buzz.errors import ConfigError
from buzz.policy import FOREVER, BudgetBy, Policy, State

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from buzz.entries import Entries

PageScore = Literal["mean", "max"]
Heads = Literal["each", "layer", "all"]

# Parameters that count entries, by the names that methods give them; others `fit` must set.
SIZES = {
    "size",
    "every",
    "sink",
    "window",
    "heavy",
    "recent",
    "capacity",
    "keep",
    "threshold",
    "lag",
}
PROMPT = 2**20  # tokens of a prompt that no method keeps


@dataclass(frozen=True, kw_only=True)
class Constrained(Policy):
    """A method of which whole pages leave, or whose heads agree on what does.

    Args:
        method: scores the tokens.
        granularity: ``token``, or ``page:16``, of any number of tokens.
        page_score: what a page is worth: the ``mean`` of its tokens or their ``max``. Those that
            the method keeps in any case (by an infinite score) come first: the more, the sooner.
        heads: ``each`` chooses for itself; those of a ``layer`` choose together, by the sum of
            their scores; or those of ``all`` layers do.
        pages: the method with its sizes in pages, which chooses; None: made of `method` when it is
            first asked, for as many pages as there is room for in what that would hold.

    Raises:
        ConfigError: no such constraint; layers that are to agree and do not hold equally much; and
            with its first use, or where a budget is fitted, pages that are too large.
    """

    method: Policy
    granularity: str = "token"
    page_score: PageScore = "mean"
    heads: Heads = "each"
    pages: Policy | None = None

    def __post_init__(self) -> None:
        check(self.granularity, self.page_score, self.heads)
        if self.heads == "all" and self.method.for_layer(0, 2) != self.method:
            name = self.method.name
            remedy = f"layers of {name} hold different numbers of entries; choose each or layer"
            if hasattr(self.method, "layers"):
                remedy += ", or method.layers=flat"
            raise ConfigError("cache.heads", "all", remedy)

    @property
    def page(self) -> int:
        return page_of(self.granularity)

    @property
    def num_recent(self) -> int:
        """Of the pages that the method protects, what is there when the newest has one token."""
        protected = self._chooser.num_recent
        return (protected - 1) * self.page + 1 if protected else 0

    @property
    def num_pinned(self) -> int:
        return min(FOREVER, self._chooser.num_pinned * self.page)

    @cached_property
    def _chooser(self) -> Policy:
        """What chooses, among pages or entries."""
        if self.page == 1:
            return self.method
        if self.pages:
            return self.pages
        most = _most(self.method)
        pages = self._pages(most, frozenset(vars(self.method)) - SIZES, "peak")
        # Each size was rounded up to a page, at most.
        if most and (held := _most(pages)) > most // self.page + len(_sizes(self.method)):
            remedy = (
                f"{self.method.name} holds {most:,} entries and would hold {held:,} pages; give"
            )
            remedy = (
                f"{remedy} a budget, or name its sizes as others do: {', '.join(sorted(SIZES))}"
            )
            raise ConfigError("cache.granularity", self.granularity, remedy)
        return pages

    def for_layer(self, index: int, layers: int) -> Policy:
        method = self.method.for_layer(index, layers)
        if method == self.method:
            return self
        pages = None if self.page == 1 else self._chooser.for_layer(index, layers)
        return dataclasses.replace(self, method=method, pages=pages)

    def for_tokenizer(self, tokenizer: Any) -> Policy:
        return dataclasses.replace(self, method=self.method.for_tokenizer(tokenizer))

    def for_model(self, model: PreTrainedModel) -> Policy:
        return dataclasses.replace(self, method=self.method.for_model(model))

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        return self.method.repetitions(prompt)

    def next_length(self, held: int, state: State) -> tuple[int, State]:
        """The state is the pages that the last eviction left, and what the method remembers.

        The method is asked with the first token of a page, and not until the next has begun.
        """
        if self.page == 1:
            return self.method.next_length(held, state)
        before, own = state or (0, 0)
        pages = -(-held // self.page)
        if pages == before:
            return held, state
        kept, own = self._chooser.next_length(pages, own)
        return held - (pages - kept) * self.page, (kept, own)

    def score(self, entries: Entries) -> Tensor | None:
        return self.method.score(entries)

    def select(self, held: int, state: State, scores: Tensor | None) -> Tensor:
        if scores is not None and self.heads != "each":
            scores = added(scores, 1)[:, None]
        if self.page == 1:
            scores = ranked(scores) if scores is not None and scores.is_complex() else scores
            return self.method.select(held, state, scores)
        page, own = self.page, (state or (0, 0))[1]
        pages = -(-held // page)
        if scores is not None:
            of_pages = pad(scores, (0, pages * page - held)).unflatten(-1, (pages, page))
            scores = ranked(added(of_pages, -1, self.page_score == "max"))
            if held % page:
                scores[..., -1] = torch.inf
        chosen = self._chooser.select(pages, own, scores)
        recent = torch.arange(pages - self._chooser.num_recent, pages, device=chosen.device)
        stay = torch.cat([chosen, recent.expand(*chosen.shape[:-1], -1)], dim=-1)
        if held % page:
            stay[..., -1] = pages - 1  # also where no score says so
        entries = (stay[..., None] * page + torch.arange(page, device=stay.device)).flatten(-2)
        return entries[..., : entries.shape[-1] - (pages * page - held) - self.num_recent]

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """As many whole pages as the budget has room for; the newest counts as one.

        By mean, what it has of a page on average is taken into account.
        """
        method = self.method.fit(budget, fixed, by)
        pages = None if self.page == 1 else self._pages(budget, fixed, by)
        return dataclasses.replace(self, method=method, pages=pages)

    def _pages(self, budget: int, fixed: frozenset[str], by: BudgetBy) -> Policy:
        """The method for a budget in entries (0: none), with its sizes in pages."""
        if self.method.evicts == "never":
            return self.method
        if 0 < budget < self.page:
            remedy = f"a page exceeds the budget of {budget} entries; take smaller pages"
            raise ConfigError("cache.granularity", self.granularity, remedy)
        room = budget // self.page
        least = {"lag": 2, "size": room, "capacity": room}  # what `fit` sets must first be valid
        sizes = {
            name: max(-(-size // self.page), 0 if name in fixed else least.get(name, 0))
            for name, size in _sizes(self.method).items()
        }
        try:
            whole = dataclasses.replace(self.method, **sizes)
            if not budget:  # the method has no bound, and pages have none
                return whole
            if by == "peak" or self.method.evicts == "prompt":
                return whole.fit(room, fixed)
            return self._by_mean(whole, budget, fixed)
        except ConfigError as error:
            remedy = f"{self.method.name} needs more pages than a budget of {budget} entries has"
            remedy = f"{remedy} room for ({room}); take smaller ones, or a larger budget"
            raise ConfigError("cache.granularity", self.granularity, remedy) from error

    def _by_mean(self, whole: Policy, budget: int, fixed: frozenset[str]) -> Policy:
        """The most pages whose entries are within the budget on average."""
        for count in range(budget // self.page + 3, 0, -1):
            pages = whole.fit(count, fixed, "mean")
            if dataclasses.replace(self, pages=pages).footprint().mean <= budget:
                break
        return pages  # where `fixed` lets none be small enough, the budget's check says so


def _forwarded(name: str) -> property:
    return property(lambda policy: getattr(policy.method, name))


for _name in (
    *("name", "needs_scores", "needs_projection", "needs_repetition", "evicts"),
    *("score_rule", "observe", "decay", "queries", "moments_from", "needs_rotation"),
):
    setattr(Constrained, _name, _forwarded(_name))


def added(scores: Tensor, dim: int, highest: bool = False) -> Tensor:
    """Sums of scores along a dimension, or their maxima, in the form that :func:`ranked` takes.

    An entry that a method keeps in any case has an infinite score, beside which a sum would lose
    all others. So infinite scores are counted apart, by the imaginary part: the real part is of the
    finite ones.

    Args:
        scores: real, or what an earlier sum returned.

    Returns:
        complex128, without the dimension.
    """
    if not scores.is_complex():
        scores = scores.double()
        sure = scores == torch.inf
        least = scores.amin(-1, keepdim=True).nan_to_num(posinf=0) if highest else 0
        finite = torch.where(sure, least, scores).clamp(min=-1e200)
        scores = torch.complex(finite, sure.double())
    finite, counted = scores.real, scores.imag
    return torch.complex(finite.amax(dim) if highest else finite.sum(dim), counted.sum(dim))


def ranked(sums: Tensor) -> Tensor:
    """float64 [..., n] that orders sums [..., n]: the more infinite scores, the higher."""
    spread = sums.real.amax(-1, keepdim=True) - sums.real.amin(-1, keepdim=True)
    return sums.real + sums.imag * (1 + 2 * spread)


def page_of(granularity: Any) -> int:
    """Tokens that leave together.

    Raises:
        ConfigError: it names no granularity.
    """
    if granularity == "token":
        return 1
    if not isinstance(granularity, str) or not re.fullmatch(r"page:[1-9]\d{0,8}", granularity):
        remedy = "choose token, or pages of a number of tokens, e.g. page:16"
        raise ConfigError("cache.granularity", granularity, remedy)
    return int(granularity[5:])


def check(granularity: Any, page_score: Any, heads: Any) -> None:
    """Raises ConfigError where there is no such constraint."""
    page = page_of(granularity)
    if page_score not in get_args(PageScore):
        raise ConfigError("cache.page_score", page_score, "choose mean or max")
    if page_score == "max" and page == 1:
        remedy = "is of pages, and there are none: set cache.granularity too, e.g. page:16"
        raise ConfigError("cache.page_score", page_score, remedy)
    if heads not in get_args(Heads):
        raise ConfigError("cache.heads", heads, "choose each, layer or all")


def constrained(
    method: Policy, granularity: str = "token", page_score: str = "mean", heads: str = "each"
) -> Policy:
    """The method under these constraints; itself where there are none, or where none matters.

    Raises:
        ConfigError: as :class:`Constrained`.
    """
    check(granularity, page_score, heads)
    if method.evicts == "never" or (page_of(granularity) == 1 and heads == "each"):
        return method
    own: dict[str, Any] = {"page_score": page_score, "heads": heads}
    return Constrained(method=method, granularity=granularity, **own)


def _sizes(method: Policy) -> dict[str, int]:
    """A method's parameters that count entries."""
    own = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in own.items() if name in SIZES}


def _most(method: Policy) -> int:
    """The most entries that it leaves of a long prompt, and of steps after it; 0: no such bound."""
    if method.evicts == "prompt":
        return method.footprint(PROMPT).after_prompt
    peak = method.footprint().peak if method.evicts == "always" else 0
    return 0 if peak == math.inf else int(peak)
