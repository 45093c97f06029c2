"""Whole pages and agreeing heads: what is kept, for how long, and that a budget still holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS
from runs import read
from tiny import prompt, tiny

from baselines import FullPolicy, H2OPolicy, LocalPolicy, PyramidKVPolicy, StreamingLLMPolicy
from buzz import (
    POLICIES,
    Budget,
    BuzzPolicy,
    ConfigError,
    Constrained,
    EvictionCache,
    ForkedCache,
    HoneycombPolicy,
    Policy,
)
from buzz.granularity import added, constrained, ranked

PAGE = 4
TOKENS = 61
EVICTING = {name: method for name, method in METHODS.items() if method.evicts != "never"}
KINDS = [("token", "layer"), ("token", "all")] + [
    (f"page:{PAGE}", heads) for heads in ("each", "layer", "all")
]


def served(name: str, granularity: str, heads: str) -> Constrained | None:
    """A method at 24 entries under constraints, or None if its layers cannot agree."""
    if heads == "all" and name == "pyramid_kv":
        return None
    method = EVICTING[name]
    if heads == "all" and isinstance(method, HoneycombPolicy):
        method = dataclasses.replace(method, layers="flat")
    policy = constrained(method, granularity, heads=heads)
    assert isinstance(policy, Constrained)
    return policy


def check_kept(cache: EvictionCache, policy: Constrained, seen: int) -> None:
    """Whole pages but for the newest, and the same where heads agree."""
    kept = [cache.kept_positions(layer) for layer in range(3)]
    for positions in kept:
        pages = positions // policy.page
        for own in pages.flatten(0, 1):
            for page in own.unique().tolist():
                due = min(policy.page, seen - page * policy.page)
                assert (own == page).sum() == due, (policy, page)
        if seen % policy.page and policy.page > 1:
            assert (positions[..., -1] == seen - 1).all(), policy
        if policy.heads != "each":
            assert (positions == positions[:, :1]).all(), policy
    if policy.heads == "all":
        assert all(torch.equal(kept[0], own) for own in kept), policy


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_what_stays_are_whole_pages_on_which_heads_agree(kind) -> None:
    """Every method alone and as a row of a pass: lengths as predicted, and the same entries."""
    model, steps = tiny(), [1] * 14 + [3, 1]
    policies = [own for name in EVICTING if (own := served(name, *kind)) is not None]
    ids = prompt(TOKENS + sum(steps), seed=3)
    forked = ForkedCache(model, [*policies, *EVICTING.values()])
    model(ids[:, :TOKENS], past_key_values=forked)
    rows, seen, logits = ids.expand(len(forked.forks), -1), TOKENS, []
    for new in steps:
        logits.append(model(rows[:, seen : seen + new], past_key_values=forked).logits[:, -1])
        seen += new
    for row, policy in enumerate(policies):
        cache, seen = EvictionCache(model, policy), 0
        for step, new in enumerate([TOKENS, *steps]):
            out = model(ids[:, seen : seen + new], past_key_values=cache).logits[:, -1]
            seen += new
            due = [
                policy.for_layer(layer, 3).lengths([TOKENS, *steps[:step]])[-1]
                for layer in range(3)
            ]
            assert cache.lengths == due, policy
            check_kept(cache, policy, seen)
            if step:
                torch.testing.assert_close(logits[step - 1][row], out[0], rtol=0, atol=2e-4)
        fork = forked.forks[row]
        assert fork.lengths == cache.lengths and fork.evictions == cache.evictions, policy
        assert min(cache.evictions) >= (1 if policy.evicts == "prompt" else 2), policy
        for layer in range(3):
            assert torch.equal(fork.kept_positions(layer), cache.kept_positions(layer)), policy


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_prompts_end_keeps_what_the_models_own_weights_say(kind) -> None:
    """H2O's sums, from the attention weights that the stock model gives."""
    model, ids = tiny(attention="eager"), prompt(TOKENS, seed=5)
    weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0].double()
    received = weights.sum(-2).unflatten(1, (2, 2)).sum(2)  # [layers, kv_heads, tokens]
    granularity, heads = kind
    if heads == "layer":
        received = received.sum(1, keepdim=True).expand_as(received)
    elif heads == "all":
        received = received.sum((0, 1), keepdim=True).expand_as(received)
    page = int(granularity.partition(":")[2] or 1)
    policy = constrained(H2OPolicy(heavy=12, recent=12), granularity, heads=heads)
    cache = EvictionCache(model, policy)
    model(ids, past_key_values=cache)
    heavy, recent = 12 // page, 12 // page
    for layer, heads_of in enumerate(received):
        for head, scores in enumerate(heads_of):
            pages = scores.split(page)  # the last one has a token
            best = sorted(range(len(pages) - recent), key=lambda i: -pages[i].sum())[:heavy]
            stay = [*sorted(best), *range(len(pages) - recent, len(pages))]
            due = [i for p in stay for i in range(p * page, min(TOKENS, (p + 1) * page))]
            assert cache.kept_positions(layer)[0, head].tolist() == due, (layer, head)


def test_what_a_method_keeps_in_any_case_comes_first() -> None:
    inf = torch.inf
    pages = torch.tensor([[[9.0, 9], [inf, -9], [1, inf], [inf, inf], [2, 12]]])

    def order(highest: bool = False) -> list[int]:
        return ranked(added(pages, -1, highest)).argsort(descending=True)[0].tolist()

    assert order() == [3, 2, 1, 0, 4] and order(highest=True) == [3, 2, 1, 4, 0]
    pages[0, 0, 0] = -inf  # which no sum makes up for
    assert order()[-1] == 0
    assert ranked(added(torch.tensor([[1.0, 5], [2, 2]]), -1)).tolist() == [6, 4]
    two = torch.tensor([[[3.0, 1.0], [2.0, 5.0]]])  # of two heads
    assert ranked(added(two, 1)).tolist() == [[5.0, 6.0]]


@pytest.mark.parametrize("page_score", ["mean", "max"])
@pytest.mark.parametrize("heads", ["each", "layer", "all"])
def test_of_pages_that_a_method_keeps_in_any_case_the_one_with_more_comes_first(
    page_score, heads
) -> None:
    """Whatever the others of its tokens have, and also where heads sum their scores before."""
    inf = torch.inf
    pages = [[inf, 9, 9, 9], [0, inf, 0, inf], [9, 9, 9, 9], [inf, 0, 0, 0], [0, 0, 0, 0]]
    scores = torch.tensor(pages).flatten().expand(1, 2, -1)
    if heads == "all":  # summed over layers
        scores = added(scores, 1)[:, None]
    for room, due in ((1, [1]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        policy = Constrained(
            method=H2OPolicy(),
            granularity="page:4",
            page_score=page_score,
            heads=heads,
            pages=H2OPolicy(heavy=room, recent=1),
        )
        more = torch.zeros(*scores.shape[:2], 4, dtype=scores.dtype)
        kept = policy.select(24, 0, torch.cat([scores, more], dim=-1))
        whole = [page for page in range(5) if 4 * page in kept[0, -1].tolist()]
        assert whole == due


@pytest.mark.parametrize("heads", ["each", "layer"])
@pytest.mark.parametrize("page_score", ["mean", "max"])
@pytest.mark.parametrize("low", [-9.0, -torch.inf, torch.finfo(torch.float32).min])
def test_one_very_low_score_leaves_the_order_of_other_pages(page_score, heads, low) -> None:
    inf = torch.inf
    pages = [[inf, -1, -1, -1], [inf, -3, -3, -3], [inf, -5, -5, -5], [low, -9, -9, -9], [0] * 4]
    policy = Constrained(
        method=H2OPolicy(),
        granularity="page:4",
        page_score=page_score,
        heads=heads,
        pages=H2OPolicy(heavy=2, recent=1),
    )
    kept = policy.select(20, 0, torch.tensor(pages).flatten().expand(1, 1, -1))
    assert {0, 4} <= set(kept[0, 0].tolist()) and 8 not in kept[0, 0].tolist()


def test_a_page_is_worth_its_mean_or_its_best_token() -> None:
    scores = torch.tensor([[[3.0, 3, 3, 3, 8, 0, 0, 0, 1, 1]]])
    for page_score, first in (("mean", 0), ("max", 4)):
        policy = Constrained(
            method=H2OPolicy(heavy=4, recent=4), granularity="page:4", page_score=page_score
        )
        assert policy.next_length(10, 0)[0] == 6
        kept = policy.select(10, 0, scores)
        assert kept.tolist() == [[[first, first + 1, first + 2, first + 3, 8]]]  # and the last


@torch.inference_mode()
@pytest.mark.parametrize("heads", ["each", "all"])
def test_batches_chunks_copies_and_order_change_nothing(heads) -> None:
    """A padded batch in chunks, whose rows are copied and change places, is its rows alone."""
    model, names = tiny(), ["h2o", "buzz", "streaming_llm", "defensive_kv", "knorm", "kvzip"]
    long, short, later = prompt(TOKENS, seed=1), prompt(45, seed=2), prompt(12, 2, seed=4)
    ids = torch.cat([long, torch.nn.functional.pad(short, (TOKENS - 45, 0))])
    mask = (ids != 0).long()
    for name in names:
        policy = served(name, f"page:{PAGE}", heads)
        alone, due = [], []
        for row, own in enumerate((long, short)):
            cache = EvictionCache(model, policy)
            inputs = torch.cat([own, later[row : row + 1]], 1)
            model(own, past_key_values=cache)
            for token in range(own.shape[1], inputs.shape[1]):
                out = model(inputs[:, token : token + 1], past_key_values=cache).logits
            alone.append([cache.kept_positions(layer)[0] for layer in range(3)])
            due.append(out[0, -1])
        cache = EvictionCache(model, policy, hold_until=TOKENS)
        for new in (slice(0, 20), slice(20, TOKENS)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, new]
            so_far = mask[:, : new.stop]
            model(ids[:, new], attention_mask=so_far, position_ids=positions, past_key_values=cache)
        copies = [cache.copy(), cache]
        copies[0].reorder_cache(torch.tensor([1, 0]))
        for one, order in zip(copies, ([1, 0], [0, 1]), strict=True):
            for step, token in enumerate(later[order].split(1, 1)):
                at = torch.tensor([[[TOKENS, 45][row] + step] for row in order])
                out = model(token, position_ids=at, past_key_values=one).logits
            for row, was in enumerate(order):
                torch.testing.assert_close(out[row, -1], due[was], rtol=0, atol=2e-4)
                for layer in range(3):
                    kept = one.kept_positions(layer)[row]
                    own = alone[was][layer]
                    assert torch.equal(kept[:, -own.shape[1] :], own), name
                    assert (kept[:, : -own.shape[1]] == -1).all(), name


names = st.sampled_from(sorted(name for name in POLICIES if POLICIES[name].evicts != "never"))
pages_of = st.sampled_from([4, 16, 64])


@settings(max_examples=150)
@given(names, pages_of, st.integers(7, 90), st.integers(0, 63), st.integers(1, 40_000))
def test_by_peak_whole_pages_stay_within_the_budget(name, page, count, more, prompt) -> None:
    """As many as there is room for; the newest counts as one."""
    entries = count * page + more % page
    policy, _ = Budget(entries).policy(constrained(POLICIES[name](), f"page:{page}"), prompt)
    lengths = policy.lengths([prompt] + [1] * 150 + [7, 70])
    seen = prompt
    for held, new in zip(lengths, [*[1] * 150, 7, 70, 0], strict=True):
        assert (seen - held) % page == 0  # what has left are whole pages
        if policy.evicts == "always":
            assert held <= count * page
        seen += new
    assert lengths[0] <= count * page
    if policy.evicts == "always":
        assert policy.footprint().peak == count * page
    elif prompt > entries:
        assert lengths[0] > (count - 1) * page


@settings(max_examples=150)
@given(names, pages_of, st.integers(7, 60), st.integers(0, 63))
def test_by_mean_whole_pages_stay_within_the_budget(name, page, count, more) -> None:
    entries = count * page + more % page
    asked = constrained(POLICIES[name](), f"page:{page}", heads="layer")
    policy, _ = Budget(entries, "mean").policy(asked, 10 * entries)
    if policy.evicts == "always":
        assert entries - 2 * page < policy.footprint().mean <= entries


@given(names, st.integers(40, 4096), st.sampled_from(["peak", "mean"]), st.integers(1, 9999))
def test_heads_that_agree_hold_what_each_would(name, entries, by, prompt) -> None:
    alone, _ = Budget(entries, by).policy(POLICIES[name](), prompt)
    agreed, _ = Budget(entries, by).policy(constrained(POLICIES[name](), heads="layer"), prompt)
    assert agreed == constrained(alone, heads="layer")
    steps = [prompt] + [1] * 50
    assert agreed.lengths(steps) == alone.lengths(steps)


@dataclass(frozen=True, kw_only=True)
class First(LocalPolicy):
    """Keeps the first entries; nothing says that the newest page must stay."""

    name: ClassVar[str] = "first"
    num_recent: ClassVar[int] = 0

    def select(self, cache_length: int, state: Any, scores: Any) -> torch.Tensor:
        return torch.arange(self.window).expand(1, 1, -1)


def test_a_page_that_fills_up_stays_whatever_a_method_says() -> None:
    policy = Constrained(method=First(window=12), granularity="page:4")
    assert policy.next_length(18, 0)[0] == 10
    assert policy.select(18, 0, None).flatten().tolist() == [*range(8), 16, 17]
    assert policy.select(20, 0, None).flatten().tolist() == list(range(12))


def test_without_constraints_a_method_is_itself() -> None:
    policy = BuzzPolicy()
    assert constrained(policy) is policy and constrained(policy, "page:1") is policy
    assert constrained(FullPolicy(), "page:16", heads="all") == FullPolicy()
    hive = Constrained(method=policy, granularity="page:16")
    pages = BuzzPolicy(sink=1, window=10, threshold=24)
    steps = [1000] + [1] * 999
    assert hive.lengths(steps) == dataclasses.replace(hive, pages=pages).lengths(steps)
    assert hive.footprint().peak == 35 * 16


@dataclass(frozen=True, kw_only=True)
class OwnSize(Policy):
    """Keeps the last `slots` entries: a size by a name that no method of this project has."""

    name: ClassVar[str] = "own_size"
    num_recent: ClassVar[int] = 0

    slots: int = 64

    def next_length(self, cache_length: int, state: Any) -> tuple[int, Any]:
        return min(cache_length, self.slots), 0

    def select(self, cache_length: int, state: Any, scores: Any) -> torch.Tensor:
        return torch.arange(cache_length - self.slots, cache_length).expand(1, 1, -1)

    def fit(self, budget: int, fixed: frozenset[str] = frozenset(), by: Any = "peak") -> Policy:
        return self if "slots" in fixed else self._replace(budget, slots=budget)


def test_a_size_of_any_name_is_in_pages_once_there_is_a_budget() -> None:
    policy, _ = Budget(100).policy(constrained(OwnSize(), "page:16"), 1000)
    assert policy.pages == OwnSize(slots=6) and policy.footprint().peak == 96


def test_an_unbounded_method_keeps_its_sizes_in_pages() -> None:
    with pytest.warns(UserWarning, match="unbounded"):
        hive = BuzzPolicy(sink=4, window=160, stride=2, threshold=400)
        policy = constrained(hive, "page:16")
        assert policy.num_recent == 9 * 16 + 1 and policy.lengths([1000]) == [584]


@pytest.mark.parametrize(
    ("method", "given", "field", "says"),
    [
        (H2OPolicy(), {"granularity": "pages"}, "cache.granularity", "e.g. page:16"),
        (H2OPolicy(), {"granularity": "page:0"}, "cache.granularity", "e.g. page:16"),
        (H2OPolicy(), {"granularity": 16}, "cache.granularity", "e.g. page:16"),
        (H2OPolicy(), {"heads": "some"}, "cache.heads", "choose each, layer or all"),
        (H2OPolicy(), {"page_score": "max"}, "cache.page_score", "set cache.granularity too"),
        (
            H2OPolicy(),
            {"granularity": "page:16", "page_score": "sum"},
            "cache.page_score",
            "choose mean or max",
        ),
        (H2OPolicy(), {"granularity": "page:1024"}, "cache.granularity", "of 560 entries"),
        (H2OPolicy(), {"granularity": "page:512"}, "cache.granularity", "has room for (1)"),
        (OwnSize(), {"granularity": "page:16"}, "cache.granularity", "would hold 64 pages; give a"),
        (PyramidKVPolicy(), {"heads": "all"}, "cache.heads", "choose each or layer"),
        (HoneycombPolicy(layers="late"), {"heads": "all"}, "cache.heads", "choose each or layer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method, given, field, says) -> None:
    with pytest.raises(ConfigError) as caught:
        constrained(method, **given).next_length(1, 0)
    assert caught.value.field == field and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "page", "budget", "says"),
    [
        (H2OPolicy(), 64, 40, "a page exceeds the budget of 40 entries"),
        (StreamingLLMPolicy(), 64, 100, "has room for (1)"),
        (BuzzPolicy(), 16, 60, "has room for (3)"),
    ],
)
def test_a_page_that_exceeds_the_budget_is_refused(method, page, budget, says) -> None:
    with pytest.raises(ConfigError, match="^cache.granularity=") as caught:
        Budget(budget).policy(constrained(method, f"page:{page}"), 1000)
    assert says in str(caught.value)


def test_sizes_that_were_set_are_rounded_up_to_pages() -> None:
    asked = constrained(H2OPolicy(heavy=70, recent=90), "page:16")
    policy, _ = Budget(320).policy(asked, 1000, frozenset({"recent"}))
    assert policy.pages == H2OPolicy(recent=6, heavy=14)
    with pytest.raises(ConfigError, match=r"holds 176 and not 160 .* method.heavy=70"):
        Budget(160).policy(asked, 1000, frozenset({"heavy", "recent"}))


@torch.inference_mode()
def test_an_error_while_layers_choose_together_is_told(monkeypatch) -> None:
    model, ids = tiny(), prompt(TOKENS)
    cache = EvictionCache(model, served("h2o", "token", "all"))
    last = cache.evicting[-1]
    thin = type(last).thin
    monkeypatch.setattr(last, "thin", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="no longer hold the same"):
        model(ids[:, :1], past_key_values=cache)
    monkeypatch.setattr(last, "thin", thin.__get__(last))
    cache.reset()
    model(ids, past_key_values=cache)
    assert cache.lengths == [24] * 3


def test_rows_of_a_command_are_of_one_setting(go) -> None:
    """Methods and constraints in one pass, each as it is alone."""
    kinds = {
        "": [],
        ",granularity=page16": ["cache.granularity=page:16"],
        ",granularity=page16,heads=all": ["cache.granularity=page:16", "cache.heads=all"],
        ",heads=layer": ["cache.heads=layer"],
    }
    files = {}
    for name, options in kinds.items():
        files[name] = go("method=h2o", "budget=0.25", *options)
        assert files[name].name == f"h2o@0.25{name}.jsonl"
    assert len({file.parent for file in files.values()}) == 1
    full = go("method=full", "cache.granularity=page:16", "cache.heads=all")
    assert full.name == "full.jsonl"
    for name, file in files.items():
        for record in read(file):
            told = record["cache"]
            heads = name.partition("heads=")[2] or "each"
            assert told["granularity"] == ("page:16" if "page" in name else "token")
            assert told["heads"] == heads and told["page_score"] == "mean"
            held = record["kv_entries_peak"]
            assert held <= 0.25 * record["prompt_tokens"] + 1


@pytest.mark.parametrize("name", ["tova", "streaming_llm", "lag_kv", "honeycomb"])
def test_by_mean_a_size_that_was_set_and_exceeds_the_budget_is_refused(name) -> None:
    sizes = frozenset(vars(POLICIES[name]())) & {"size", "window"}
    with pytest.raises(ConfigError, match="leave out method"):
        Budget(100, "mean").policy(constrained(POLICIES[name](), "page:16"), 2000, sizes)


@pytest.mark.parametrize("budget", [48, 64, 100, 250])
@pytest.mark.parametrize("page", [16, 128])
def test_pages_leave_every_layer_room_or_are_refused_with_the_budget(budget, page) -> None:
    """Layers of small budgets of their own, and sizes that pages make small."""
    for name in ("honeycomb", "pyramid_kv", "lag_kv", "compactor"):
        try:
            policy, _ = Budget(budget).policy(constrained(POLICIES[name](), f"page:{page}"), 2000)
        except ConfigError as error:
            assert error.field == "cache.granularity", error
            continue
        for index in range(30):
            assert max(policy.for_layer(index, 30).lengths([2000, *[1] * 40])) > 0
