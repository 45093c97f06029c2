"""Models and tokenizers by config: the embedded SmolLM2, hub names, local folders, random weights.

A model config has `name`, `max_length` (context in tokens), `dtype`, `attn_implementation`, and

- `compile`: whether answers are decoded by one graph of torch.compile (false where it is not said);
- `name_or_path`: a hub name or a folder, with `gguf_file` where the weights are such a file in it;
- or the shape of a random Llama (:data:`SHAPE`, `seed`), which needs no download.

Code from a hub is never executed (`trust_remote_code` stays off).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, Field, PositiveInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available

from buzz import kernels
from buzz.errors import ConfigError
from evals import CONFIGS
from evals.run.checkpoints import (
    checkpoint,
    gguf_file,
    pretrained,
    require_supported,
    source_of,
)
from evals.run.config import Seed, Text
from evals.run.console import say
from evals.run.weights import file_digest, folder_digest
from evals.tasks.build import KNOWN, validate

NAMED = {path.stem: path for path in sorted((CONFIGS / "model").glob("*.yaml"))}
DTYPES = {t: getattr(torch, t) for t in ("float32", "bfloat16", "float16")}
ATTENTION = ("sdpa", "eager", "flash_attention_2")
SPECIAL = ("<bos>", "<eos>", "<pad>")
# The date that chat templates get: with the real one, prompts would change from day to day.
TODAY = date(2024, 7, 26)
CLOCK = "strftime_now"  # the templates' function
# Of strftime; `%-d` and the like come before `%d`.
DIRECTIVES = ("-d", "-m", "-H", "-I", *"aAwdebBmyYHIpMSfjUWcxXDFTR%")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SETTINGS = "unused_generation_settings"  # attribute of a model: its generation_config.json
# The shortest context that a model was trained on before a linear RoPE stretched it.
LEAST_CONTEXT = 2048


class Model(BaseModel):
    """What every model config has."""

    model_config = KNOWN
    name: Text | None = None
    max_length: PositiveInt
    dtype: Literal[tuple(DTYPES)]
    attn_implementation: Literal[ATTENTION]
    name_or_path: Text | None = None
    gguf_file: Text | None = None
    compile: bool = False


class Shape(BaseModel):
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: Annotated[int, Field(ge=len(SPECIAL) + 256)]


SHAPE = tuple(Shape.model_fields)


class RandomModel(Model, Shape):
    seed: Seed


def named_config(name: str) -> dict[str, Any]:
    """The model config of one of :data:`NAMED`."""
    config: Any = OmegaConf.to_container(OmegaConf.load(NAMED[name]))
    return config


def complete_model(cfg: dict[str, Any]) -> None:
    """Sets a `max_length` of null to what the model's config.json says.

    Raises:
        ConfigError: as :func:`check_model`; or it says nothing.
    """
    if "hidden_size" in cfg or cfg.get("max_length") is not None:
        return
    validate(Model, cfg | {"max_length": 1}, "model")
    config = config_of(cfg)
    limit = context_length(config) if config else None
    if limit is None:
        where = "its config.json" if config else "a GGUF file"
        raise ConfigError("model.max_length", None, f"{where} does not say it; give the tokens")
    cfg["max_length"] = limit


def config_of(cfg: Mapping[str, Any]) -> PretrainedConfig | None:
    """A model's config.json; None for random weights, and for GGUF files (checked when unpacked).

    Raises:
        ConfigError: there is no such model, or none that can be read.
    """
    source = "" if "hidden_size" in cfg else source_of(cfg)
    if not source or source.endswith(".gguf"):
        return None
    return pretrained(AutoConfig, cfg, source)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for, by its config; a stretched RoPE's factor counts."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor") or 1
    kind = rope.get("rope_type") or rope.get("type")
    # Beside a linear RoPE most files give the stretched positions, and some those of before.
    if kind == "linear" and positions >= LEAST_CONTEXT * factor:
        return int(positions)
    return int(max(positions, (original or positions) * factor))


def rope_by_length(cfg: Mapping[str, Any]) -> str | None:
    """The type of a checked model's RoPE, if its frequencies depend on how long a text is.

    None where all texts of the model config's `max_length` have the same.
    """
    whole = config_of(cfg)
    if whole is None:
        return None
    config = whole.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(one for one in ropes.values() if isinstance(one, dict))):
        kind = rope.get("rope_type", "default")
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if ("dynamic" in kind or kind == "longrope") and cfg["max_length"] > trained:
            return kind
    return None


def check_model(cfg: Mapping[str, Any]) -> None:
    """Checks a model config without loading weights; of a hub model its config.json is fetched.

    Raises:
        ConfigError: unknown dtype or attention, size below 1, a context longer than the model's,
            missing folder or file, hub name that cannot be had, no RoPE, flash attention that
            cannot run here.
    """
    validate(RandomModel if "hidden_size" in cfg else Model, cfg, "model")
    if cfg["attn_implementation"] == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ConfigError(
                "model.attn_implementation",
                "flash_attention_2",
                "needs a CUDA device and `pip install -e .[flash-attn]`; otherwise write sdpa",
            )
        if cfg["dtype"] == "float32":
            raise ConfigError("model.dtype", "float32", "flash_attention_2 needs bfloat16/float16")
    if "hidden_size" in cfg:
        _random_config(cfg)
    elif config := config_of(cfg):
        require_supported(cfg, config)
        if (limit := context_length(config)) is not None and cfg["max_length"] > limit:
            remedy = f"the model has {limit:,} positions, by its config.json; give at most that"
            raise ConfigError("model.max_length", cfg["max_length"], remedy)


def load_model(
    cfg: Mapping[str, Any], device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode on its device, and its tokenizer with left padding and a pad token.

    Args:
        cfg: the model config, see the module's docstring.
        device: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: as :func:`check_model`; also unreadable weights and a missing device, or a card
            that the kernels do not serve.
    """
    device, tokenizer = device_of(device), load_tokenizer(cfg)
    dtype, attention = DTYPES[cfg["dtype"]], cfg["attn_implementation"]
    if device.type == "cuda":
        kernels.implementation(torch.empty(0, dtype=dtype, device=device))
    if "hidden_size" in cfg:
        # Only the model draws from this seed; the caller's random state is left as it was.
        with torch.random.fork_rng(), device:
            torch.manual_seed(cfg["seed"])
            model = AutoModelForCausalLM.from_config(
                _random_config(cfg), dtype=dtype, attn_implementation=attention
            )
    else:
        model = pretrained(
            AutoModelForCausalLM,
            cfg,
            checkpoint(cfg),
            dtype=dtype,
            attn_implementation=attention,
            device_map=device,
        )
    clear_settings(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False), tokenizer


def clear_settings(model: PreTrainedModel) -> None:
    """Removes a model's generation settings but its special tokens, and prints those it had.

    `generate` would take penalties, biases, beams or time limits from them, so that answers would
    no longer be greedy.
    """
    usual = GenerationConfig._get_default_generation_params()
    usual |= dict.fromkeys(("output_attentions", "output_hidden_states"), False)
    had = json.loads(model.generation_config.to_json_string(use_diff=True))
    tokens = {name: had.pop(name, None) for name in TOKENS}
    for name in ("transformers_version", "_from_model_config"):
        had.pop(name, None)
    had = {name: value for name, value in had.items() if value != usual.get(name)}
    setattr(model, SETTINGS, had)
    model.generation_config = GenerationConfig(**tokens)
    model.config.return_dict = True  # a tuple, which config.json may ask for, names nothing
    if had:
        asked = ", ".join(f"{name}={value}" for name, value in had.items())
        say(f"{model.name_or_path}: its generation_config.json asks for {asked}; not used")


def own_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For the record: generation settings that were removed, and the date that templates get."""
    told = {"template_date": TODAY.isoformat()} if CLOCK in str(tokenizer.chat_template) else {}
    had = getattr(model, SETTINGS, None)
    return told | ({SETTINGS: had} if had else {})


def load_tokenizer(cfg: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with left padding and a pad token.

    Raises:
        ConfigError: as :func:`check_model`; also unreadable files.
    """
    check_model(cfg)
    if "hidden_size" in cfg:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = pretrained(AutoTokenizer, cfg, checkpoint(cfg))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_date(tokenizer)
    return tokenizer


def set_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes chat templates take :data:`TODAY` for the date, which they ask `strftime_now` for."""
    steps = "".join(f"|replace('%{one}', {TODAY.strftime(f'%{one}')!r})" for one in DIRECTIVES)
    clock = f"{{%- macro {CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}"

    def fixed(template: str) -> str:
        return clock + template if CLOCK in template and clock not in template else template

    templates = tokenizer.chat_template
    if isinstance(templates, str):
        tokenizer.chat_template = fixed(templates)
    elif templates:
        tokenizer.chat_template = {name: fixed(one) for name, one in templates.items()}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte, ids 3 to 258, after <bos>, <eos> and <pad>; needs no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )


def model_digest(cfg: Mapping[str, Any]) -> str | None:
    """Names the weights of a checked model config, without loading them.

    Returns:
        For a folder or a GGUF file the digest of its content (:mod:`evals.run.weights`), for random
        weights that of shape and seed, for a hub model the commit of its snapshot in the local
        cache (None if the cache does not have it).
    """
    if "hidden_size" in cfg:
        shape = [cfg[name] for name in (*SHAPE, "max_length", "seed")]
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
    source = source_of(cfg)
    if cfg.get("gguf_file"):
        return file_digest(gguf_file(cfg))
    if Path(source).is_dir():
        return folder_digest(Path(source))
    cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _random_config(cfg: Mapping[str, Any]) -> LlamaConfig:
    hidden, heads, kv_heads = (cfg[name] for name in (SHAPE[0], SHAPE[3], SHAPE[4]))
    if hidden % (2 * heads):
        raise ConfigError("model.hidden_size", hidden, f"give a multiple of {2 * heads}")
    if heads % kv_heads:
        raise ConfigError("model.num_key_value_heads", kv_heads, f"give a divisor of {heads}")
    return LlamaConfig(
        **{name: cfg[name] for name in SHAPE},
        max_position_embeddings=cfg["max_length"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def device_of(device: str | torch.device) -> torch.device:
    """A device by its name.

    Args:
        device: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        remedy = "there is no CUDA device here, or torch was built without; write auto or cpu"
        raise ConfigError("device", str(device), remedy)
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "device", str(device), "write auto, or a device of this machine"
        ) from error
    return found
