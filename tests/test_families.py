"""Every causal family of transformers: its cache is right, or refused by name when it is made.

`python tests/test_families.py [family ...]` prints what becomes of each, and `... table` writes the
table of docs/cache.md anew.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import VOCAB, from_config, padded, prompt
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baselines import FullPolicy, H2OPolicy, SnapKVPolicy, StreamingLLMPolicy
from buzz import POLICIES, EvictionCache, ForkedCache
from buzz.adapter import decoder_of, entries_of, layers_of, states_of
from buzz.errors import ConfigError
from buzz.layer import EvictionLayer
from evals.run.memory import row_nbytes

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
    " attention_window_size attention_chunk_size window_size",
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
        "bamba": {"attn_layer_indices": [layers - 1] if layers > 1 else []},
        "granitemoehybrid": {"layer_types": ["mamba", full] * (layers // 2) or [full]},
        "nemotron_h": {
            **{"layers_block_type": ["mamba", "moe", full] * (layers // 3) or [full]},
            **{"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 8},
        },
        "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
        "blt": {"encoder_hash_byte_group_vocab": VOCAB},
        "cohere_compass_text": {"rope_parameters": {full: ROPE, "sliding_attention": ROPE}},
        "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "dots3_note_text": {"num_key_value_heads": 4, "qk_nope_head_dim": 8},
        "gemma3n_text": {
            "num_kv_shared_layers": 2 * (layers > 2),
            "layer_types": ["sliding_attention", full] * (layers // 2) or [full],
        },
        "gemma4_text": {
            "num_kv_shared_layers": 2 * (layers > 2),
            "layer_types": ["sliding_attention", full] * (layers // 2) or [full],
        },
        "gpt_neo": {"attention_types": [[["global"], layers]]},
        "gemma3_text": {"layer_types": ["sliding_attention", full] * (layers // 2) or [full]},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2": {"layer_types": ["conv", full] * (layers // 2) or [full]},
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
afmoe apertus apertus1p5_text arcee aria_text bamba beam bitnet cohere cohere2 cohere2_moe
cohere_compass_text cwm dots1 emu3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
flex_olmo fuyu gemma gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified
gemma4_unified_text glm glm4 glm4_moe got_ocr2 gpt_neox granite granitemoe granitemoehybrid
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
jais2 jamba kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text mellum
mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi
moss_transcribe_diarize nanochat nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3
phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next sarvam_moe seed_oss smollm3 solar_open starcoder2 zaya
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
            alone = layers == 1 and not states_of_rows(model)
            found = differences(model, alone, positions)
        except Exception as error:
            return "late", brief(error)
    bound = 1e-4 if layers == 1 else 1e-3  # of several layers each adds its rounding
    wrong = {name: f"{value:.1g}" for name, value in found.items() if not value < bound}
    if wrong:
        return "wrong", str(wrong)
    return "right", " ".join([f"to {max(found.values()):.0e}", limits]).strip()


def states_of_rows(model: PreTrainedModel) -> bool:
    """Whether layers have states, so that keys depend on the tokens before theirs."""
    return any(hasattr(kind.stock, "conv_states") for kind in layers_of(model))


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
    assert mixed[0] == "right" or family not in MIXED, mixed


# --- families that mix full attention with other layers ------------------------------------------

MIXED = (
    *("bamba", "cohere2", "falcon_h1", "gemma3_text", "gemma3n_text", "gemma4_text"),
    *("granitemoehybrid", "jamba", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "llama4_text"),
    *("nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zaya"),
)
RESTARTING = {"jamba"}  # whose recurrent layers begin anew with every chunk, in transformers too
TRUE_ALONE = {"zaya"}  # served at true positions alone
PADDING, CHUNKS = 7, [10, 8, 6]
METHODS = (
    FullPolicy(),
    StreamingLLMPolicy(sink=2, window=10),
    H2OPolicy(heavy=6, recent=6),
    SnapKVPolicy(capacity=12, window=4),
)

every_mixture = pytest.mark.parametrize("family", MIXED)


@functools.cache
def mixture(family: str) -> PreTrainedModel:
    return build(family, 4)


def options_of(family: str) -> dict[str, Any]:
    return {"positions": "true"} if family in TRUE_ALONE else {}


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Any, rows: list[Tensor], *rest: Any, **more: Any) -> Tensor:
    return tiny.feed(model, cache, padded(rows), *rest, **more)


def turns(family: str) -> list[int]:
    """A prompt, an answer, another turn and its answer; of one prompt where no chunk is read."""
    return [24, *[1] * 11] if family in RESTARTING else [24, 1, 1, 7, 1, 1]


def close(found: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    assert off(found, expected) < bound


@every_mixture
def test_a_padded_batch_and_two_turns_are_as_in_transformers(family: str) -> None:
    model, rows = mixture(family), [prompt(35, seed=1), prompt(35 - PADDING, seed=2)]
    cache = EvictionCache(model, FullPolicy(), **options_of(family))
    found = feed(model, cache, rows, turns(family))
    stock = feed(model, DynamicCache(config=model.config), rows, turns(family))
    close(found[0], stock[0])
    close(found[1, PADDING:], stock[1, PADDING:])
    alone = EvictionCache(model, FullPolicy(), **options_of(family))
    steps = [turns(family)[0] - PADDING, *turns(family)[1:]]
    close(found[1:, PADDING:], feed(model, alone, rows[1:], steps), 5e-4)


@every_mixture
def test_bytes_are_of_what_evicts_and_of_all_else(family: str) -> None:
    """What a budget is of, and all that transformers' own layers hold."""
    model, options = mixture(family), options_of(family)
    caches = [EvictionCache(model, policy, **options) for policy in (METHODS[0], METHODS[2])]
    stock = DynamicCache(config=model.config)
    for cache in (*caches, stock):
        feed(model, cache, [prompt(30)], [28, 1, 1])
    full, h2o = caches
    kinds = layers_of(model)
    tensors = [[*entries_of(layer), *states_of(layer)] for layer in stock.layers]
    assert full.nbytes() == sum(t.nbytes for layer in tensors for t in layer)
    assert full.nbytes() <= full.nbytes(allocated=True)
    own = [sum(t.nbytes for t in entries_of(layer)) for layer in stock.layers]
    assert full.nbytes(evicting=True) == sum(
        nbytes for nbytes, kind in zip(own, kinds, strict=True) if kind.evicts
    )
    for index, kind in enumerate(kinds):
        if kind.evicts:
            positions = h2o.kept_positions(index)
            assert h2o.lengths[index] == positions.shape[-1] == 12
            assert positions[..., -6:].tolist() == [[[*range(24, 30)]] * positions.shape[1]]
    assert row_nbytes(model, held=30, seen=30) == full.nbytes()
    spared = (30 - 12) * h2o.entry_nbytes
    assert full.nbytes() - h2o.nbytes() == spared
    assert full.nbytes(evicting=True) - h2o.nbytes(evicting=True) == spared


@every_mixture
@torch.no_grad()
def test_what_is_left_is_attended_and_nothing_else_is_touched(family: str) -> None:
    """As in transformers' own cache, with all but these entries taken out of the same layers."""
    model, ids = mixture(family), prompt(25, seed=12)
    cache = EvictionCache(model, METHODS[2], positions="true")
    stock = DynamicCache(config=model.config)
    for one in (cache, stock):
        feed(model, one, [ids], [24])
    assert cache.evictions == [1]
    for index, kind in enumerate(layers_of(model)):
        if kind.evicts:
            own: Any = stock.layers[index]
            kept = cache.kept_positions(index)[..., None]
            own.keys = own.keys.gather(2, kept.expand(-1, -1, -1, own.keys.shape[-1]))
            own.values = own.values.gather(2, kept.expand(-1, -1, -1, own.values.shape[-1]))
    given = {"input_ids": ids[:, 24:], "position_ids": torch.tensor([[24]])}
    close(*(model(**given, past_key_values=one).logits for one in (cache, stock)))


@every_mixture
def test_a_prompt_in_chunks_is_judged_as_one(family: str) -> None:
    """And a chunk is refused by name where a layer would read it as the beginning."""
    model, rows, prompts = mixture(family), [prompt(28, seed=3)], sum(CHUNKS)
    for policy in METHODS[1:]:
        whole = EvictionCache(model, policy, **options_of(family))
        expected = feed(model, whole, rows, [prompts, 1, 1, 1, 1])
        cache = EvictionCache(model, policy, hold_until=prompts, **options_of(family))
        if family in RESTARTING:
            with pytest.raises(ConfigError, match="8 tokens.*layer 0 of this model.*10 before"):
                feed(model, cache, rows, CHUNKS)
            continue
        close(feed(model, cache, rows, [*CHUNKS, 1, 1, 1, 1]), expected, 5e-4)
        assert cache.lengths == whole.lengths
        for index, kind in enumerate(layers_of(model)):
            if kind.evicts:
                assert torch.equal(cache.kept_positions(index), whole.kept_positions(index))


@every_mixture
def test_copies_go_on_apart_and_an_emptied_cache_is_as_new(family: str) -> None:
    model, policy = mixture(family), METHODS[2]
    rows, steps = [prompt(30, seed=4), prompt(30, seed=5)], [24, *[1] * 6]
    expected = feed(model, EvictionCache(model, policy, **options_of(family)), rows, steps)
    cache = EvictionCache(model, policy, **options_of(family))
    feed(model, cache, rows, steps[:2])
    twin, held = cache.copy(), cache.nbytes(allocated=True)
    other = [torch.cat([row[:, :25], prompt(5, seed=9)], 1) for row in rows]
    feed(model, twin, other, [1] * 5)
    twin.reset()
    assert cache.nbytes(allocated=True) == held
    close(feed(model, cache, rows, steps[2:]), expected[:, 25:], 1e-5)
    feed(model, twin, rows[:1], [20])  # of another batch
    twin.reset()
    assert twin.nbytes() == 0 and twin.get_seq_length() == 0
    close(feed(model, twin, rows, steps), expected, 1e-5)


@every_mixture
def test_rows_change_places_and_beams_are_as_in_transformers(family: str) -> None:
    model, policy = mixture(family), METHODS[2]
    rows, steps = [prompt(28, seed=6), prompt(28 - PADDING, seed=7)], [24, *[1] * 4]
    cache = EvictionCache(model, policy, **options_of(family))
    feed(model, cache, rows, steps[:2])
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([0, 1, 0]))
    cache.batch_repeat_interleave(2)
    order = [1, 1, 0, 0, 1, 1]
    fresh = EvictionCache(model, policy, **options_of(family))
    expected = feed(model, fresh, [rows[i] for i in order], steps)
    close(feed(model, cache, [rows[i] for i in order], steps[2:]), expected[:, 25:])

    given = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, **padded(rows)}
    given["position_ids"] = None
    beams = [
        model.generate(**given, past_key_values=one)
        for one in (
            EvictionCache(model, METHODS[0], **options_of(family)),
            DynamicCache(config=model.config),
        )
    ]
    assert torch.equal(*beams)


@every_mixture
def test_rows_of_one_pass_are_what_methods_give_alone(family: str) -> None:
    """Two prompts, padded and in chunks; copies, and rows that are dropped."""
    model, options, steps = mixture(family), options_of(family), [1] * 6
    rows = [prompt(30 - PADDING, seed=10), prompt(30, seed=11)]
    chunks = [24] if family in RESTARTING else CHUNKS
    cache = ForkedCache(model, [METHODS, METHODS], hold_until=24, **options)
    starts = [row[:, : row.shape[1] - 6] for row in rows]
    first = feed(model, cache, starts, chunks)
    other = cache.copy()
    other.keep([1, 6])
    later = [rows[prompt] for prompt in cache.prompts]
    found = feed(model, cache, later, steps)
    for row, policy in enumerate([*METHODS, *METHODS]):
        own = cache.prompts[row]
        alone = EvictionCache(model, policy, **options)
        expected = feed(model, alone, [rows[own]], [starts[own].shape[1], *steps])
        padding = 24 - starts[own].shape[1]
        close(torch.cat([first[own, padding:], found[row]]), expected[0], 5e-4)
        assert cache.forks[row].lengths == alone.lengths, policy.name
        assert cache.forks[row].nbytes() == alone.nbytes(), policy.name
    kept = feed(model, other, [later[1], later[6]], steps)
    close(kept, found[[1, 6]], 1e-4)
    cache.reset()
    last = feed(model, cache, starts, chunks, logits_to_keep=1)
    close(last[:, -1], first[:, -1], 1e-5)


@every_mixture
@pytest.mark.parametrize("forked", [False, True])
def test_an_error_amid_a_step_is_no_silent_loss(family: str, forked: bool) -> None:
    model, policy, options = mixture(family), METHODS[2], options_of(family)
    make: Any = ForkedCache if forked else EvictionCache
    cache = make(model, [policy] * 2 if forked else policy, **options)
    rows = [prompt(20)] * (1 + forked)
    feed(model, cache, rows[:1], [18])

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = decoder_of(model).layers[0].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        feed(model, cache, rows, [1])
    handle.remove()
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        model(prompt(1).expand(len(rows), 1), past_key_values=cache)
    cache.reset()
    feed(model, cache, rows[:1], [18])
    feed(model, cache, rows, [1])


@every_mixture
def test_what_no_mixture_serves_is_refused_by_name(family: str) -> None:
    model, options = mixture(family), options_of(family)
    repeats = POLICIES["kvzip"]()
    for making in (EvictionCache, lambda *args, **given: ForkedCache(args[0], [args[1]], **given)):
        with pytest.raises(ConfigError, match=r"method\.name='kvzip': layers that do not evict"):
            making(model, repeats, **options)
    with pytest.raises(ConfigError, match=r"model\.compile=True.*window of their own, recurrent"):
        EvictionCache(model, METHODS[2], compiled=True, **options)


def test_a_temperature_that_grows_with_the_text_wants_true_positions() -> None:
    """Llama 4 scales queries by how many tokens its cache has seen."""
    kind = CONFIG_MAPPING["llama4_text"]
    hot = {"attn_temperature_tuning": True, "floor_scale": 8}
    model = from_fields(kind, small_fields(kind, 4) | hot)
    with pytest.raises(ConfigError, match=r"layer 3 makes queries.*cache\.positions=true"):
        EvictionCache(model, FullPolicy())
    rows, steps = [prompt(30)], [20, 6, 1, 1, 1, 1]
    cache = EvictionCache(model, FullPolicy(), positions="true")
    stock = DynamicCache(config=model.config)
    close(feed(model, cache, rows, steps), feed(model, stock, rows, steps))


def test_positions_in_the_embeddings_are_found() -> None:
    """Of a hybrid without RoPE, whose keys would then depend on them."""
    model = build("jamba", 4)
    embed = model.get_input_embeddings()
    weights = embed.weight

    def forward(_: Any, ids: Tensor) -> Tensor:
        return weights[ids] + torch.arange(ids.shape[1])[:, None]

    embed.forward = types.MethodType(forward, embed)
    with pytest.raises(ConfigError, match="marks positions in its embeddings"):
        EvictionCache(model, FullPolicy())


# --- the table of the docs -----------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs/cache.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
REFUSED = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v4", "gemma2", "kimi_linear", "minimax_m3_vl_text"),
    *("qwen4_exp_text", "recurrent_gemma", "zamba2"),
)


def cells(family: str) -> tuple[str, ...]:
    """What the table says of a family that is served."""
    kinds = layers_of(mixture(family))
    evicts = sorted({f"`{kind.name}`" for kind in kinds if kind.evicts})
    stays = sorted({f"`{kind.name}`" for kind in kinds if not kind.evicts} - {"`dummy`"})
    limits = []
    if "`hybrid`" in evicts:
        stays.append("states of these layers")
    if any(kind.source for kind in kinds):
        stays.append("layers that share entries hold none")
        limits.append("entries are judged by the attention of the layer that holds them")
    if family in RESTARTING:
        limits.append("a prompt in one piece, later tokens one at a time")
    if family in TRUE_ALONE:
        limits.append('`positions="true"` alone')
    if family == "llama4_text":
        limits.append('`positions="true"` alone, where attention has a temperature')
    reads = "no" if family in RESTARTING else "yes"
    return ", ".join(evicts), ", ".join(stays), "yes", reads, "yes", "; ".join(limits)


def table() -> str:
    """Markdown: families that mix layers, those alike in one row, and families that are refused."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in MIXED:
        alike.setdefault(cells(family), []).append(f"`{family}`")
    rows = [(", ".join(families), *own) for own, families in alike.items()]
    head = ("`model_type`", "evicts in", "beside it, in transformers' own layers")
    head += ("batches, beams, copies", "chunks, turns", "one pass", "limits")
    served = [head, ("---",) * len(head), *rows]
    reasons = [(f"`{family}`", verdict(family, LAYERS)[1]) for family in REFUSED]
    refused = [("`model_type`", "refused, because"), ("---", "---"), *reasons]
    lines = ["\n".join(f"| {' | '.join(row)} |" for row in part) for part in (served, refused)]
    return "\n\n".join(lines) + "\n"


def written(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


def test_the_page_says_what_becomes_of_families() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "python tests/test_families.py table writes it anew"
    assert {verdict(family, LAYERS)[0] for family in REFUSED} == {"refused"}


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        PAGE.write_text(written(PAGE.read_text()))
        sys.exit()
    for family in sys.argv[1:] or FAMILIES:
        for layers in (1, LAYERS):
            print(f"{family:24} {layers}  {': '.join(verdict(family, layers))}", flush=True)
