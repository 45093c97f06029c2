"""Chat templates: of any day, and those that refuse what a task asks; tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import full_of, read
from tiny import checkpoint
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from buzz.errors import ConfigError
from evals.run.models import TODAY, byte_tokenizer, set_date
from evals.tasks.encoding import encode, encode_prompt, in_template

ASK = [{"role": "user", "content": "Say: bees"}]


def templated(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "wanted",
    ["%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %e/%m/%y", "%H:%M:%S %p", "100%% on %j"],
)
def test_templates_are_told_one_day(wanted: str) -> None:
    template = "{%- if strftime_now is defined %}{% set now = strftime_now(F) %}{% endif %}"
    template += "{% macro again() %}{{ strftime_now(F) }}{% endmacro %}"
    template += "{% for m in messages %}{{ now }}|{{ again() }}|{{ m.content }}{% endfor %}"
    tokenizer = templated(template.replace("F", repr(wanted)))
    set_date(tokenizer)
    set_date(tokenizer)  # no more than once
    day = TODAY.strftime(wanted)
    assert in_template(tokenizer, ASK) == f"{day}|{day}|Say: bees"
    tokenizer = templated("{{ messages[0].content }}")
    set_date(tokenizer)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no user here') }}", "no user here"),
        ("{{ messages[0].content.nosuch() }}", "nosuch"),
        ("{% if %}", "Expected"),
        ("[user] {{ messages[0].content[0].text }}", "leaves out a message"),  # of parts
    ],
)
def test_a_template_that_cannot_be_served_is_named(template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"task.chat_template.*{reason}.*write false") as error:
        encode(templated(template), "Say: bees", True, 100)
    assert "\n" not in str(error.value)


def test_a_template_need_not_ask_for_an_answer_nor_keep_white_space() -> None:
    tokenizer = templated("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}")
    ids, _ = encode(tokenizer, "  Say: bees \n", True, 100)
    assert tokenizer.decode(ids) == "<Say: bees>"


def folder(tmp_path: Path, name: str, template: str) -> list[str]:
    """The arguments of a tiny model with a template of its own."""
    path = checkpoint(tmp_path / name, templated(template), max_position_embeddings=1024)
    task = ["task.lengths=300", "task.depths=50", "task.repeats=1", "task.max_new_tokens=4"]
    return ["model=hf", f"model.name_or_path={path}", f"model.name={name}", *task]


def test_a_run_goes_on_the_next_day(main, tmp_path: Path, monkeypatch) -> None:
    """And the full run of the day before is its reference."""
    said = "{% for m in messages %}[{{ strftime_now('%d %b %Y') }}] {{ m.content }}{% endfor %}"
    model = folder(tmp_path, "dated", said)
    assert main(*model, "method=full") == 0

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert main(*model, "method=full", "task.samples=1") == 0
    assert main(*model, "method=h2o", "budget=0.5", "kl=true") == 0
    (h2o,) = main.runs.glob("needle-*/h2o*.jsonl")
    assert len(full_of(h2o).read_text().splitlines()) == 1
    for noted in json.loads((h2o.parent / "environments.json").read_text()).values():
        assert noted["template_date"] == TODAY.isoformat()
    assert read(h2o)[0]["chat_template"] and read(h2o)[0]["kl_to_full"] is not None


def test_a_template_that_raises_is_one_line_before_a_model_is_loaded(
    main, tmp_path: Path, capsys
) -> None:
    model = folder(tmp_path, "strict", "{{ raise_exception('only poems') }}")
    (tmp_path / "strict" / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(*model, "method=h2o") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: task.chat_template=True") and "only poems" in line
    assert not list(main.runs.glob("*/*.jsonl"))


def test_special_tokens_are_there_once() -> None:
    """A template's own are not doubled, and no prompt ends with the token that ends a text."""
    tokenizer = templated("<bos>{{ messages[0].content }}")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 0 and tokenizer("a")["input_ids"][-1] == 1
    chat, _ = encode(tokenizer, "Say: bees", True, 100)
    plain, _ = encode(tokenizer, "Say: bees", False, 100)
    assert chat == plain and chat.count(0) == 1 and 1 not in chat
    said, _ = encode(tokenizer, "ends with <eos>", False, 100)  # the text's own stays
    assert said[-1] == 1
    cut = encode_prompt(tokenizer, "Say: bees and " * 20, False, 40)
    assert len(cut.ids) <= 40 and 1 not in cut.ids and cut.ids[0] == 0
