"""How a model's layers are tried out: what is found, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import types
from typing import Any

import accelerate
import pytest
import torch
from tiny import FAMILIES, SHAPE, from_config, prompt, tiny
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    PreTrainedModel,
    SiglipVisionConfig,
    SmolLM3Config,
)
from transformers.models.llama import modeling_llama

from baselines import ExpectedAttentionPolicy, FullPolicy, StreamingLLMPolicy
from buzz import EvictionCache, probe
from buzz.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def model_of(family: str, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
    return from_config(CONFIGS[family](**{**SHAPE, "head_dim": 16, **fields}), attention)


def refusal(model: PreTrainedModel, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        EvictionCache(model, FullPolicy(), **options)
    assert error.value.field == "model" and "\n" not in str(error.value)
    return error.value.remedy


@pytest.mark.parametrize(
    ("family", "attention", "fields", "reason"),
    [
        ("doge", "sdpa", {}, "layer 0 adds to the attention mask"),
        ("diffllama", "eager", {}, "layer 0 attends 2 times in a step"),
        ("gemma", "sdpa", {"use_bidirectional_attention": True}, "attends tokens that come later"),
        (
            *("gemma3_text", "sdpa"),
            {"use_bidirectional_attention": True, "layer_types": ["full_attention"] * 3},
            "a mask that is not the causal one",
        ),
        ("stablelm", "sdpa", {}, "does not attend through transformers' AttentionInterface"),
        ("dory", "sdpa", {}, "does not run each of its layers once"),
        ("hrm_text", "sdpa", {}, "its attention layers could not be found"),
    ],
)
def test_what_no_cache_can_serve_is_refused_by_name(family, attention, fields, reason) -> None:
    assert reason in refusal(model_of(family, attention, **fields))


def test_an_attention_of_the_models_own_must_be_a_softmax(monkeypatch) -> None:
    def capped(module, query, key, value, mask, scaling, **options):
        logits = 2 * (query @ of_each_head(module, key).mT * scaling / 2).tanh()
        weights = (logits + mask).softmax(-1)
        return (weights @ of_each_head(module, value)).transpose(1, 2), weights

    def of_each_head(module, key):
        return key.repeat_interleave(module.num_key_value_groups, 1)

    assert EvictionCache(tiny("llama", "eager"), FullPolicy())
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped)
    assert "more than a softmax" in refusal(tiny("llama", "eager"))
    assert EvictionCache(tiny("llama", "sdpa"), FullPolicy())  # which does not run it


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_after_the_rotation_is_seen_though_all_its_weights_are_equal(dtype) -> None:
    model = model_of("hunyuan_v1_dense").to(dtype)
    assert set(model.model.layers[0].self_attn.key_layernorm.weight.tolist()) == {1}
    assert "changes them after rotation" in refusal(model)


def test_where_keys_cannot_be_moved_true_positions_are_served() -> None:
    model = model_of("hunyuan_v1_dense")
    ids = prompt(30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = EvictionCache(model, FullPolicy(), positions="true")
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
    with pytest.raises(ConfigError, match="cannot be undone"):  # which reads what queries were
        EvictionCache(model, ExpectedAttentionPolicy(), positions="true")


def test_queries_that_are_scaled_by_their_position_stay_at_it() -> None:
    scaled = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
    rope = {"rope_type": "default", "rope_theta": 1e4, **scaled}
    model = model_of("ministral3", rope_parameters=rope)
    assert "queries depend on their position" in refusal(model)
    assert EvictionCache(model, FullPolicy(), positions="true").positions == "true"
    rope["llama_4_scaling_beta"] = 0.0
    assert EvictionCache(model_of("ministral3", rope_parameters=rope), FullPolicy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layer_is_found_to_rotate_or_not(dtype) -> None:
    model = from_config(SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1]), dtype=dtype)
    for layer in model.model.layers:
        del layer.self_attn.use_rope  # nothing says which layers they are but what they do
        layer.self_attn.forward = types.MethodType(turning(layer), layer.self_attn)
    cache = EvictionCache(model, FullPolicy())
    assert [layer.rope.module is None for layer in cache.layers] == [False, True, False]


def turning(layer: torch.nn.Module) -> Any:
    """An attention's forward that decides by the layer's number."""
    own = type(layer.self_attn).forward

    def forward(self, *args, **kwargs):
        self.use_rope = self.layer_idx != 1
        return own(self, *args, **kwargs)

    return forward


def test_a_model_is_left_as_it_was_and_tried_once(monkeypatch) -> None:
    model = tiny("llama-dynamic").train()
    EvictionCache(model, FullPolicy())  # puts hooks of its own in place
    probe._known.clear()
    called: list[torch.nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.append(module))
        module.register_forward_pre_hook(lambda module, *_: called.append(module))

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            *(weight.sum().item() for weight in model.state_dict().values()),
            *(
                {name: dict(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
                for module in model.modules()
            ),
        ]

    before = state()
    EvictionCache(model, FullPolicy())
    assert repr(before) == repr(state()) and called == []
    monkeypatch.setattr(probe, "_Probe", None)
    EvictionCache(model, StreamingLLMPolicy(sink=1, window=2))


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed", "smollm3"])
def test_weights_that_are_loaded_for_each_step(family) -> None:
    model, ids = tiny(family), prompt(20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(weight.device.type == "meta" for weight in model.parameters())
        logits = model(ids, past_key_values=EvictionCache(model, FullPolicy())).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_without_weights_it_says_so() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]))
    assert "load them first" in refusal(model)
    model = tiny("llama")
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    assert "are its weights loaded?" in refusal(model)


class TestTextOfAModelThatReadsImages:
    @pytest.fixture
    def model(self) -> PreTrainedModel:
        text = {**FAMILIES["gemma3-mixed"].to_dict(), "vocab_size": 97}
        vision = SiglipVisionConfig(
            **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        )
        config = Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=91
        )
        return from_config(config)

    @pytest.mark.parametrize("padding", [0, 5])
    def test_gives_what_stock_gives(self, model, padding) -> None:
        ids = prompt(40, batch=2)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(input_ids=ids, attention_mask=mask, **options)
        cache = EvictionCache(model, FullPolicy())
        options |= {"past_key_values": cache}
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), expected)

    def test_images_are_refused_and_stock_still_reads_them(self, model) -> None:
        ids = prompt(40)
        ids[0, 4:8] = 91
        inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 28, 28)}
        cache = EvictionCache(model, FullPolicy())
        with torch.no_grad():
            with pytest.raises(ConfigError, match="pixel_values"):
                model(**inputs, past_key_values=cache)
            assert cache.get_seq_length() == 0
            assert model(**inputs).logits.isfinite().all()
            assert model(prompt(9), past_key_values=cache).logits.isfinite().all()
