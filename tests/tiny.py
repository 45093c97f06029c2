"""Tiny random models for tests: real transformers classes, weights large enough to matter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
EXPERTS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.5, 2.0, 3.0, 4.0]

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-mha": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama-mqa": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "llama-dynamic": LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 64},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "llama3": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-yarn": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1]),
    "phi3": Phi3Config(**SHAPE),
    "phi3-partial": Phi3Config(
        **SHAPE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "phi3-longrope": Phi3Config(
        **SHAPE,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 64,
        },
    ),
    "cohere-interleaved": CohereConfig(**SHAPE),
    "gemma3-mixed": Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "gpt-oss": GptOssConfig(
        **SHAPE,
        **EXPERTS,
        layer_types=["full_attention"] * 3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt-oss-mixed": GptOssConfig(
        **SHAPE,
        **EXPERTS,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def tiny(
    family: str = "llama",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A fresh model of `family` with random weights."""
    return from_config(FAMILIES[family], attention, dtype, seed)


def from_config(
    config: PreTrainedConfig,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    torch.manual_seed(seed)
    own = copy.deepcopy(config)  # a model writes its attention into its config, and keeps that
    if attention == "sdpa" and config.model_type in ("gpt_oss", "mimo_v2_flash"):  # it has no sinks
        attention = "eager"
    model = AutoModelForCausalLM.from_config(own, attn_implementation=attention, dtype=dtype)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):  # which trained models do not have near 0
            torch.nn.init.normal_(weight, mean=4, std=2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [batch, tokens], none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def checkpoint(folder: Path, tokenizer: Any = None, **shape: Any) -> Path:
    """A folder with a tiny Llama and its tokenizer, which has one token a byte if none is given."""
    from evals.run.models import byte_tokenizer

    config = LlamaConfig(**SHAPE | {"vocab_size": 300, "eos_token_id": 1} | shape)
    from_config(config).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def gpt2() -> PreTrainedModel:
    """A model that marks positions by a learned table."""
    return from_config(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts [1, n] as one left-padded batch, with its mask and positions."""
    longest = max(ids.shape[1] for ids in prompts)
    ids = torch.cat([torch.nn.functional.pad(own, (longest - own.shape[1], 0)) for own in prompts])
    mask = (ids != 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def feed(
    model: PreTrainedModel,
    cache: Any,
    inputs: dict[str, torch.Tensor],
    steps: list[int],
    **more: Any,
) -> torch.Tensor:
    """Logits of all tokens, fed in steps of so many."""
    logits, seen = [], cache.get_seq_length()
    for new in steps:
        own = {name: given[:, seen : seen + new] for name, given in inputs.items()}
        own["attention_mask"] = inputs["attention_mask"][:, : seen + new]
        logits.append(model(**own, past_key_values=cache, **more).logits)
        seen += new
    return torch.cat(logits, dim=1)
