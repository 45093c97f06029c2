"""Model configs: what is refused before weights load, random models, the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import refused
from tiny import checkpoint as tiny_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MptConfig,
)

from baselines import FullPolicy
from buzz.errors import ConfigError
from evals.run import checkpoints, models, read
from evals.run.models import byte_tokenizer, check_model, complete_model, load_model
from evals.run.weights import file_digest, folder_digest

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = "original_max_position_embeddings"
CONFIGS = sorted((ROOT / "configs/model").glob("*.yaml"))


def config(name: str, **overrides: object) -> dict:
    return yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text()) | overrides


def tiny(**overrides: object) -> dict:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    return config("llama_random", **small, **heads, max_length=128) | overrides


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, tokenizer = load_model(tiny())
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_named_after_its_file(path: Path):
    cfg = yaml.safe_load(path.read_text())
    assert cfg["name"] == path.stem
    assert cfg["dtype"] in models.DTYPES and cfg["attn_implementation"] in models.ATTENTION


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        (tiny(dtype="float8"), "model.dtype"),
        (tiny(attn_implementation="flash"), "model.attn_implementation"),
        (tiny(max_length=0), "model.max_length"),
        (tiny(max_length=True), "model.max_length"),
        (tiny(num_hidden_layers=-1), "model.num_hidden_layers"),
        (tiny(hidden_size=36), "model.hidden_size"),
        (tiny(num_key_value_heads=3), "model.num_key_value_heads"),
        (tiny(vocab_size=258), "model.vocab_size"),
        (config("hf", max_length=128), "model.name_or_path"),
        (config("hf", max_length=128, name_or_path="./nowhere"), "model.name_or_path"),
        (config("hf", max_length=128, name_or_path=str(ROOT / "tests")), "model.name_or_path"),
        (config("smollm2", gguf_file="none.gguf"), "model.gguf_file"),
    ],
)
def test_bad_config_is_refused_before_loading(cfg: dict, field: str):
    with refused(field):
        check_model(cfg)


@pytest.mark.parametrize("cls", [GPT2Config, MptConfig])
def test_model_without_rope_is_refused_by_name(tmp_path: Path, cls: type):
    cls().save_pretrained(tmp_path)  # a config alone: no weights are looked for
    with pytest.raises(ConfigError, match=cls.model_type):
        check_model(config("hf", name_or_path=str(tmp_path), max_length=128))


def test_a_model_with_attention_sinks_is_told_which_attention_it_has(tmp_path: Path):
    GptOssConfig().save_pretrained(tmp_path)
    cfg = config("hf", name_or_path=str(tmp_path), max_length=128)
    with pytest.raises(ConfigError, match="model.attn_implementation='sdpa'.*gpt_oss; write eager"):
        check_model(cfg)
    check_model(cfg | {"attn_implementation": "eager"})


def test_rope_model_passes_on_its_config_alone(tmp_path: Path):
    LlamaConfig().save_pretrained(tmp_path)
    cfg = config("hf", name_or_path=str(tmp_path), max_length=128)
    check_model(cfg)
    with pytest.raises(ConfigError, match="model.name_or_path"):  # but it has no weights
        load_model(cfg)


@pytest.mark.parametrize(
    "positions, rope, tokens",
    [
        (2048, None, 2048),
        (2048, {"rope_type": "dynamic", "factor": 4.0}, 8192),
        (2048, {"rope_type": "yarn", "factor": 4.0} | {ORIGINAL: 2048}, 8192),
        # as Llama 3.1, whose positions have the factor in them already
        (2048, {"rope_type": "yarn", "factor": 4.0} | {ORIGINAL: 512}, 2048),
        # A linear factor counts once: as before it was stretched, or no model was trained on 1,024.
        (4096, {"rope_type": "linear", "factor": 4.0}, 16_384),
        (16_384, {"rope_type": "linear", "factor": 4.0}, 16_384),
        (32_768, {"rope_type": "linear", "factor": 8.0}, 32_768),
        (131_072, {"rope_type": "linear", "factor": 32.0}, 131_072),
        (2048, {"rope_type": "linear", "factor": 2.0}, 4096),
    ],
)
def test_context_is_what_config_json_says(tmp_path: Path, positions, rope, tokens):
    rope = None if rope is None else rope | {"rope_theta": 1e4}
    LlamaConfig(max_position_embeddings=positions, rope_parameters=rope).save_pretrained(tmp_path)
    cfg = config("hf", name_or_path=str(tmp_path))
    complete_model(cfg)
    assert cfg["max_length"] == tokens
    check_model(cfg)
    with refused("model.max_length", f"999999: the model has {tokens:,} pos"):
        check_model(cfg | {"max_length": 999_999})
    given = config("hf", name_or_path="no/such-model", max_length=100)
    complete_model(given)
    assert given["max_length"] == 100


def test_a_folder_runs_without_its_context(main, checkpoint: Path):
    """And what ran is on file, with a number."""
    prompts = ["task=throughput", "task.lengths=[60]", "task.samples=1", "task.max_new_tokens=4"]
    assert main("model=hf", f"model.name_or_path={checkpoint}", *prompts, "method=full") == 0
    (file,) = main.runs.glob("*/setting.yaml")
    assert yaml.safe_load(file.read_text())["model"]["max_length"] == 128


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="device"):
        load_model(tiny(), device="abacus")


def test_local_checkpoint_round_trip(checkpoint: Path):
    random, _ = load_model(tiny())
    model, tokenizer = load_model(
        config("hf", name_or_path=str(checkpoint), max_length=128, dtype="bfloat16")
    )
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.padding_side == "left"
    for a, b in zip(random.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_random_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = load_model(tiny())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = load_model(tiny())
    other, _ = load_model(tiny(seed=1))
    weight = first.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("text", ["plain", "  two  spaces\n", "naïve 東京 🐝", "<eo", "\x00\t"])
def test_byte_tokenizer_is_lossless_and_one_token_per_byte(text: str):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and min(ids) >= 3 and max(ids) <= 258
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def smollm2() -> tuple:
    cfg = config("smollm2")
    if not (ROOT / "models" / cfg["gguf_file"]).exists():
        pytest.skip("the embedded model is not there: make model")
    return load_model(cfg)


def test_smollm2_answers_in_its_chat_template(smollm2: tuple):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out) and out[-1] == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert model.dtype == torch.float32


@pytest.mark.slow
def test_converted_checkpoint_equals_its_gguf(smollm2: tuple):
    model, tokenizer = smollm2
    options = {"gguf_file": config("smollm2")["gguf_file"]}
    original = AutoModelForCausalLM.from_pretrained(ROOT / "models", **options)
    text = "I don't know:\n\n\n 2024's naïve <|im_end|>  bees"
    ids = AutoTokenizer.from_pretrained(ROOT / "models", **options)(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        a, b = (m(torch.tensor([ids])).logits for m in (model, original))
    assert torch.equal(a, b)


def test_a_conversion_is_used_for_the_very_file_that_it_was_made_from(tmp_path: Path):
    gguf, ready = tmp_path / "m.gguf", tmp_path / "m"
    cfg = config("hf", name_or_path=str(tmp_path), gguf_file="m.gguf", max_length=128)
    weights = b"\1" * 2**20
    gguf.write_bytes(weights)
    ready.mkdir()
    (ready / "config.json").write_text("{}")
    (ready / "model.safetensors").write_bytes(b"converted")
    assert checkpoints.source_of(cfg) == str(gguf)  # interrupted, or by an earlier version
    (ready / checkpoints.SOURCE).write_text(checkpoints._stamp(ready, gguf))
    assert checkpoints.source_of(cfg) == str(ready)

    later = gguf.stat().st_mtime + 10
    os.utime(gguf, (later, later))
    assert checkpoints.source_of(cfg) == str(ready)  # touched, or copied to another place
    gguf.write_bytes(weights[:-1] + b"\2")
    os.utime(gguf, (1, 1))
    assert checkpoints.source_of(cfg) == str(gguf)  # replaced by an older file
    gguf.write_bytes(weights)
    assert checkpoints.source_of(cfg) == str(ready)
    (ready / "model.safetensors").write_bytes(b"tampered with")
    assert checkpoints.source_of(cfg) == str(gguf)


def test_a_digest_names_what_lies_under_a_path(tmp_path: Path, checkpoint: Path):
    cfg = config("hf", name_or_path=str(checkpoint), max_length=128)
    before = models.model_digest(cfg)
    (checkpoint / "README.md").write_text("what does not matter")
    os.utime(checkpoint / "model.safetensors", (1, 1))
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert models.model_digest(cfg) == before
    assert models.model_digest(cfg | {"name_or_path": str(tmp_path / "copy")}) == before

    model, _ = load_model(tiny(seed=1))
    model.save_pretrained(checkpoint)  # the same names and sizes
    replaced = models.model_digest(cfg)
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert len({before, replaced, models.model_digest(cfg)}) == 3

    random = [models.model_digest(tiny(seed=seed)) for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    assert models.model_digest(tiny(hidden_size=64)) not in random


def test_a_hub_models_digest_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg, commit = config("llama2_7b"), "0123456789" * 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert models.model_digest(cfg) is None
    cached = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert models.model_digest(cfg) == commit


def sparse(path: Path, tensors: int, nbytes: int) -> int:
    """A safetensors file of zeros that takes no room on disk; where its data start."""
    places = {f"w{i}": [i * nbytes, (i + 1) * nbytes] for i in range(tensors)}
    header = json.dumps({"__metadata__": {}} | {k: {"data_offsets": v} for k, v in places.items()})
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + tensors * nbytes)
    return 8 + len(header)


def test_a_digest_of_large_weights_takes_less_than_a_second(tmp_path: Path):
    for shard in "abc":
        sparse(tmp_path / f"{shard}.safetensors", 140, 2**25)  # 14 GB in all, as of 7B parameters
    start = time.process_time()
    folder_digest(tmp_path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_a_digest_sees_every_tensor_of_a_large_file(tmp_path: Path, name: str):
    path = tmp_path / name
    data = sparse(path, 8, 2**23)  # 64 MB, beyond what is read whole
    found = {file_digest(path)}
    for tensor in range(8):
        with open(path, "r+b") as file:
            file.seek(data + tensor * 2**23)
            file.write(b"\1" * 2**23)  # all of its numbers, as by training
        found.add(file_digest(path))
    assert len(found) == 9


# --- RoPE that goes by length


def stretched(tmp_path: Path, **rope: object) -> list[str]:
    """The arguments of a model whose RoPE has other frequencies beyond 512 tokens."""
    folder = tmp_path / str(rope["rope_type"])
    tiny_checkpoint(folder, rope_parameters={"rope_theta": 1e4, **rope})
    task = ["task.depths=50", "task.repeats=1", "task.max_new_tokens=8", "method=full"]
    return ["model=hf", f"model.name_or_path={folder}", "model.name=stretched", *task]


DYNAMIC = {"rope_type": "dynamic", "factor": 8.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 8.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 512,
}


def test_a_text_is_read_as_if_none_had_been_before_it(tmp_path: Path) -> None:
    _, folder, *_ = stretched(tmp_path, **DYNAMIC)
    path = folder.partition("=")[2]
    model, _ = load_model(config("hf", name_or_path=path, max_length=4096), "cpu")
    ids = torch.randint(3, 259, (1201,), generator=torch.Generator().manual_seed(0)).tolist()
    first, longer, again = (
        read.read(model, ids[:tokens], FullPolicy(), tokens - 1, {})[1]
        for tokens in (601, 1201, 601)
    )
    assert first == again and len(longer) == 1200


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_what_would_mix_texts_of_several_lengths_is_refused(
    main, capsys, tmp_path: Path, rope: dict
) -> None:
    model = stretched(tmp_path, **rope)
    asked = {"task.batch_size=2": "task.batch_size=2"}
    if rope is DYNAMIC:
        several = "compress=context task.variant=multikey task.questions=2"
        asked |= {"method=h2o kl=true": "kl=True", several: "task.questions=2"}
    capsys.readouterr()
    for given, named in asked.items():
        assert main(*model, "task.lengths=600", *given.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {named}") and str(rope["rope_type"]) in line
    # Where no text is so long, all have the same frequencies.
    short = "task.lengths=[300,350]", "model.max_length=512", "task.batch_size=2"
    assert main(*model, *short) == 0
