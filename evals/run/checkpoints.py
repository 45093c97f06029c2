"""Finds a model: a hub name, a folder, or a GGUF file, which is unpacked once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from buzz.adapter import why_unsupported
from buzz.errors import ConfigError
from evals.run.weights import file_digest, folder_digest

ROOT = Path(__file__).resolve().parents[2]
MAKE = {  # what sets up the GGUF files of configs/model
    "SmolLM2-135M-Instruct.Q4_1.gguf": "make model",
    "gemma-3-270m-q4_k_m.gguf": "make model-gemma",
}
SOURCE = "converted_from"  # file beside a converted checkpoint: digests of its source and of itself


def source_of(cfg: Mapping[str, Any]) -> str:
    """A hub name, a checkpoint folder, or a GGUF file (ends in .gguf, if not converted yet)."""
    given = cfg.get("name_or_path")
    if not given:
        raise ConfigError("model.name_or_path", given, "name a hub model or a folder")
    if cfg.get("gguf_file"):
        file = gguf_file(cfg)
        if not file.is_file():
            remedy = "there is no such file"
            if how := MAKE.get(file.name):
                another = "model=hf model.name_or_path=NAME takes another model"
                remedy += f"; `{how}` sets it up in a checkout, {another}"
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


def checkpoint(cfg: Mapping[str, Any]) -> str:
    """As :func:`source_of`; a GGUF file is converted once, to a float32 checkpoint beside it."""
    source = source_of(cfg)
    return str(_convert(cfg, Path(source))) if source.endswith(".gguf") else source


def gguf_file(cfg: Mapping[str, Any]) -> Path:
    return _folder(cfg["name_or_path"]) / cfg["gguf_file"]


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    # The embedded model is in the checkout, wherever the harness is started.
    return next((p for p in (folder, ROOT / folder) if p.exists()), folder)


def _converted(gguf: Path) -> Path:
    return gguf.with_suffix("")


def _fresh(ready: Path, gguf: Path) -> bool:
    """Whether a folder was converted from this very file, and has not changed since."""
    source = ready / SOURCE
    return source.is_file() and source.read_text() == _stamp(ready, gguf)


def _stamp(ready: Path, gguf: Path) -> str:
    return f"{gguf.name} {file_digest(gguf)} to {folder_digest(ready)}\n"


def _convert(cfg: Mapping[str, Any], gguf: Path) -> Path:
    """Converts GGUF to a float32 safetensors checkpoint with tokenizer, complete or not at all."""
    target = _converted(gguf)
    folder, options = str(gguf.parent), {"gguf_file": gguf.name}
    config = pretrained(AutoConfig, cfg, folder, **options)
    require_supported(cfg, config)
    tokenizer = pretrained(AutoTokenizer, cfg, folder, **options)
    options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    unpacked = pretrained(AutoModelForCausalLM, cfg, folder, **options)
    # A model from GGUF cannot be saved, even if its weights are no longer quantized.
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
        if not _fresh(target, gguf):  # else another process was faster
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
    return target


def pretrained(auto: Any, cfg: Mapping[str, Any], source: str, **options: Any) -> Any:
    """`auto.from_pretrained`, quiet, without network for local folders, failing as ConfigError."""
    try:
        with _quiet():
            local = Path(source).exists()
            # Unless this is set, transformers asks about a checkpoint with code of its own.
            options |= {"local_files_only": local, "trust_remote_code": False}
            return auto.from_pretrained(source, **options)
    except Exception as error:  # the hub's client and damaged files raise any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = f"{reason} (give a local folder, or a hub name that this machine can reach)"
        raise ConfigError("model.name_or_path", cfg["name_or_path"], remedy) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and progress bars of transformers and the hub's client."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    of_hub = hub_logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if bars:
            logging.enable_progress_bar()


def require_supported(cfg: Mapping[str, Any], config: PretrainedConfig) -> None:
    if reason := why_unsupported(config):
        raise ConfigError(
            "model.name_or_path",
            cfg["name_or_path"],
            f"{config.model_type} {reason}; take a model such as Llama, Mistral or Qwen",
        )
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cfg["attn_implementation"] == "sdpa" and not getattr(model, "_supports_sdpa", True):
        remedy = f"transformers has no sdpa for {config.model_type}; write eager"
        raise ConfigError("model.attn_implementation", "sdpa", remedy)
