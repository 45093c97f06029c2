"""Models and tokenizers by config: the embedded SmolLM2, hub names, local folders, random weights.

A model config has `name`, `max_length` (context in tokens), `dtype`, `attn_implementation`, and

- `compile`: whether answers are decoded by one graph of torch.compile (false where it is not said);
- `name_or_path`: a hub name or a folder, with `gguf_file` where the weights are such a file in it;
- or the shape of a random Llama (:data:`SHAPE`, `seed`), which needs no download.

Code from a hub is never executed (`trust_remote_code` stays off).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available, logging

from buzz.adapter import why_unsupported
from buzz.errors import ConfigError
from evals.run.config import Seed, Text
from evals.run.weights import file_digest, folder_digest
from evals.tasks.build import STRICT, validate

ROOT = Path(__file__).resolve().parents[2]
NAMED = {path.stem: path for path in sorted((ROOT / "configs" / "model").glob("*.yaml"))}
DTYPES = {t: getattr(torch, t) for t in ("float32", "bfloat16", "float16")}
ATTENTION = ("sdpa", "eager", "flash_attention_2")
SOURCE = "converted_from"  # of a converted GGUF file: what it was made from and what it was then
SPECIAL = ("<bos>", "<eos>", "<pad>")


class Model(BaseModel):
    """What every model config has."""

    model_config = STRICT
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
    source = _source(cfg)
    gguf = source.endswith(".gguf")
    limit = None if gguf else context_length(_pretrained(AutoConfig, cfg, source))
    if limit is None:
        where = "a GGUF file" if gguf else "its config.json"
        raise ConfigError("model.max_length", None, f"{where} does not say it; give the tokens")
    cfg["max_length"] = limit


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for, by its config; a stretched RoPE's factor counts."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor") or 1
    return int(max(positions, (original or positions) * factor))


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
    else:
        source = _source(cfg)
        if not source.endswith(".gguf"):  # a GGUF file is checked when it is converted
            config = _pretrained(AutoConfig, cfg, source)
            _require_supported(cfg, config)
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
        ConfigError: as :func:`check_model`; also unreadable weights and a missing device.
    """
    device = device_of(device)
    check_model(cfg)
    dtype, attention = DTYPES[cfg["dtype"]], cfg["attn_implementation"]
    tokenizer = load_tokenizer(cfg)
    if "hidden_size" in cfg:
        # Only the model draws from this seed; the caller's random state is left as it was.
        with torch.random.fork_rng(), device:
            torch.manual_seed(cfg["seed"])
            model = AutoModelForCausalLM.from_config(
                _random_config(cfg), dtype=dtype, attn_implementation=attention
            )
    else:
        model = _pretrained(
            AutoModelForCausalLM,
            cfg,
            _checkpoint(cfg),
            dtype=dtype,
            attn_implementation=attention,
            device_map=device,
        )
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    # Decoding is greedy; a checkpoint's sampling defaults would only make `generate` warn.
    generation.do_sample = False
    generation.temperature = generation.top_p = generation.top_k = None
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(cfg: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with left padding and a pad token.

    Raises:
        ConfigError: as :func:`check_model`; also unreadable files.
    """
    check_model(cfg)
    if "hidden_size" in cfg:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = _pretrained(AutoTokenizer, cfg, _checkpoint(cfg))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    """Names the weights that a checked model config stands for, without loading them.

    Returns:
        Of a folder or a GGUF file the digest of its content (:mod:`evals.run.weights`), of random
        weights that of shape and seed, of a hub model the commit of its snapshot in the local
        cache, None if the cache does not tell.
    """
    if "hidden_size" in cfg:
        shape = [cfg[name] for name in (*SHAPE, "max_length", "seed")]
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
    source = _source(cfg)
    if cfg.get("gguf_file"):
        return file_digest(_gguf(cfg))
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


def _source(cfg: Mapping[str, Any]) -> str:
    """A hub name, a checkpoint folder, or a GGUF file (ends in .gguf, if not converted yet)."""
    given = cfg.get("name_or_path")
    if not given:
        raise ConfigError("model.name_or_path", given, "name a hub model or a folder")
    if cfg.get("gguf_file"):
        file = _gguf(cfg)
        if not file.is_file():
            remedy = "there is no such file; `make model` fetches the embedded model"
            raise ConfigError("model.gguf_file", str(file), remedy)
        ready = _converted(file)
        return str(ready if _fresh(ready, file) else file)
    folder = _folder(given)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("model.name_or_path", given, "the folder holds no config.json")
        return str(folder)
    if folder.exists() or given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise ConfigError("model.name_or_path", given, "there is no such folder")
    return given


def _checkpoint(cfg: Mapping[str, Any]) -> str:
    """As :func:`_source`; a GGUF file is converted once, to a float32 checkpoint beside it."""
    source = _source(cfg)
    return str(_convert(cfg, Path(source))) if source.endswith(".gguf") else source


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    # The embedded model lies in the checkout, wherever the harness is started.
    return next((p for p in (folder, ROOT / folder) if p.exists()), folder)


def _gguf(cfg: Mapping[str, Any]) -> Path:
    return _folder(cfg["name_or_path"]) / cfg["gguf_file"]


def _converted(gguf: Path) -> Path:
    return gguf.with_suffix("")


def _fresh(ready: Path, gguf: Path) -> bool:
    """Whether a folder holds what was converted from this very file, and as it was then."""
    source = ready / SOURCE
    return source.is_file() and source.read_text() == _stamp(ready, gguf)


def _stamp(ready: Path, gguf: Path) -> str:
    return f"{gguf.name} {file_digest(gguf)} to {folder_digest(ready)}\n"


def _convert(cfg: Mapping[str, Any], gguf: Path) -> Path:
    """GGUF to a float32 safetensors checkpoint with tokenizer, complete or not there at all."""
    target = _converted(gguf)
    folder, options = str(gguf.parent), {"gguf_file": gguf.name}
    config = _pretrained(AutoConfig, cfg, folder, **options)
    _require_supported(cfg, config)
    tokenizer = _pretrained(AutoTokenizer, cfg, folder, **options)
    options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    unpacked = _pretrained(AutoModelForCausalLM, cfg, folder, **options)
    # A model that came from GGUF refuses to be saved, though its weights are plain by now.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=f".{target.name}.") as temporary:
        part = Path(temporary) / target.name
        with _quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        (part / SOURCE).write_text(_stamp(part, gguf))
        if not _fresh(target, gguf):  # or another process was faster
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
    return target


def _pretrained(auto: Any, cfg: Mapping[str, Any], source: str, **options: Any) -> Any:
    """`auto.from_pretrained`, quiet, without network for local folders, failing as ConfigError."""
    try:
        with _quiet():
            local = Path(source).exists()
            # Left unsaid, a checkpoint with code of its own would make transformers ask.
            options |= {"local_files_only": local, "trust_remote_code": False}
            return auto.from_pretrained(source, **options)
    except Exception as error:  # of the hub's client, or of half a file: any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = f"{reason} (give a local folder, or a hub name that this machine can reach)"
        raise ConfigError("model.name_or_path", cfg["name_or_path"], remedy) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _require_supported(cfg: Mapping[str, Any], config: PretrainedConfig) -> None:
    if reason := why_unsupported(config):
        raise ConfigError(
            "model.name_or_path",
            cfg["name_or_path"],
            f"{config.model_type} {reason}; take a model such as Llama, Mistral or Qwen",
        )


def device_of(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "device", str(device), "write auto, or a device of this machine"
        ) from error
    return found
