"""Answers are of the likeliest tokens, whatever a checkpoint's own generation settings are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import read
from tiny import SHAPE, from_config, prompt
from transformers import GenerationConfig, LlamaConfig

from baselines import FullPolicy, H2OPolicy
from evals.run.generate import generate
from evals.run.models import byte_tokenizer, load_model

# As generation_config.json has them. Most would change an answer, some what `generate` returns.
ASKED = {
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(3, 150)],
    "sequence_bias": [[[40], 50.0]],
    "suppress_tokens": list(range(3, 150)),
    "begin_suppress_tokens": list(range(3, 150)),
    "forced_bos_token_id": 11,
    "forced_eos_token_id": 12,
    "exponential_decay_length_penalty": [1, 3.0],
    "min_length": 400,
    "min_new_tokens": 40,
    "max_length": 71,
    "max_time": 1e-9,
    "num_beams": 3,
    "num_return_sequences": 2,
    "guidance_scale": 4.0,
    "do_sample": True,
    "temperature": 5.0,
    "prompt_lookup_num_tokens": 4,
    "stop_strings": ["a", "e"],
    "use_cache": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "remove_invalid_values": True,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
    "token_healing": True,
}


# Those without effect on the answer below: by themselves, or at its length.
IDLE = {"max_length", "do_sample", "temperature", "remove_invalid_values", "output_scores"}
IDLE |= {"forced_bos_token_id", "min_length", "min_new_tokens", "num_beams"}


@pytest.fixture(scope="module")
def model():
    made = from_config(LlamaConfig(**SHAPE | {"vocab_size": 300, "max_position_embeddings": 1024}))
    made.generation_config.eos_token_id = 1
    return made


@pytest.fixture(scope="module")
def likeliest(model) -> list[int]:
    """The answer, by full forward passes."""
    ids = prompt(60, seed=5)
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, 60:].tolist()


@pytest.fixture
def asking(model, request):
    """The model with a setting of its own."""
    own = model.generation_config
    given = {request.param: ASKED[request.param]}
    if request.param == "num_return_sequences":
        given["do_sample"] = True  # else refused by itself
    settings = GenerationConfig(eos_token_id=1, pad_token_id=2)
    for name, value in given.items():
        setattr(settings, name, value)
    model.generation_config = settings
    yield model
    assert model.generation_config is settings  # left as it was
    model.generation_config = own


@pytest.mark.parametrize("asking", sorted(ASKED.keys() - IDLE), indirect=True)
def test_no_setting_of_the_model_changes_an_answer(asking, likeliest: list[int]) -> None:
    ids = prompt(60, seed=5).tolist()
    (found,) = generate(asking, byte_tokenizer(), ids, FullPolicy(), 10)
    assert found.tokens == likeliest


def test_tokens_that_end_an_answer_stay_the_models(model, likeliest: list[int]) -> None:
    own = model.generation_config
    ends = {"eos_token_id": [1, likeliest[4]], "pad_token_id": 2}
    model.generation_config = GenerationConfig(**ends, min_new_tokens=9, min_length=200)
    try:
        (found,) = generate(model, byte_tokenizer(), prompt(60, seed=5).tolist(), FullPolicy(), 10)
    finally:
        model.generation_config = own
    end = likeliest.index(likeliest[4])
    assert found.tokens == likeliest[: end + 1] and found.stop_reason == "eos"


@pytest.fixture
def folders(model, tmp_path: Path) -> dict[str, Path]:
    """The same weights with and without settings of their own."""
    found = {}
    for name, extra in {"plain": {}, "asking": ASKED}.items():
        folder = tmp_path / "models" / name
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        path = folder / "generation_config.json"
        extra = {k: v for k, v in extra.items() if "suppress" not in k}
        path.write_text(json.dumps({"eos_token_id": [1, 290]} | extra))
        found[name] = folder
    return found


def test_what_a_file_asks_for_is_named_once_and_on_file(main, capsys, folders) -> None:
    runs, said = {}, {}
    for name, folder in folders.items():
        given = ["model=hf", f"model.name_or_path={folder}", f"model.name={name}", "kl=true"]
        task = ["task.lengths=300", "task.depths=50", "task.repeats=2", "task.max_new_tokens=6"]
        assert main(*given, *task, "method=h2o", "budget=40") == 0
        said[name] = capsys.readouterr().err
        runs[name] = {
            p.stem.partition("@")[0]: p for p in main.runs.glob(f"needle-{name}-*/*.jsonl")
        }
    assert said["asking"].count("repetition_penalty=1.9") == 1
    assert "not used" in said["asking"] and "generation_config" not in said["plain"]
    for method in ("full", "h2o"):
        plain, asking = (runs[name][method] for name in folders)
        assert [r["tokens"] for r in read(plain)] == [r["tokens"] for r in read(asking)]
        noted = [
            next(iter(json.loads((one.parent / "environments.json").read_text()).values()))
            for one in (plain, asking)
        ]
        assert "unused_generation_settings" not in noted[0]
        unused = noted[1]["unused_generation_settings"]
        assert unused["repetition_penalty"] == 1.9 and unused["num_beams"] == 3
        assert "eos_token_id" not in unused
    near = [[r["kl_tokens"] for r in read(runs[name]["h2o"])] for name in folders]
    assert near[0] == near[1]


def test_a_loaded_model_has_its_special_tokens_and_no_other_setting(folders) -> None:
    config = {"name": "m", "max_length": 512, "dtype": "float32", "attn_implementation": "sdpa"}
    model, tokenizer = load_model(config | {"name_or_path": str(folders["asking"])}, "cpu")
    settings = model.generation_config.to_diff_dict()
    settings.pop("transformers_version")
    assert settings == {"eos_token_id": [1, 290], "pad_token_id": tokenizer.pad_token_id}


@pytest.mark.parametrize("setting", ["return_dict", "use_cache", "repetition_penalty"])
def test_settings_of_config_json_change_nothing(folders, setting: str) -> None:
    path = folders["plain"] / "config.json"
    value = 1.9 if setting == "repetition_penalty" else False
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    config = {"name": "m", "max_length": 512, "dtype": "float32", "attn_implementation": "sdpa"}
    ids, policy = prompt(60, seed=6).tolist(), H2OPolicy(heavy=20, recent=20)
    answers = []
    for name in ("plain", "asking"):
        model, tokenizer = load_model(config | {"name_or_path": str(folders[name])}, "cpu")
        answers += generate(model, tokenizer, ids, policy, 6)
    assert answers[0].tokens == answers[1].tokens


def test_a_model_without_special_tokens_answers_in_batches(model) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    own, policy = model.generation_config, H2OPolicy(heavy=20, recent=20)
    model.generation_config = GenerationConfig()
    prompts = [prompt(tokens, seed=6)[0].tolist() for tokens in (60, 45)]
    try:
        together = generate(model, tokenizer, prompts, policy, 6)
        alone = [generate(model, tokenizer, [one], policy, 6)[0] for one in prompts]
    finally:
        model.generation_config = own
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert {one.stop_reason for one in together} == {"length"}
