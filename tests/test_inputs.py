"""What comes with a step's tokens is served rightly or refused by name; nothing is ignored."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from methods import METHODS, every_method, generate
from recomputed import Keys, Recorder
from runs import refused
from tiny import FAMILIES, SHAPE, from_config, prompt, tiny
from transformers import DynamicCache, LlamaConfig

from buzz import BuzzFastPolicy, ConfigError, EvictionCache, ForkedCache
from buzz.inputs import first_positions, hides_more, jumps

BUZZ = METHODS["buzz"]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def start(model, policy=BUZZ, tokens: int = 40, padding: tuple[int, ...] = (0, 6), **options):
    """A cache behind a padded prompt, and what recorded it."""
    cache = EvictionCache(model, policy, **options)
    recorder = Recorder(model, cache, list(padding))
    recorder.step(prompt(tokens, len(padding)), attention_mask=recorder.mask(tokens))
    return cache, recorder


class TestMasks:
    """A mask that hides more than a prompt's padding is refused, whenever it comes."""

    @pytest.mark.parametrize("new", [1, 3])
    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(2, 3),  # the new tokens alone
            torch.ones(1, 43),  # one row for all
            torch.ones(2, 60),
            torch.zeros(2, 1, 3, 43),  # 4-D, additive
            {"full_attention": torch.ones(2, 43)},
        ],
        ids=["new", "row", "wide", "4d", "dict"],
    )
    def test_other_shapes(self, llama, new, mask) -> None:
        _, recorder = start(llama)
        with pytest.raises(ConfigError, match=rf"attention_mask.*\(2, {40 + new}\)"):
            recorder.step(prompt(new, 2), attention_mask=mask)

    def test_a_whole_row_of_padding(self, llama) -> None:
        cache, mask = EvictionCache(llama, BUZZ), torch.ones(2, 9, dtype=torch.int64)
        mask[1] = 0
        with pytest.raises(ConfigError, match="padding_side='left'"):
            llama(prompt(9, 2), attention_mask=mask, past_key_values=cache)

    def test_a_step_that_was_refused_leaves_no_padding_behind(self, llama) -> None:
        """The next prompt has none, and gets none."""
        cache, mask = EvictionCache(llama, BUZZ), torch.ones(1, 40, dtype=torch.int64)
        mask[0, :9] = 0
        with torch.no_grad():
            with pytest.raises(IndexError):
                llama(prompt(40) + 1000, attention_mask=mask, past_key_values=cache)
            logits = llama(prompt(40), past_key_values=cache).logits
            torch.testing.assert_close(logits, llama(prompt(40)).logits)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
    def test_masks_of_any_type(self, llama, kind) -> None:
        cache = EvictionCache(llama, BUZZ)
        recorder = Recorder(llama, cache, [0, 6])
        for new in (40, 1, 3):
            recorder.step(prompt(new, 2), attention_mask=recorder.mask(new).to(kind))
        recorder.check("llama")


class TestWithoutWaiting:
    """Where reading a mask would slow decoding down, a wrong one spoils the step and is told later.

    As on a GPU; here a CPU that must not be waited for stands for one.
    """

    READERS = {
        "lengths": lambda cache, model: cache.lengths,
        "evictions": lambda cache, model: cache.evictions,
        "nbytes": lambda cache, model: cache.nbytes(),
        "kept_positions": lambda cache, model: cache.kept_positions(0),
        "trace": lambda cache, model: cache.trace(),
        "reset": lambda cache, model: cache.reset(),
        "next chunk": lambda cache, model: model(prompt(5, 2), past_key_values=cache),
    }

    @pytest.fixture(autouse=True)
    def busy(self, monkeypatch) -> None:
        monkeypatch.setattr("buzz.cache._may_wait", lambda device, new: new > 1)

    def spoiled(self, llama) -> EvictionCache:
        cache = EvictionCache(llama, BUZZ)
        mask, token = torch.ones(2, 42, dtype=torch.int64), prompt(1, 2)
        with torch.no_grad():
            llama(prompt(40, 2), attention_mask=mask[:, :40], past_key_values=cache)
            good = llama(token, attention_mask=mask[:, :41], past_key_values=cache).logits
            assert good.isfinite().all()
            mask[0, 20] = 0
            assert llama(token, attention_mask=mask, past_key_values=cache).logits.isnan().all()
            assert llama(token, past_key_values=cache).logits.isnan().all()  # until it is told
        return cache

    @pytest.mark.parametrize("read", READERS.values(), ids=READERS)
    def test_whoever_reads_the_cache_is_told(self, llama, read) -> None:
        with pytest.raises(ConfigError, match="attention_mask='of an earlier step'"):
            read(self.spoiled(llama), llama)

    def test_a_reset_cache_is_as_new(self, llama) -> None:
        cache = self.spoiled(llama)
        with pytest.raises(ConfigError):
            cache.reset()
        recorder = Recorder(llama, cache, [0, 4])
        for new in (40, 1, 1):
            recorder.step(prompt(new, 2), attention_mask=recorder.mask(new))
        recorder.check("llama")

    def test_positions_too(self, llama) -> None:
        cache = EvictionCache(llama, BUZZ)
        with torch.no_grad():
            llama(prompt(40), past_key_values=cache)
            wrong = torch.tensor([[41]])
            assert llama(prompt(1), position_ids=wrong, past_key_values=cache).logits.isnan().all()
        with pytest.raises(ConfigError, match="position_ids='of an earlier step'"):
            cache.trace()


@pytest.mark.parametrize("name", ["h2o", pytest.param("streaming_llm", marks=pytest.mark.slow)])
def test_compiled_steps_take_masks(name) -> None:
    """A growing mask compiles no further graphs; a wrong one spoils its step and is told after."""
    model, policy = from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 2})), METHODS[name]
    eager, compiled = EvictionCache(model, policy), EvictionCache(model, policy)
    torch.compiler.reset()
    step = torch.compile(model, backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    ids, mask = prompt(40, 2), torch.ones(2, 70, dtype=torch.int64)
    mask[1, :6] = 0
    graphs = []
    with torch.no_grad():
        for cache in (eager, compiled):
            model(ids, attention_mask=mask[:, :40], past_key_values=cache)
        for end in range(41, 60):
            token, now = prompt(1, 2, seed=end), mask[:, :end].clone()
            expected = model(token, attention_mask=now, past_key_values=eager).logits
            actual = step(token, attention_mask=now, past_key_values=compiled).logits
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            graphs.append(counter["unique_graphs"])
        assert graphs[-1] == graphs[8]
        hole = mask[:, :60].clone()
        hole[0, 30] = 0
        assert (
            step(prompt(1, 2), attention_mask=hole, past_key_values=compiled).logits.isnan().all()
        )
    with pytest.raises(ConfigError, match="attention_mask='of an earlier step'"):
        compiled.reset()


class TestPositions:
    def test_a_prompt_of_several_texts(self, llama) -> None:
        ids = torch.cat([torch.arange(20), torch.arange(20)])[None]
        with pytest.raises(ConfigError, match="position_ids"):
            llama(prompt(40), position_ids=ids, past_key_values=EvictionCache(llama, BUZZ))

    def test_padding_that_counts_only_later(self, llama) -> None:
        cache, mask = EvictionCache(llama, BUZZ), torch.ones(2, 40, dtype=torch.int64)
        mask[1, :6] = 0
        ids = mask.cumsum(-1) - 1
        with torch.no_grad():
            llama(prompt(40, 2), attention_mask=mask, position_ids=ids, past_key_values=cache)
        with pytest.raises(ConfigError, match="position_ids"):
            llama(prompt(1, 2), past_key_values=cache)

    def test_at_true_positions_they_are_the_users(self, llama) -> None:
        """Keys stay where the positions put them: as in a stock cache."""
        cache, stock = EvictionCache(llama, METHODS["full"], positions="true"), DynamicCache()
        with torch.no_grad():
            for ids in (torch.arange(40), torch.tensor([50]), torch.tensor([51, 60])):
                given = {"position_ids": ids[None]}
                expected = llama(prompt(len(ids)), past_key_values=stock, **given).logits
                actual = llama(prompt(len(ids)), past_key_values=cache, **given).logits
                torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
    @pytest.mark.parametrize("counted", [False, True])
    @pytest.mark.filterwarnings("ignore:the text grows past")
    def test_keys_move_from_where_they_are(self, family, counted, monkeypatch) -> None:
        """Where frequencies change a key's own position counts, with its padding if that does."""
        model, policy, padding = tiny(family), METHODS["streaming_llm"], 20
        keys, cache = Keys(model, 2, monkeypatch), EvictionCache(model, policy)
        mask = torch.ones(2, 95, dtype=torch.int64)
        mask[1, :padding] = 0
        with torch.no_grad():
            for start, end in [(0, 60), *((i, i + 1) for i in range(60, 95))]:
                ids = None if counted else (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
                now = {"attention_mask": mask[:, :end], "position_ids": ids}
                model(prompt(end - start, 2, seed=end), past_key_values=cache, **now)
        layer, kept = cache.layers[2], cache.kept_positions(2)
        arrived = kept + torch.tensor([0, padding])[:, None, None]
        seen = torch.tensor([95, 95 if counted else 95 - padding])
        sink = policy.sink
        for row in range(2):
            raw = torch.cat(keys.raw, 2)[row : row + 1]
            raw = raw.gather(2, arrived[row : row + 1, :, :, None].expand(1, 2, 22, 16))
            at = (seen[row] - 22 + torch.arange(22))[None]
            expected = keys.apply(raw, raw, *model.get_decoder().rotary_emb(raw, at))[1]
            actual = layer.view(layer.store.keys)[row : row + 1]
            close = {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(actual[:, :, :sink], expected[:, :, :sink], **close)


class TestWholeSteps:
    def test_another_model(self, llama) -> None:
        """Refused by name, at its first step, before anything is computed."""
        cache, recorder = start(llama, padding=(0,))
        config = copy.deepcopy(FAMILIES["llama"])
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        other = from_config(config)
        other.config.name_or_path = "models/other"
        EvictionCache(other, BUZZ)  # so that it announces caches
        with pytest.raises(
            ConfigError, match="made for LlamaModel and not for LlamaModel models/o"
        ):
            other(prompt(1), past_key_values=cache)
        twin = tiny("llama")
        EvictionCache(twin, BUZZ)
        with pytest.raises(ConfigError, match="LlamaModel and not for another LlamaModel"):
            twin(prompt(1), past_key_values=cache)
        recorder.step(prompt(1))
        recorder.check("llama")

    def test_a_model_that_is_gone(self, llama) -> None:
        gone = tiny("llama")
        cache = EvictionCache(gone, BUZZ)
        del gone
        gc.collect()
        with pytest.raises(ConfigError, match="one that is gone"):
            llama(prompt(5), past_key_values=cache)

    def test_a_model_without_caches_of_its_own(self, llama) -> None:
        """It has no hook yet: its first step is a full cache's, and the second is refused."""
        cache, other = EvictionCache(llama, METHODS["h2o"]), tiny("llama")
        with torch.no_grad():
            expected = other(prompt(40)).logits
            torch.testing.assert_close(other(prompt(40), past_key_values=cache).logits, expected)
            with pytest.raises(RuntimeError, match="the model that it was made for"):
                other(prompt(1), past_key_values=cache)

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_attention_weights_are_refused(self, backend) -> None:
        model = tiny("llama", backend)
        cache = EvictionCache(model, BUZZ)
        with pytest.raises(ConfigError, match="output_attentions=True"):
            model(prompt(9), past_key_values=cache, output_attentions=True)
        model.config.output_attentions = backend == "eager"
        if model.config.output_attentions:
            with pytest.raises(ConfigError, match="output_attentions=True"):
                generate(model, prompt(9), cache, tokens=2)

    def test_inputs_by_place(self, llama) -> None:
        """A decoder that is called without keywords gives the same."""
        cache, own = EvictionCache(llama, BUZZ), EvictionCache(llama, BUZZ)
        mask = torch.ones(2, 40, dtype=torch.int64)
        mask[1, :9] = 0
        with torch.no_grad():
            expected = llama.model(prompt(40, 2), attention_mask=mask, past_key_values=cache)[0]
            actual = llama.model(prompt(40, 2), mask, past_key_values=own)[0]
        torch.testing.assert_close(actual, expected)
        assert own.layers[0].lengths == cache.layers[0].lengths


class TestHoldUntil:
    @pytest.mark.parametrize("name", ["snapkv", "tova"])
    def test_a_chunk_that_goes_past_it(self, llama, name) -> None:
        cache = EvictionCache(llama, METHODS[name], hold_until=50)
        with torch.no_grad():
            llama(prompt(40), past_key_values=cache)
            with pytest.raises(ConfigError, match="hold_until=50.*tokens 40 to 60 goes past it"):
                llama(prompt(20), past_key_values=cache)
            llama(prompt(10), past_key_values=cache)  # but to where it ends

    def test_no_scores_outlive_the_prompt(self, llama) -> None:
        cache = EvictionCache(llama, METHODS["buzz_fast"], hold_until=80)
        with torch.no_grad():
            llama(prompt(50), past_key_values=cache)
            assert cache.layers[0].store.scores is not None
            llama(prompt(30), past_key_values=cache)
            assert cache.layers[0].store.scores is None

    def test_queries_that_do_not_judge_are_not_scored(self, llama) -> None:
        """SnapKV's window is 12 here, of the last 12 of 80 tokens."""
        cache, scored = EvictionCache(llama, METHODS["snapkv"], hold_until=80), []
        with torch.no_grad():
            for part in prompt(82).split([60, 10, 5, 5, 1, 1], dim=1):
                llama(part, past_key_values=cache)
                layer = cache.layers[0]
                scored.append(layer.store.scores is not None)
        assert scored == [False, True, True, False, False, False]


class TestGradients:
    def test_nothing_grows(self) -> None:
        """What autograd keeps would be tensors, more of them at each step."""
        model = tiny("llama")
        cache = EvictionCache(model, METHODS["h2o"])
        model(prompt(40), past_key_values=cache)

        def tensors() -> int:
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

        counts = []
        for _ in range(3):
            for token in prompt(10).split(1, dim=1):
                model(token, past_key_values=cache)
            counts.append(tensors())
        store = cache.layers[0].store
        assert counts[0] == counts[1] == counts[2]
        assert all(tensor.grad_fn is None for tensor in store.tensors())

    @pytest.mark.parametrize("name", ["full", "streaming_llm", "h2o", "buzz_fast"])
    @pytest.mark.parametrize("trained", ["all", "k_proj", "q_proj", "embed_tokens"])
    @pytest.mark.parametrize("tokens", [30, 1])
    def test_a_backward_pass_is_refused(self, name, trained, tokens) -> None:
        model = tiny("llama")
        for path, weight in model.named_parameters():
            weight.requires_grad_(trained == "all" or trained in path)
        cache = EvictionCache(model, METHODS[name])
        with torch.no_grad():
            model(prompt(40), past_key_values=cache)
        loss = model(prompt(tokens), past_key_values=cache).logits.square().mean()
        with pytest.raises(ConfigError, match="no gradient flows.*torch.no_grad"):
            loss.backward()
        assert all(weight.grad is None for path, weight in model.named_parameters() if "k_" in path)

    def test_what_needs_no_attention_has_its_gradient(self) -> None:
        model = tiny("llama")
        grads = []
        for cache in (EvictionCache(model, METHODS["h2o"]), DynamicCache()):
            logits = model(prompt(40), past_key_values=cache).logits
            grads += torch.autograd.grad(logits.square().mean(), model.lm_head.weight)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_method
def test_no_nan_of_an_earlier_prompt(backend, policy) -> None:
    """Slots before a short row's start are read and masked: what is left in them must be finite."""
    model = tiny("llama", backend)
    cache = EvictionCache(model, policy)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight[3].fill_(torch.nan)
        ids = prompt(60, 2)
        ids[:, 30] = 3
        logits = model(ids, past_key_values=cache).logits
        assert logits[:, -1].isnan().all()
        model(ids[:, :1], past_key_values=cache)
        weight[3].zero_()
        cache.reset()
        recorder = Recorder(model, cache, [0, 45])
        for new in (60, *[1] * 6):
            recorder.step(prompt(new, 2).clamp(min=4), attention_mask=recorder.mask(new))
    for text in recorder.texts:
        assert torch.cat(text.logits).isfinite().all()
    fresh = Recorder(model, EvictionCache(model, policy), [0, 45])
    for new in (60, *[1] * 6):
        fresh.step(prompt(new, 2).clamp(min=4), attention_mask=fresh.mask(new))
    for text, own in zip(recorder.texts, fresh.texts, strict=True):
        torch.testing.assert_close(torch.cat(text.logits), torch.cat(own.logits))


@pytest.mark.parametrize(
    ("field", "values", "remedy"),
    [
        ("policy", ["buzz", 7, None, BuzzFastPolicy], ""),
        ("cache.logn_base", ["a", True, float("nan"), float("inf"), [2], 1.0], ""),
        ("cache.positions", ["truth", False, None, 1, ["cache"]], "choose cache or true"),
        ("hold_until", [None, "a", 2.5, -1, True], ""),
    ],
)
def test_what_no_cache_is_made_with(llama, field, values, remedy) -> None:
    for value in values:
        with refused(field, remedy):
            EvictionCache(llama, **{"policy": BUZZ, field.removeprefix("cache."): value})
        if field == "hold_until":
            cache = EvictionCache(llama, BUZZ)
            with refused(field):
                cache.hold_until = value
            assert cache.hold_until == 0


@pytest.mark.parametrize(
    "kind", [EvictionCache, lambda model, one, **own: ForkedCache(model, [one], **own)]
)
def test_a_clamp_of_no_scale(llama, kind) -> None:
    with refused("cache.logn_clamp", "True: .*cache.logn_base"):
        kind(llama, BUZZ, logn_clamp=True)
    kind(llama, BUZZ, logn_clamp=True, logn_base=16)


def test_true_positions_by_either_name(llama) -> None:
    for value in (True, "true"):
        assert EvictionCache(llama, BUZZ, positions=value).positions == "true"


class TestLongrope:
    def test_crossing_its_short_context_warns_once(self) -> None:
        model = tiny("phi3-longrope")
        cache = EvictionCache(model, METHODS["full"])
        with pytest.warns(UserWarning, match="short context") as caught:
            generate(model, prompt(60), cache, tokens=20)
        assert sum("short context" in str(warning.message) for warning in caught) == 1

    @pytest.mark.filterwarnings("error:the text grows past")
    def test_no_other_text_warns(self) -> None:
        model = tiny("phi3-longrope")
        generate(model, prompt(80), EvictionCache(model, METHODS["full"]), tokens=5)
        generate(model, prompt(30), EvictionCache(model, METHODS["full"]), tokens=5)
        model = tiny("phi3")  # has no short context
        generate(model, prompt(60), EvictionCache(model, METHODS["full"]), tokens=10)


def test_answers_of_the_checks() -> None:
    """By hand: a row of 5 tokens, one of 3 behind 2 of padding."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert not hides_more(mask, [0, 2]) and hides_more(mask, [0, 1]) and hides_more(mask, [0, 0])
    ids = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 4, 5, 6]])
    assert first_positions(ids, [0, 2]) == [7, 4] and first_positions(None, [0, 2]) == [0, 2]
    assert first_positions(torch.arange(5)[None], [0, 2]) == [0, 2]
    assert first_positions(torch.arange(5).expand(3, 1, 5), [0, 2]) == [0, 2]
    assert not jumps(ids, 0, [0, 2], [7, 4]) and jumps(ids, 0, [0, 1], [7, 0])
    assert not jumps(torch.tensor([[12], [7]]), 5, [0, 2], [7, 4])
    assert jumps(torch.tensor([[12], [8]]), 5, [0, 2], [7, 4])
    assert jumps(torch.tensor([[0, 1, 3]]), 0, [0], [0])
