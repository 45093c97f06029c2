"""Whatever is done with a cache, in any order: its numbers are right, or the step is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from methods import METHODS
from recomputed import Recorder
from tiny import prompt, tiny

from buzz import ConfigError, EvictionCache

FAMILIES = ["llama", "llama-mqa", "qwen3", "smollm3", "phi3-partial", "cohere-interleaved"]
MOST_TOKENS, MOST_ROWS = 130, 5

load = functools.cache(tiny)
done: Counter[str] = Counter()  # so that a run which tested nothing is noticed


@functools.cache
def twin() -> torch.nn.Module:
    """A model that serves caches, and none of those here."""
    model = tiny("llama", seed=1)
    EvictionCache(model, METHODS["full"])
    return model


class Cache(RuleBasedStateMachine):
    """A cache, and beside it what each row's text should have given.

    The texts are compared with a pass without a cache whenever one ends.
    """

    @initialize(
        data=st.data(),
        family=st.sampled_from(FAMILIES),
        backend=st.sampled_from(["sdpa", "sdpa", "eager"]),
        method=st.sampled_from(sorted(METHODS)),
        positions=st.sampled_from(["cache", "true"]),
        logn=st.sampled_from([None, None, 16.0]),
    )
    def make(self, data, family, backend, method, positions, logn) -> None:
        if METHODS[method].needs_repetition:  # which not every model can be asked for
            family, logn = "llama", None
        self.family, self.model = family, load(family, backend)
        self.cache = EvictionCache(self.model, METHODS[method], positions=positions, logn_base=logn)
        self.recorder: Recorder | None = None
        self.broken = self.gradients = False
        self.tokens = 0  # given out so far, so that they differ
        event(f"{method} at {positions} positions")
        self.prompt(data)

    # --- steps --------------------------------------------------------------------------------

    @precondition(lambda self: self.recorder is None)
    @rule(data=st.data())
    def prompt(self, data) -> None:
        new = data.draw(st.sampled_from([30, 45, 24, 50, 7, 25, 1]), "tokens")
        rows = data.draw(st.integers(1, 3), "rows")
        padding = [data.draw(st.sampled_from([0, 0, new // 3, new - 1])) for _ in range(rows)]
        self.cache.hold_until = data.draw(st.sampled_from([0, 0, 40, 60, 75]), "hold_until")
        self.recorder = Recorder(self.model, self.cache, padding)
        # Whether positions are given, from where they count, and whether they count padding.
        self.first = data.draw(st.sampled_from([None, None, 0, 0, 5]))
        self.step(data, new)

    @precondition(lambda self: self.goes_on)
    @rule(data=st.data(), new=st.sampled_from([10, 15, 20, 2, 30]))
    def chunk(self, data, new) -> None:
        self.step(data, new)

    @precondition(lambda self: self.goes_on)
    @rule(data=st.data(), count=st.sampled_from([10, 14, 5, 1]))
    def decode(self, data, count) -> None:
        for _ in range(count):
            self.step(data, 1)

    def step(self, data, new: int) -> None:
        recorder, seen, hold = self.recorder, self.recorder.seen, self.cache.hold_until
        needs_mask = seen == 0 and any(recorder.padding)
        inputs = self.inputs(new, needs_mask or data.draw(st.booleans(), "with a mask"))
        judged = self.cache.policy.observe is not None
        if judged and 0 < seen < hold < seen + new:
            with pytest.raises(ConfigError, match="hold_until"):
                recorder.step(self.ids(new), **inputs)
            return
        recorder.step(self.ids(new), self.gradients, **inputs)

    def ids(self, new: int) -> torch.Tensor:
        self.tokens += 1
        return prompt(new, len(self.recorder.padding), seed=self.tokens)

    def inputs(self, new: int, masked: bool) -> dict[str, torch.Tensor]:
        mask, given = self.recorder.mask(new), {}
        if masked:
            given["attention_mask"] = mask
        if self.first is not None:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:] + self.first
        return given

    @property
    def goes_on(self) -> bool:
        return self.recorder is not None and not self.broken and self.recorder.seen < MOST_TOKENS

    @property
    def is_long(self) -> bool:
        """Enough for every method to evict."""
        return self.recorder is not None and self.recorder.seen > 50

    @rule(on=st.booleans())
    def record_gradients(self, on) -> None:
        self.gradients = on

    # --- what is done with a cache between steps ----------------------------------------------

    @precondition(lambda self: self.goes_on)
    @rule(data=st.data(), by=st.sampled_from(["batch_select_indices", "reorder_cache"]))
    def select(self, data, by) -> None:
        present = st.integers(0, len(self.recorder.padding) - 1)
        rows = data.draw(st.lists(present, min_size=1, max_size=MOST_ROWS))
        getattr(self.cache, by)(torch.tensor(rows))
        self.recorder.select(rows)

    @precondition(lambda self: self.goes_on and len(self.recorder.padding) < MOST_ROWS // 2)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.recorder.select([r for r in range(len(self.recorder.padding)) for _ in range(repeats)])

    @precondition(lambda self: self.is_long or self.broken)
    @rule()
    def reset(self) -> None:
        self.compare()
        self.cache.reset()
        self.recorder, self.broken = None, False
        assert self.cache.get_seq_length() == 0 and self.cache.trace() == []

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)
        if self.recorder is not None:
            self.recorder.cache = self.cache

    @rule(method=st.sampled_from(["full", "h2o"]))
    def use_the_model_otherwise(self, method) -> None:
        """What else runs on it changes nothing."""
        with torch.no_grad():
            self.model(prompt(9))
            self.model(prompt(40), past_key_values=EvictionCache(self.model, METHODS[method]))

    # --- what must be refused, and must leave no trace ----------------------------------------

    @precondition(lambda self: self.goes_on)
    @rule(data=st.data(), new=st.sampled_from([1, 1, 4]))
    def a_wrong_mask(self, data, new) -> None:
        mask = self.recorder.mask(new)
        row = data.draw(st.integers(0, mask.shape[0] - 1))
        column = data.draw(st.integers(0, mask.shape[1] - 1))
        mask[row, column] = 1 - mask[row, column]
        changed = data.draw(st.sampled_from([mask, mask[:, -new:], mask[:, 1:], mask[None, None]]))
        with pytest.raises(ConfigError, match="attention_mask"):
            self.recorder.step(self.ids(new), attention_mask=changed)

    @precondition(lambda self: self.goes_on and self.cache.positions == "cache")
    @rule(data=st.data(), new=st.sampled_from([1, 1, 4]), by=st.sampled_from([-1, 1, 7]))
    def a_jump(self, data, new, by) -> None:
        first = 0 if self.first is None else self.first
        ids = (self.recorder.mask(new).cumsum(-1) - 1)[:, -new:] + first
        if self.first is None:  # the model counts padding then
            ids += torch.tensor(self.recorder.padding)[:, None]
        row, column = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
        ids[row, column] += by
        with pytest.raises(ConfigError, match="position_ids"):
            self.recorder.step(self.ids(new), position_ids=ids)

    @rule()
    def another_model(self) -> None:
        with pytest.raises(ConfigError, match="made for"):
            twin()(prompt(3), past_key_values=self.cache)

    @precondition(lambda self: self.goes_on)
    @rule(masked=st.booleans())
    def another_batch(self, masked) -> None:
        mask = torch.ones(MOST_ROWS + 1, self.recorder.seen + 1) if masked else None
        with pytest.raises(RuntimeError, match="rows and got 6"):
            self.model(prompt(1, MOST_ROWS + 1), attention_mask=mask, past_key_values=self.cache)

    @precondition(lambda self: self.goes_on and self.is_long)
    @rule(new=st.sampled_from([1, 5]))
    def a_step_that_breaks_off(self, new) -> None:
        """No step follows it until a reset, but what the cache gave before is right."""
        self.compare()

        def fail(*_) -> None:
            raise MemoryError

        handle = self.model.get_decoder().layers[1].mlp.register_forward_hook(fail)
        try:
            with pytest.raises(MemoryError):
                self.recorder.step(self.ids(new), **self.inputs(new, masked=True))
        finally:
            handle.remove()
        with pytest.raises(RuntimeError, match="reset"):
            self.recorder.step(self.ids(new), **self.inputs(new, masked=True))
        self.broken = True

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def books_are_in_order(self) -> None:
        recorder = getattr(self, "recorder", None)
        if recorder is None or self.broken:
            return
        cache = self.cache
        assert cache.get_seq_length() == recorder.seen
        first = cache.layers[0]
        held = [text.kept[-1][0].shape[1] for text in recorder.texts]
        assert first.lengths == held and cache.lengths == [max(held)] * 3
        assert cache.nbytes() == cache.entry_nbytes * sum(held) <= cache.nbytes(allocated=True)

    def compare(self) -> None:
        if self.recorder is not None and not self.broken:
            done["texts"] += len(self.recorder.texts)
            done["evictions"] += sum(self.cache.evictions)
            done["tokens"] += sum(len(text.tokens) for text in self.recorder.texts)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.recorder.check(self.family)

    def teardown(self) -> None:
        self.compare()


def run(**options) -> Counter[str]:
    done.clear()
    checks = list(HealthCheck)
    chosen = settings(
        stateful_step_count=25, deadline=None, suppress_health_check=checks, **options
    )
    run_state_machine_as_test(Cache, settings=chosen)
    return done.copy()


def test_the_same_orders_in_every_run() -> None:
    counts = run(max_examples=100, derandomize=True, database=None)
    assert counts["texts"] > 100 and counts["evictions"] > 300


@pytest.mark.slow
def test_other_orders_in_every_run() -> None:
    """A failing one is printed with what repeats it."""
    run(max_examples=1500, print_blob=True)
