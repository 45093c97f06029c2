"""Every causal family of transformers: its cache is right, or refused by name when it is made.

`python tests/test_families.py [family ...]` prints what becomes of each.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tiny import VOCAB, from_config, prompt
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baselines import FullPolicy, StreamingLLMPolicy
from buzz import EvictionCache
from buzz.errors import ConfigError
from buzz.layer import EvictionLayer

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 6  # enough of them for each kind of layer that a family mixes
TOKENS, SINK, WINDOW = 41, 4, 8

# What fields of configs are set to, where they are there.
SMALL: dict[Any, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"
    " output_vocab_size",
    64: "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size embedding_dim"
    " output_embedding_size word_embed_proj_dim attention_hidden_size backbone_hidden_size"
    " lru_width cross_attention_hidden_size ffn_dim dim_ff dff n_inner d_inner mamba_d_ssm"
    " hidden_size_per_layer_input",
    96: "intermediate_size ffn_hidden_size moe_intermediate_size shared_intermediate_size"
    " shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size"
    " decoder_ffn_dim encoder_ffn_dim expert_ffn_hidden_size feed_forward_size"
    " moe_shared_expert_intermediate_size shared_experts_intermediate_size"
    " prefix_dense_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads"
    " encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
    " swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts"
    " mamba_n_heads index_n_heads linear_num_heads linear_num_value_heads zero_expert_num o_groups",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk"
    " moe_k top_k_experts linear_num_key_heads",
    16: "head_dim swa_head_dim dim_head attention_head_dim attention_head_size v_head_dim d_head"
    " kv_channels q_lora_rank kv_lora_rank o_lora_rank qk_nope_head_dim index_head_dim"
    " linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_d_state"
    " state_size laurel_rank adapter_rank hc_lowrank loop_gate_rank gated_norm_rank"
    " router_hidden_size",
    8: "qk_rope_head_dim rotary_dim mamba_chunk_size sliding_window sliding_window_size"
    " attention_window_size window_size",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length"
    " max_target_positions",
}
DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"
    " num_encoder_layers num_decoder_layers num_blocks"
)

ROPE = {"rope_type": "default", "rope_theta": 1e4}


def extra_fields(family: str, layers: int) -> dict[str, Any]:
    """What a family wants beyond that, or has in its real mixture of layers."""
    full, sparse = "full_attention", "minimax_m3_sparse"
    mixed = {
        "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
        "blt": {"encoder_hash_byte_group_vocab": VOCAB},
        "cohere_compass_text": {"rope_parameters": {full: ROPE, "sliding_attention": ROPE}},
        "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "dots3_note_text": {"num_key_value_heads": 4, "qk_nope_head_dim": 8},
        "gemma3n_text": {"num_kv_shared_layers": 0},
        "gpt_neo": {"attention_types": [[["global"], layers]]},
        "lfm2_moe": {"layer_types": ["conv", full] * (layers // 2) or [full]},
        "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
        "minimax_m3_vl_text": {"layer_types": [full, sparse] * (layers // 2) or [full]},
        "moshi": {"audio_vocab_size": VOCAB},
        "qwen4_exp_text": {
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
            **{"indexer_budget": 16, "indexer_compress_ratio": 4},
        },
        "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32)},
        "xmod": {"default_language": "en_XX"},
        "zamba": {"layers_block_type": ["mamba", "hybrid"] * (layers // 2) or ["hybrid"]},
        "zamba2": {"layers_block_type": ["mamba", "hybrid"] * (layers // 2) or ["hybrid"]},
        "zaya": {"num_experts_per_tok": 1},
    }
    if family == "gemma4_assistant":  # its defaults do not fit together
        text = small_fields(CONFIG_MAPPING["gemma4_text"], layers)
        none = dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
        return {"text_config": text | none}
    return mixed.get(family, {})


# Families of which no small model can be made here, and words of the error that says why.
NOT_BUILT = {
    "dots3_note": "per_layer_config",  # its config lays down what layers 25 to 41 are
    "musicgen": "dropout",  # its config is of more than the class that the mapping names
    "musicgen_melody": "dropout",
}
if find_spec("timm") is None:
    NOT_BUILT["gemma3n"] = "timm"

# Families that a cache serves, at least if all their layers are of full attention.
SERVED = """
afmoe apertus apertus1p5_text arcee aria_text beam bitnet cohere cohere2 cohere2_moe
cohere_compass_text cwm dots1 emu3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo fuyu
gemma gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm
glm4 glm4_moe got_ocr2 gpt_neox granite granitemoe granitemoehybrid granitemoeshared helium
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna
lara_mini lfm2 lfm2_moe lfm3 llama mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
ministral3 mistral mixtral moshi moss_transcribe_diarize nanochat olmo olmo2 olmo3 olmoe persimmon
phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
qwen3_5_text qwen3_moe qwen3_next sarvam_moe seed_oss smollm3 solar_open starcoder2
"""


def small_fields(kind: type, layers: int) -> dict[str, Any]:
    """Arguments of a config class that make its models tiny, of those below it too."""
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    small = {name: size for size, names in SMALL.items() for name in names.split()}
    small |= dict.fromkeys(DEPTHS.split(), layers)
    fields = {name: size for name, size in small.items() if type(known.get(name)) is int}
    if "num_attention_heads" in known:
        fields |= {n: small[n] for n in ("num_key_value_heads", "head_dim") if n in known}
    special = [n for n in sorted(known) if n.endswith(("_token_id", "_token_index"))]
    special = [n for n in special if type(known[n]) is int]
    fields |= {name: VOCAB - 1 - number for number, name in enumerate(special)}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    spread = {"initializer_range": 0.2, "init_std": 0.2}
    fields |= {n: value for n, value in (ends | spread).items() if n in known}
    for name, part in parts_of(kind).items():
        fields[name] = {**small_fields(part, layers), "model_type": part.model_type}
    return fields | extra_fields(kind.model_type, layers)


def parts_of(kind: Any) -> dict[str, Any]:
    """Config classes below one, by field."""
    if not kind.sub_configs:
        return {}
    try:
        default = kind()
    except Exception:  # not even its defaults fit together
        return {}
    parts = {name: getattr(default, name, None) for name in kind.sub_configs}
    return {name: type(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def one_layer(fields: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Fields that make the only layer one that attends all tokens."""
    known = [field.name for field in dataclasses.fields(kind)]
    whole = {"layer_types": ["full_attention"], "sliding_window": 4096}
    name = next((name for name in whole if name in known), None)
    fields = {**fields, name: whole[name]} if name else fields
    if "text_config" in fields:
        part = parts_of(kind)["text_config"]
        fields["text_config"] = one_layer(fields["text_config"], part)
    return fields


def from_fields(kind: Any, fields: dict[str, Any]) -> PreTrainedModel:
    try:
        return from_config(kind(**fields), "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return from_config(kind(**fields), "eager")


def build(family: str, layers: int) -> PreTrainedModel:
    """A tiny model, in float32; with sdpa if it has that."""
    kind = CONFIG_MAPPING[family]
    fields = small_fields(kind, layers)
    if layers == 1:
        try:
            model = from_fields(kind, one_layer(fields, kind))
        except Exception:  # a family whose layers are never that
            model = from_fields(kind, fields)
    else:
        model = from_fields(kind, fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # those of norms, as in a trained model: not all 1
                weight.add_(torch.rand(weight.shape, generator=generator))
    return model


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits[0, -1]


def with_cache(model: PreTrainedModel, policy: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits of the last token, the others being read before."""
    cache = EvictionCache(model, policy, **options)
    model(input_ids=ids[:, :-1], past_key_values=cache)
    return logits(model, ids[:, -1:], past_key_values=cache)


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def differences(model: PreTrainedModel, one: bool, positions: str) -> dict[str, float]:
    """How far an evicting cache is from stock, by what is compared.

    Args:
        one: whether the model has one layer, so that its keys depend on their token alone.
        positions: `true` if those alone are served.
    """
    ids = prompt(TOKENS)
    policy = StreamingLLMPolicy(sink=SINK, window=WINDOW)
    kept = torch.tensor([*range(SINK), *range(TOKENS - 1 - WINDOW, TOKENS)])
    full = with_cache(model, FullPolicy(), ids, positions=positions)
    found = {"full": off(full, logits(model, ids, use_cache=False))}
    if one:
        mask = torch.zeros(1, TOKENS, dtype=torch.long)
        mask[0, kept] = 1
        places = torch.arange(TOKENS)[None]
        masked = logits(model, ids, attention_mask=mask, position_ids=places, use_cache=False)
        found["true"] = off(with_cache(model, policy, ids, positions="true"), masked)
    if one and positions == "cache":
        alone = logits(model, ids[:, kept], use_cache=False)
        found["cache"] = off(with_cache(model, policy, ids), alone)
    if positions == "cache":
        # A text that begins later has the same keys, turned.
        later = torch.arange(TOKENS - 1)[None] + TOKENS - 1 - SINK - WINDOW
        turned = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], position_ids=later, past_key_values=turned)
        cache = EvictionCache(model, policy)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, EvictionLayer):
                assert layer.store is not None
                held = layer.view(layer.store.keys)[:, :, :SINK]
                found[f"keys {index}"] = off(held, turned.layers[index].keys[:, :, :SINK])
    return found


@functools.cache
def verdict(family: str, layers: int) -> tuple[str, str]:
    """`right`, `refused` or `not built`, and why; `wrong` or `late` if it is a fault."""
    positions, limits = "cache", ""
    with torch.no_grad():
        try:
            model = build(family, layers)
        except Exception as error:
            return "not built", brief(error)
        try:
            EvictionCache(model, FullPolicy())
        except ConfigError as error:
            if "cache.positions=true" not in error.remedy:
                return "refused", error.remedy
            positions, limits = "true", error.remedy
        except Exception as error:
            return "late", brief(error)
        try:
            found = differences(model, layers == 1, positions)
        except Exception as error:
            return "late", brief(error)
    bound = 1e-4 if layers == 1 else 1e-3  # of several layers each adds its rounding
    wrong = {name: f"{value:.1g}" for name, value in found.items() if not value < bound}
    if wrong:
        return "wrong", str(wrong)
    return "right", " ".join([f"to {max(found.values()):.0e}", limits]).strip()


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:170]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused_by_name_when_the_cache_is_made(family: str) -> None:
    one, mixed = verdict(family, 1), verdict(family, LAYERS)
    kinds = {one[0], mixed[0]}
    if kinds == {"not built"}:
        assert NOT_BUILT.get(family, "no reason is known") in mixed[1]
        return
    assert family not in NOT_BUILT, "it can be built by now"
    assert kinds <= {"right", "refused", "not built"}, (one, mixed)
    assert "right" in kinds or family not in SERVED.split(), (one, mixed)


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        for layers in (1, LAYERS):
            print(f"{family:24} {layers}  {': '.join(verdict(family, layers))}", flush=True)
