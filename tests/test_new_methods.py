"""What is particular to a method: chance, budgets of layers, texts that are read beside prompts."""

from __future__ import annotations

import dataclasses
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import read, shown
from tiny import prompt, tiny
from torch import Tensor

from baselines import (
    CompactorPolicy,
    ExpectedAttentionPolicy,
    KVzipPolicy,
    LagKVPolicy,
    PyramidKVPolicy,
    RandomPolicy,
    SnapKVPolicy,
    TriAttentionPolicy,
)
from baselines.calibration import TEXT
from baselines.lag_kv import standing_out
from baselines.triattention import measured_queries
from buzz import Budget, ConfigError, EvictionCache
from evals.run.faults import LengthMismatch
from evals.run.lengths import Lengths
from evals.run.models import byte_tokenizer


def test_snapkv_narrows_its_window_for_a_tight_budget_unless_it_is_fixed() -> None:
    assert SnapKVPolicy().fit(40) == SnapKVPolicy(capacity=40, window=20)
    fixed = SnapKVPolicy(capacity=9, window=2)
    assert fixed.fit(40, frozenset({"capacity"})) == fixed
    with pytest.raises(ConfigError, match="^budget="):
        SnapKVPolicy().fit(1)
    with pytest.raises(ConfigError, match="^budget=32: leaves 0 entries for method.capacity"):
        SnapKVPolicy().fit(32, frozenset({"window"}))


def drawn(seed: int, layer: int = 0, heads: int = 2, held: int = 200, first: int = 0) -> Tensor:
    """Priorities of a text's tokens, [heads, held]."""
    positions = torch.arange(first, first + held).expand(1, heads, -1)
    entries = SimpleNamespace(positions=positions, layers=layer)
    return RandomPolicy(size=40, sink=0, window=1, seed=seed).score(entries)[0]


def test_random_keeps_every_token_of_the_middle_equally_often() -> None:
    """Chi-square with 199 degrees of freedom: 266 is its 99.9th percentile."""
    kept = torch.stack([drawn(seed).topk(50).indices for seed in range(400)])
    for head in range(2):
        counts = kept[:, head].flatten().bincount(minlength=200).double()
        expected = 400 * 50 / 200
        # Drawn without replacement: the variance is smaller by what is left over.
        assert float(((counts - expected) ** 2 / expected).sum()) / (1 - 50 / 200) < 266
    assert float(((counts - expected) ** 2 / expected).sum()) / (1 - 50 / 200) > 131


def test_random_priorities_belong_to_a_token_a_head_a_layer_and_a_seed() -> None:
    own = drawn(0)
    assert torch.equal(own, drawn(0))
    assert torch.equal(own[:, 50:], drawn(0, held=150, first=50))
    assert own.unique().numel() == own.numel()
    others = [own[0], own[1], drawn(1)[0], drawn(0, layer=1)[0]]
    for number, one in enumerate(others):
        for other in others[:number]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.25


def test_random_decodes_a_uniform_sample_of_all_history() -> None:
    """One token at a time keeps what one cut of all of it would keep, and the ends."""
    model, ids = tiny("llama"), prompt(120)
    policy = RandomPolicy(size=30, sink=3, window=5)
    whole = EvictionCache(model, policy)
    stepwise = EvictionCache(model, policy)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        for token in ids.split(1, dim=1):
            model(token, past_key_values=stepwise)
    layers = [whole.kept_positions(layer)[0] for layer in range(3)]
    assert not torch.equal(layers[0], layers[1])
    for layer, held in enumerate(layers):
        assert torch.equal(held[:, :3], torch.arange(3).expand(2, -1))
        assert torch.equal(held[:, -5:], torch.arange(115, 120).expand(2, -1))
        middle = drawn(0, layer, held=120)[:, 3:115].topk(22).indices.sort().values + 3
        assert torch.equal(held[:, 3:-5], middle)
        # Entries that entered a window and left it again had the same chance.
        assert torch.equal(stepwise.kept_positions(layer)[0], held)


@given(
    st.integers(4, 200), st.integers(1, 400), st.integers(1, 12), st.sampled_from([1, 3, 20, 1000])
)
def test_a_pyramid_holds_its_budget_on_average(budget, prompt, layers, beta) -> None:
    policy = PyramidKVPolicy(beta=beta).fit(budget)
    each = [policy.for_layer(index, layers).lengths([prompt, 1])[0] for index in range(layers)]
    assert each == sorted(each, reverse=True)
    assert all(min(policy.window, prompt) <= held <= prompt for held in each)
    mean = sum(each) / layers
    assert min(budget, prompt) - 0.5 <= mean <= min(budget, prompt)
    # As the original rounds, there is more.
    floor = dataclasses.replace(policy, step="floor")
    more = sum(floor.for_layer(i, layers).lengths([prompt])[0] for i in range(layers)) / layers
    assert mean <= more <= min(budget, prompt) + (layers - 1) / 2


def test_layers_of_a_pyramid_are_predicted_verified_and_measured_by_layer() -> None:
    model, ids = tiny("llama"), prompt(60)
    policy = Budget(24).policy(PyramidKVPolicy(), 60)[0]
    cache = EvictionCache(model, policy)
    lengths = Lengths(cache)
    for part in ids.split([56, 1, 1, 2], dim=1):
        with torch.no_grad():
            model(part, past_key_values=cache)
        lengths.note()
    predicted = [policy.for_layer(i, 3).lengths([56, 1, 1, 2]) for i in range(3)]
    assert len(set(cache.lengths)) == 3
    assert cache.lengths == [layer[-1] for layer in predicted]
    means = [sum(step) / 3 for step in zip(*predicted, strict=True)]
    assert lengths.verified(0, [56, 1, 1, 2]) == pytest.approx(means)
    assert means[0] == pytest.approx(24, abs=0.5) and max(cache.evictions) == 1
    one = cache.layers[0]
    entry = 2 * one.store.keys[0, :, 0].numel() * one.store.keys.element_size()
    assert cache.nbytes() == sum(cache.lengths) * entry
    cache.layers[2].groups[0].held -= 1
    lengths.note()
    with pytest.raises(LengthMismatch, match="pyramid_kv: after step 4"):
        lengths.verified(0, [56, 1, 1, 2, 1])


class Extra(torch.nn.Module):
    """As quantised layers: not all that it saves is a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"bits": 8}

    def set_extra_state(self, state: object) -> None:
        pass


class TestKVzip:
    def test_it_reads_the_prompt_again_before_the_first_token(self) -> None:
        """In chunks, behind the prompt, asked for in words; nothing of that is kept."""
        model, ids = tiny("llama"), prompt(50)
        policy = KVzipPolicy(capacity=20, chunk=20).asking([3, 4], [5], [6])
        cache = EvictionCache(model, policy)
        read = []
        decoder = model.get_decoder()
        hook = decoder.register_forward_pre_hook(
            lambda _, args, kwargs: read.append((kwargs["input_ids"], kwargs["position_ids"])),
            with_kwargs=True,
        )
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        hook.remove()
        tokens = ids[0].tolist()
        asked = [
            [3, 4, 6, *tokens[:20]],
            [5, *tokens[12:20], 6, *tokens[20:40]],
            [5, *tokens[32:40], 6, *tokens[40:]],
        ]
        assert [ids.tolist()[0] for ids, _ in read[1:4]] == asked
        for ids, positions in read[1:4]:
            assert positions[0].tolist() == list(range(50, 50 + ids.shape[1]))
        assert len(read) == 5 and read[4][0].shape == (1, 1)
        assert cache.lengths == [21] * 3 and cache.get_seq_length() == 51

    def test_the_second_pass_computes_what_the_model_does_without_a_cache(self) -> None:
        model, ids = tiny("llama"), prompt(50)
        states = []
        hook = model.get_decoder().register_forward_hook(
            lambda _, args, kwargs, output: states.append((kwargs["input_ids"], output[0])),
            with_kwargs=True,
        )
        policy = KVzipPolicy(capacity=20).asking([3, 4], [5], [6])
        with torch.no_grad():
            model(ids, past_key_values=EvictionCache(model, policy))
            hook.remove()
            read, found = states[1]
            expected = model.get_decoder()(torch.cat([ids, read], dim=1))[0][:, 50:]
        assert read.shape[1] == 53
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_equal_rows_are_read_once_and_a_prompt_that_fits_not_at_all(self) -> None:
        model = tiny("llama")
        for capacity, passes in [(20, 2), (60, 1)]:
            cache = EvictionCache(model, KVzipPolicy(capacity=capacity))
            calls: list[int] = []
            decoder = model.get_decoder()
            hook = decoder.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
            with torch.no_grad():
                model(prompt(50).expand(3, -1), past_key_values=cache)
            hook.remove()
            assert len(calls) == passes

    @pytest.mark.parametrize("family", ["llama-dynamic", "gemma3-mixed"])
    def test_models_that_cannot_read_twice_are_refused(self, family) -> None:
        with pytest.raises(ConfigError, match="method.name='kvzip'"):
            EvictionCache(tiny(family), KVzipPolicy())

    def test_so_are_scaling_and_embeddings(self) -> None:
        model = tiny("llama")
        with pytest.raises(ConfigError, match="cache.logn_base"):
            EvictionCache(model, KVzipPolicy(), logn_base=16)
        cache = EvictionCache(model, KVzipPolicy(capacity=9))
        embeddings = model.get_input_embeddings()(prompt(30))
        with pytest.raises(ConfigError, match="inputs_embeds"), torch.no_grad():
            model(inputs_embeds=embeddings, past_key_values=cache)

    def test_the_words_are_those_of_the_tokenizer(self) -> None:
        tokenizer = byte_tokenizer()
        bare = KVzipPolicy().for_tokenizer(tokenizer)
        assert tokenizer.decode(bare.first) == "\n\nRepeat the previous context exactly."
        assert tokenizer.decode(bare.suffix) == "\n"
        tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
        told = KVzipPolicy().for_tokenizer(tokenizer)
        assert tokenizer.decode(told.suffix) == "</u><a>"
        assert hash(told) == hash(dataclasses.replace(told, first=list(told.first)))


class TestTriAttention:
    def test_the_text_is_the_one_that_results_were_made_with(self) -> None:
        assert hashlib.sha256(TEXT.encode()).hexdigest() == (
            "792a21f54b292e8a6baf0383e58e573cfc2a440fa0dc366f8dc84841e7b3a4ee"
        )

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        """Where measurements are kept; empty."""
        monkeypatch.setattr("baselines.calibration.user_cache", lambda: tmp_path / "kept")
        return tmp_path / "kept"

    def test_a_later_process_reads_what_was_measured(self, folder) -> None:
        """Another object of the same model stands for it; each change is measured by itself."""

        def measured(text: int = 1, **changes: float) -> tuple[Any, bool]:
            model, calls = tiny("llama"), []
            for name, value in changes.items():
                model.get_parameter(name.replace("__", ".")).data.view(-1)[0] += value
            model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
            return measured_queries(model, prompt(30, seed=text)[0].tolist()), bool(calls)

        first, was_read = measured()
        assert was_read and len(list(folder.iterdir())) == 1
        again, was_read = measured()
        assert not was_read and all(map(torch.equal, first, again))
        norm, key = "model__norm__weight", "model__layers__0__self_attn__k_proj__weight"
        for change in ({"text": 2}, {key: 2**-20}, {norm: 1.0}):
            assert measured(**change)[1] and not measured(**change)[1], change
        assert not measured()[1]
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:-7])
        again, was_read = measured()
        assert was_read and all(map(torch.equal, first, again)) and not measured()[1]

    @pytest.mark.parametrize("change", ["columns", "norm", "frequencies"])
    def test_what_leaves_sums_as_they_are_is_another_model(self, folder, change) -> None:
        measured_queries(tiny("llama"), [1, 2, 3])
        model = tiny("llama")
        with torch.no_grad():
            if change == "columns":
                weight = model.model.layers[0].self_attn.q_proj.weight
                weight.copy_(weight.flip(1))
            elif change == "norm":
                weight = model.model.layers[0].input_layernorm.weight
                weight[0], weight[1] = weight[0] + 1, weight[1] - 0.5
            else:
                model.model.rotary_emb.inv_freq.mul_(0.5)
        measured_queries(model, [1, 2, 3])
        assert len(list(folder.iterdir())) == 2

    def test_weights_that_cannot_be_hashed_are_measured(self, folder) -> None:
        model = tiny("llama")
        model.register_module("extra", Extra())
        mean, _ = measured_queries(model, [1, 2, 3])
        assert mean.isfinite().all() and not folder.exists()

    def test_a_folder_that_cannot_be_written_is_no_failure(self, folder) -> None:
        folder.write_text("a file where the folder should be")
        mean, _ = measured_queries(tiny("llama"), [1, 2, 3])
        assert mean.isfinite().all() and folder.is_file()

    def test_a_text_is_read_once_for_a_model_and_leaves_it_as_it_was(self) -> None:
        """Also one whose frequencies grow with the longest text that it has read."""
        model = tiny("llama-dynamic")
        rotary, reads = model.get_decoder().rotary_emb, []
        before = rotary.inv_freq.clone()
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: reads.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
        )
        told = TriAttentionPolicy().for_tokenizer(byte_tokenizer())
        told = dataclasses.replace(told, ids=[one % 97 for one in told.ids])  # in its vocabulary
        for policy in (told, told, TriAttentionPolicy(), TriAttentionPolicy()):
            EvictionCache(model, policy)
        assert [len(ids) for ids in reads] == [1024, 256] and reads[0] == list(told.ids)
        assert torch.equal(rotary.inv_freq, before)

    def test_queries_are_measured_before_rotation(self) -> None:
        """The first layer's are projections of embeddings, wherever their tokens stand."""
        model, ids = tiny("llama"), prompt(40)
        mean, beyond = measured_queries(model, ids[0].tolist())
        decoder = model.get_decoder()
        block = decoder.layers[0]
        with torch.no_grad():
            states = block.input_layernorm(decoder.embed_tokens(ids[0]))
            queries = block.self_attn.q_proj(states).view(40, 4, 16) * 16**-0.5
        torch.testing.assert_close(mean[0], queries.mean(0))
        pairs = torch.complex(*queries.chunk(2, dim=-1))
        torch.testing.assert_close(beyond[0], pairs.abs().mean(0) - pairs.mean(0).abs())


@pytest.mark.parametrize("policy", [ExpectedAttentionPolicy, LagKVPolicy, CompactorPolicy])
def test_who_turns_vectors_says_so(policy, monkeypatch) -> None:
    monkeypatch.setattr(policy, "needs_rotation", False)
    model, ids = tiny("llama"), prompt(60)
    with pytest.raises(ConfigError, match="entries.rotation"), torch.no_grad():
        for part in ids.split([59, 1], dim=1):
            model(part, past_key_values=EvictionCache(model, policy().fit(24)))


def test_lag_kv_prefers_what_the_next_part_is_unlike() -> None:
    """One entry lies outside the next part's range in one dimension, the others within it."""
    part = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    unlike = torch.tensor([[0.5, 0.5], [9.0, 0.5], [0.2, 0.2]])
    scores = standing_out(torch.cat([unlike, part])[None, None], lag=3)
    assert scores.shape == (1, 1, 1, 3) and scores[0, 0, 0].argmax() == 1
    assert float(scores.sum()) == pytest.approx(1)
    constant = standing_out(torch.ones(1, 1, 6, 2), lag=3)  # no range at all
    assert constant.isfinite().all()


def test_compactors_sketch_is_of_its_seed_and_layer() -> None:
    """The same for every row and in every run."""
    model, ids = tiny("llama"), prompt(80)

    def kept(seed: int, rows: int = 1) -> list[Tensor]:
        cache = EvictionCache(model, CompactorPolicy(capacity=40, sketch=4, seed=seed))
        with torch.no_grad():
            model(ids.expand(rows, -1), past_key_values=cache)
        return [cache.kept_positions(layer) for layer in range(3)]

    own, other, batch = kept(0), kept(1), kept(0, rows=2)
    assert any(not torch.equal(one, two) for one, two in zip(own, other, strict=True))
    for one, both in zip(own, batch, strict=True):
        assert torch.equal(one.expand_as(both), both)
        assert torch.equal(one[0, :, :8], torch.arange(8).expand(2, -1))
        assert torch.equal(one[0, :, -4:], torch.arange(76, 80).expand(2, -1))


def test_compactor_keeps_a_prompts_queries_in_the_models_dtype() -> None:
    """And the same ones as in float32, up to that dtype's own rounding."""
    model, ids, logs = tiny("llama").to(torch.bfloat16), prompt(80), []
    for dtype in (torch.bfloat16, torch.float32):
        cache = EvictionCache(model.to(dtype), CompactorPolicy(capacity=40))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        logs.append(cache.evicting[0].log)
    half, single = (log.latest for log in logs)
    assert half.dtype == torch.bfloat16 and half.nbytes == single.nbytes / 2
    assert (half.float() - single).abs().max() < 0.05 * single.abs().max()


def test_small_budgets_leave_room_for_what_is_judged() -> None:
    assert CompactorPolicy().fit(12) == CompactorPolicy(capacity=12, sink=4, window=2)
    assert LagKVPolicy().fit(40) == LagKVPolicy(size=31, every=10, sink=4, lag=10)
    with pytest.raises(ConfigError, match="^budget=12"):
        CompactorPolicy().fit(12, frozenset({"sink", "window"}))
    with pytest.raises(ConfigError, match="^budget=100"):
        LagKVPolicy().fit(100, frozenset({"lag"}))


def test_a_run_whose_layers_differ_ends_with_a_table(go) -> None:
    """What is held is a mean over the layers then, and no whole number."""
    file = go("method=pyramid_kv", "budget=0.5", "model.num_hidden_layers=4")
    peaks = [record["kv_entries_peak"] for record in read(file)]
    assert any(peak % 1 for peak in peaks) and "pyramid_kv@0.5" in shown(file)
