"""The whole generation surface of transformers, with every method."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from methods import (
    CORE,
    METHODS,
    SEES_ALL,
    every_method,
    generate,
    in_turn,
)
from tiny import FAMILIES, SHAPE, VOCAB, from_config, gpt2, prompt, tiny
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    TextStreamer,
    pipeline,
)

from baselines import FullPolicy
from buzz import ConfigError, EvictionCache
from buzz.compiled import tested as compiles

LATENT = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
REFUSED = [
    (DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT), "MLA"),
    (FalconConfig(vocab_size=VOCAB, hidden_size=64, num_attention_heads=4, alibi=True), "ALiBi"),
]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_equals_the_stock_cache_and_others_evict_as_predicted(family, monkeypatch) -> None:
    model, ids = tiny(family), prompt(80)
    expected = generate(model, ids, DynamicCache(config=model.config))
    for name in METHODS if family == "llama" else [*CORE, SEES_ALL]:
        policy = METHODS[name]
        model = tiny(family)  # dynamic RoPE remembers the longest text it has seen
        cache = EvictionCache(model, policy)
        tokens, logits = generate(model, ids, cache)
        each = [policy.for_layer(i, len(cache.evicting)) for i in range(len(cache.evicting))]
        held = [layer.longest for layer in cache.evicting]
        assert held == [one.lengths([80] + [1] * 29)[-1] for one in each]
        if policy.name == "full":
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1], atol=3e-5, rtol=0)
            own = "buzz.attention._outruns_stock"  # the model's own backend serves
            monkeypatch.setattr(own, lambda *_: False)
            model = tiny(family)
            tokens, logits = generate(model, ids, EvictionCache(model, policy))
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1])
            monkeypatch.undo()


def test_another_cache_on_the_same_model_runs_the_stock_path() -> None:
    model, ids = tiny("llama"), prompt(50)
    expected = generate(model, ids, DynamicCache())
    generate(model, ids, EvictionCache(model, METHODS["h2o"]))
    again = generate(model, ids, DynamicCache())
    assert torch.equal(again[1], expected[1])


@in_turn("cache")
def test_padded_rows_give_what_they_give_alone(policy, positions) -> None:
    model = tiny()
    lengths = [70, 33, 5]
    ids = prompt(70, batch=3)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : 70 - length] = 0
    ids = ids.where(mask.bool(), 0)
    cache = EvictionCache(model, policy, positions=positions)
    tokens, logits = generate(model, ids, cache, tokens=25, mask=mask)
    alone_nbytes = []
    for row, length in enumerate(lengths):
        alone = EvictionCache(model, policy, positions=positions)
        own_tokens, own_logits = generate(model, ids[row : row + 1, 70 - length :], alone, 25)
        assert torch.equal(tokens[row], own_tokens[0])
        torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)
        assert cache.layers[0].lengths[row] == alone.lengths[0]
        assert cache.evictions[row] == alone.evictions[0]
        kept = cache.kept_positions(1)[row]
        own = alone.kept_positions(1)[0]
        assert torch.equal(kept[:, kept.shape[1] - own.shape[1] :], own)
        assert (kept[:, : kept.shape[1] - own.shape[1]] == -1).all()
        alone_nbytes.append(alone.nbytes())
    held = sum(layer.entry_nbytes * sum(layer.lengths) for layer in cache.evicting)
    assert cache.nbytes() == held == sum(alone_nbytes)


@in_turn("cache")
def test_beam_search_follows_its_beams(llama, positions, policy) -> None:
    """Beams re-order rows; a row's logits must be those of its own text run alone."""
    ids = prompt(40)
    out = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=EvictionCache(llama, policy, positions=positions),
        max_new_tokens=20,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    cache, total = EvictionCache(llama, policy, positions=positions), 0.0
    step = ids
    with torch.no_grad():
        for token in out.sequences[0, 40:]:
            logits = llama(step, past_key_values=cache).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            step = token.view(1, 1)
    assert float(out.sequences_scores[0]) == pytest.approx(total / 20, abs=1e-4)


@in_turn("cache")
def test_sampling_and_several_sequences(llama, positions, policy) -> None:
    ids = prompt(40)
    torch.manual_seed(5)
    cache = EvictionCache(llama, policy, positions=positions)
    tokens, logits = generate(
        llama, ids, cache, tokens=20, do_sample=True, num_return_sequences=3, top_k=5
    )
    assert tokens.shape == (3, 20) and len({tuple(row.tolist()) for row in tokens}) == 3
    step, own = ids, EvictionCache(llama, policy, positions=positions)
    with torch.no_grad():
        for position in range(20):
            expected = llama(step, past_key_values=own).logits[0, -1]
            torch.testing.assert_close(logits[1, position], expected, atol=1e-4, rtol=1e-4)
            step = tokens[1, position].view(1, 1)


@every_method
def test_past_the_context_of_the_model(policy) -> None:
    """512 positions: a bounded cache goes on, because entries stand at cache positions."""
    model = tiny("llama")
    cache = EvictionCache(model, policy)
    tokens, logits = generate(model, prompt(500), cache, tokens=30)
    assert tokens.shape == (1, 30) and logits.isfinite().all()
    assert cache.get_seq_length() == 529


@in_turn("cache")
def test_a_prompt_that_is_held_back_may_come_in_chunks(llama, positions, policy) -> None:
    ids = prompt(90)
    whole = EvictionCache(llama, policy, positions=positions)
    tokens, logits = generate(llama, ids, whole, tokens=10)
    cache = EvictionCache(llama, policy, positions=positions, hold_until=90)
    own_tokens, own = generate(llama, ids, cache, tokens=10, prefill_chunk_size=29)
    assert torch.equal(own_tokens, tokens)
    torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-4)
    assert cache.lengths == whole.lengths
    for layer in range(3):
        assert torch.equal(cache.kept_positions(layer), whole.kept_positions(layer))


@in_turn("true")
def test_reset_and_reuse_without_new_buffers(llama, positions, policy) -> None:
    cache = EvictionCache(llama, policy, positions=positions)
    ids = prompt(60)
    first, _ = generate(llama, ids, cache)
    assert cache.layers[0].store is not None
    buffer = cache.layers[0].store.keys.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    second, _ = generate(llama, ids, cache)
    assert torch.equal(first, second)
    assert cache.layers[0].store.keys.data_ptr() == buffer


def test_streamer_and_pipeline(llama, tmp_path) -> None:
    tokenizer = word_tokenizer()
    printed = []

    class Capture(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            printed.append(text)

    cache = EvictionCache(llama, METHODS["buzz"])
    generate(llama, prompt(40), cache, tokens=9, streamer=Capture(tokenizer, skip_prompt=True))
    assert len("".join(printed).split()) == 9

    pipe = pipeline("text-generation", model=llama, tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in range(5, 60))
    cache = EvictionCache(llama, METHODS["buzz"])
    out = pipe(text, past_key_values=cache, max_new_tokens=9, do_sample=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    own = EvictionCache(llama, METHODS["buzz"])
    expected, _ = generate(llama, ids, own, tokens=9)
    assert out[0]["generated_text"].endswith(tokenizer.decode(expected[0]))
    assert cache.evictions == own.evictions and cache.lengths == own.lengths


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w3")


def test_log_n_scaling(llama) -> None:
    """With the base at the number attended, decoding's last logits are those without scaling."""
    ids = prompt(50)
    with torch.no_grad():
        plain = llama(ids, past_key_values=EvictionCache(llama, FullPolicy())).logits
        clamped = EvictionCache(llama, FullPolicy(), logn_base=512, logn_clamp=True)
        torch.testing.assert_close(llama(ids, past_key_values=clamped).logits, plain)
        scaled = EvictionCache(llama, FullPolicy(), logn_base=512)
        assert not torch.allclose(llama(ids, past_key_values=scaled).logits, plain, atol=1e-2)


def test_layers_placed_by_a_device_map(tmp_path) -> None:
    """accelerate wraps each module's forward, as device_map="auto" does; the cache follows."""
    accelerate = pytest.importorskip("accelerate")
    ids = prompt(60)
    plain, placed = tiny("llama"), tiny("llama")
    places = {name: "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    places |= {"layers.1": "disk", "layers.2": "disk"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    accelerate.dispatch_model(
        placed, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    for policy in (METHODS["h2o"], METHODS["buzz"]):
        expected, _ = generate(plain, ids, EvictionCache(plain, policy), tokens=15)
        cache = EvictionCache(placed, policy)
        tokens, _ = generate(placed, ids, cache, tokens=15)
        assert torch.equal(tokens, expected)
        assert cache.lengths[0] == policy.for_layer(0, 3).lengths([60] + [1] * 14)[-1]


class TestRefusals:
    @pytest.mark.parametrize(("config", "reason"), REFUSED, ids=lambda value: str(value)[:12])
    def test_attention_that_is_more_than_keys_per_head(self, config, reason) -> None:
        with pytest.raises(ConfigError, match=reason):
            EvictionCache(from_config(config), METHODS["buzz"])

    def test_no_rope(self) -> None:
        with pytest.raises(ConfigError, match="GPT2.*RoPE"):
            EvictionCache(gpt2(), METHODS["buzz"])

    def test_only_sliding_layers(self) -> None:
        config = MistralConfig(**{**FAMILIES["mistral"].to_dict(), "sliding_window": 32})
        with pytest.raises(ConfigError, match="sliding_window=None"):
            EvictionCache(from_config(config), METHODS["buzz"])

    def test_right_padding(self, llama) -> None:
        ids = prompt(20, batch=2)
        mask = torch.ones_like(ids)
        mask[0, 15:] = 0
        with pytest.raises(ConfigError, match="padding_side='left'"):
            llama(ids, attention_mask=mask, past_key_values=EvictionCache(llama, METHODS["h2o"]))

    def test_attention_that_bypasses_the_cache_is_noticed(self, llama) -> None:
        """The silent full cache: keys are appended, and nobody ever evicts."""
        cache = EvictionCache(llama, METHODS["h2o"])
        keys = torch.zeros(1, 2, 5, 16)
        cache.update(keys, keys, 0)
        with pytest.raises(RuntimeError, match="nothing was evicted"):
            cache.update(keys, keys, 0)


@every_method
def test_trace_shows_length_and_evictions_of_every_step(llama, policy) -> None:
    cache = EvictionCache(llama, policy)
    generate(llama, prompt(50), cache, tokens=40)
    seen, held, evictions = zip(*cache.trace(), strict=True)
    assert list(seen) == list(range(50, 90))
    assert list(held) == policy.for_layer(0, 3).lengths([50] + [1] * 39)
    assert evictions[-1] == cache.evictions[0]
    states = zip(held, evictions, strict=True)
    pace = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(states)]
    changes = sum(one != two for one, two in pairwise(pace))
    assert len(cache._trace._runs) <= changes + 2  # a note a change of pace, not a note a step
    cache.reset()
    assert cache.trace() == []


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("streaming_llm", "cache"),
        ("buzz", "cache"),
        ("h2o", "true"),
        pytest.param("h2o", "cache", marks=pytest.mark.slow),
        pytest.param("local", "cache", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not compiles(), reason="older releases of torch fail on the stock cache too")
def test_compiled_decoding_gives_the_same_and_does_not_recompile(name, positions) -> None:
    model, policy = from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 2})), METHODS[name]
    ids = prompt(50)
    eager, compiled = (EvictionCache(model, policy, positions=positions) for _ in range(2))
    torch.compiler.reset()
    step = torch.compile(model, backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    with torch.no_grad():
        token = model(ids, past_key_values=eager).logits[:, -1:].argmax(-1)
        model(ids, past_key_values=compiled)
        graphs = []
        for _ in range(40):
            expected = model(token, past_key_values=eager).logits
            actual = step(token, past_key_values=compiled).logits
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            token = expected.argmax(-1)
            graphs.append(counter["unique_graphs"])
    assert graphs[-1] == graphs[20]  # two evictions of buzz in: nothing new is ever compiled
    assert compiled.lengths == eager.lengths
    assert torch.equal(compiled.kept_positions(1), eager.kept_positions(1))
