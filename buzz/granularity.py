"""Eviction of whole pages of tokens, and by all heads alike: the memory that a server can free.

A constraint stands between a method's scores and its choice. The method scores tokens as ever. Then
it chooses among pages as it does among entries, with its sizes in pages (`window`, `heavy`,
`capacity`, ...): BUZZ has cells of pages, StreamingLLM has sinks of pages. Heads that agree choose
by the sum of their scores.

A page is `page` consecutive tokens of the text. The cache always consists of whole pages and the
newest one, which fills up: entry i of a row is on page i // page. The newest counts as a page from
its first token on, and stays until it is full.
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

# Names of parameters that count entries. A size of any other name must be set by `fit`.
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
PROMPT = 2**20  # tokens of a prompt that is longer than any capacity


@dataclass(frozen=True, kw_only=True)
class Constrained(Policy):
    """A method that evicts whole pages, or the same entries in several heads.

    Args:
        method: scores the tokens.
        granularity: ``token``, or ``page:16`` with any number of tokens.
        page_score: a page's score: the ``mean`` of its tokens' or the ``max``. Infinite scores, of
            entries that the method always keeps, come first: the more a page has, the higher it
            ranks.
        heads: ``each`` KV head chooses for itself; those of a ``layer``, or of ``all`` layers,
            choose together by the sum of their scores.
        pages: the method with its sizes in pages, which chooses. None: derived from `method` at its
            first use, with as many pages as fit into the cache length of `method`.

    Raises:
        ConfigError: no such constraint; `heads` is ``all`` and layers have different cache lengths.
            At its first use, or when a budget is fitted: pages that are too large; a size in pages
            that is not known to be one.
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
        """Entries of the last pages that always stay, when the newest page has one token."""
        recent = self._chooser.num_recent
        return (recent - 1) * self.page + 1 if recent else 0

    @property
    def num_pinned(self) -> int:
        return min(FOREVER, self._chooser.num_pinned * self.page)

    @cached_property
    def _chooser(self) -> Policy:
        """The method that chooses, among pages or entries."""
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

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        """The state is the number of pages after the last step, and the method's own state.

        The method is called once for each page, with its first token.
        """
        if self.page == 1:
            return self.method.next_length(cache_length, state)
        before, own = state or (0, 0)
        pages = -(-cache_length // self.page)
        if pages == before:
            return cache_length, state
        kept, own = self._chooser.next_length(pages, own)
        return cache_length - (pages - kept) * self.page, (kept, own)

    def score(self, entries: Entries) -> Tensor | None:
        return self.method.score(entries)

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        if scores is not None and self.heads != "each":
            scores = added(scores, 1)[:, None]
        if self.page == 1:
            scores = ranked(scores) if scores is not None and scores.is_complex() else scores
            return self.method.select(cache_length, state, scores)
        page, own = self.page, (state or (0, 0))[1]
        pages = -(-cache_length // page)
        missing = pages * page - cache_length  # tokens of the newest page
        if scores is not None:
            of_pages = pad(scores, (0, missing)).unflatten(-1, (pages, page))
            scores = ranked(added(of_pages, -1, self.page_score == "max"))
            if missing:
                scores[..., -1] = torch.inf
        chosen = self._chooser.select(pages, own, scores)
        recent = torch.arange(pages - self._chooser.num_recent, pages, device=chosen.device)
        stay = torch.cat([chosen, recent.expand(*chosen.shape[:-1], -1)], dim=-1)
        if missing:
            stay[..., -1] = pages - 1  # also of a method without scores
        entries = (stay[..., None] * page + torch.arange(page, device=stay.device)).flatten(-2)
        return entries[..., : entries.shape[-1] - missing - self.num_recent]

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """As many whole pages as fit into the budget; the newest counts as one.

        ``mean``: the newest page counts with the tokens that it has on average.
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
            if not budget:  # of an unbounded method
                return whole
            if by == "peak" or self.method.evicts == "prompt":
                return whole.fit(room, fixed)
            return self._by_mean(whole, budget, fixed)
        except ConfigError as error:
            remedy = f"{self.method.name} needs more pages than a budget of {budget} entries has"
            remedy = f"{remedy} room for ({room}); take smaller ones, or a larger budget"
            raise ConfigError("cache.granularity", self.granularity, remedy) from error

    def _by_mean(self, whole: Policy, budget: int, fixed: frozenset[str]) -> Policy:
        """The largest number of pages whose entries are within the budget on average."""
        for count in range(budget // self.page + 3, 0, -1):
            pages = whole.fit(count, fixed, "mean")
            if dataclasses.replace(self, pages=pages).footprint().mean <= budget:
                break
        return pages  # if `fixed` makes all of them too large, `Budget` refuses them


def _forwarded(name: str) -> property:
    return property(lambda policy: getattr(policy.method, name))


for _name in (
    *("name", "needs_scores", "needs_projection", "needs_repetition", "evicts"),
    *("score_rule", "observe", "decay", "queries", "moments_from", "needs_rotation"),
):
    setattr(Constrained, _name, _forwarded(_name))


def added(scores: Tensor, dim: int, highest: bool = False) -> Tensor:
    """Sums of scores along a dimension, or their maxima; :func:`ranked` makes them real numbers.

    A method gives entries that it always keeps an infinite score. In a sum it would hide all other
    scores, so the imaginary part counts the infinite scores, and the real part sums the finite
    ones.

    Args:
        scores: real, or the result of an earlier sum.

    Returns:
        complex128, without the dimension.
    """
    if scores.is_complex():
        finite, sure = scores.real, scores.imag
        if highest:  # what all heads always keep has no finite score, so it is no page's maximum
            always = (sure > 0) & (sure == sure.amax(-1, keepdim=True))
            finite = torch.where(always, finite.amin(-1, keepdim=True), finite)
    else:
        scores = scores.double()
        sure = scores == torch.inf
        least = scores.amin(-1, keepdim=True).nan_to_num(posinf=0) if highest else 0
        finite = torch.where(sure, least, scores).clamp(min=-1e200)
    finite = finite.amax(dim) if highest else finite.sum(dim)
    return torch.complex(finite, sure.sum(dim).double())


def ranked(sums: Tensor) -> Tensor:
    """Sums [..., n] as float64 [..., n]: those with more infinite scores are always higher.

    Where there are infinite scores, finite ones count by their places, as a difference between two
    of them may be lost beside a third one that is very low.
    """
    finite = sums.real.contiguous()
    places = torch.searchsorted(finite.sort(dim=-1).values, finite)
    by_place = places + sums.imag * (1 + sums.shape[-1])
    return torch.where(sums.imag.amax(-1, keepdim=True) > 0, by_place, finite)


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
    """Raises ConfigError for a constraint that does not exist."""
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
    """The method under these constraints, or itself if they change nothing.

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
    """Maximum cache length: after a long prompt, or of later steps; 0 if it is unbounded."""
    if method.evicts == "prompt":
        return method.footprint(PROMPT).after_prompt
    peak = method.footprint().peak if method.evicts == "always" else 0
    return 0 if peak == math.inf else int(peak)
