"""The picture and the page of kept tokens, on small random models."""

from __future__ import annotations

import dataclasses
import json
import re

import matplotlib.image
import numpy as np
import pytest
from methods import METHODS
from runs import composed
from tiny import checkpoint, prompt, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from baselines import FullPolicy, H2OPolicy, StreamingLLMPolicy
from buzz import Budget, BuzzPolicy, Policy
from buzz.granularity import constrained
from evals.report.kept import EVICTED, HISTORY, SINK, WINDOW, Kept, draw, draw_for_paper, page
from evals.run.models import byte_tokenizer
from evals.run.plan import Plan
from scripts.show_kept import keep, main, method_of, pieces

TOKENS, NEW = 40, 6
SEEN = TOKENS + NEW - 1
POLICIES = [
    FullPolicy(),
    StreamingLLMPolicy(sink=2, window=8),
    H2OPolicy(heavy=5, recent=7),
    BuzzPolicy(sink=2, window=6, stride=4, threshold=10),
]


def look(policy: Policy, family: str = "llama") -> Kept:
    return keep(tiny(family), prompt(TOKENS)[0].tolist(), [policy], NEW)[0]


@pytest.mark.parametrize(
    ("policy", "sink", "history", "window"),
    [
        (POLICIES[0], 0, 0, SEEN),
        (POLICIES[1], 2, 0, 8),
        (POLICIES[2], 0, 5, 7),
        # The prompt leaves 32 entries between sink and window: 8 cells, of which one stays each.
        # After 3 more tokens they are in cells of 2, and the 3 that had come are a cell; what comes
        # now waits beside the window of 6.
        (POLICIES[3], 2, 5, 8),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_token_is_of_a_kind(policy: Policy, sink: int, history: int, window: int):
    kept = look(policy)
    assert kept.kinds.shape == (3 * 2, SEEN) and len(kept.ids) == SEEN + 1
    for row in kept.kinds:
        assert [(row == kind).sum() for kind in (SINK, HISTORY, WINDOW)] == [sink, history, window]
        assert (row[:sink] == SINK).all() and (row[SEEN - window :] == WINDOW).all()
    held = policy.lengths([TOKENS] + [1] * (NEW - 1))[-1]
    assert kept.entries == held == sink + history + window
    assert kept.nbytes == held * kept.full_nbytes / SEEN
    assert (len(np.unique(kept.kinds, axis=0)) > 1) == (policy.name in ("h2o", "buzz"))
    assert (kept.share == (kept.kinds != EVICTED).mean(0)).all()
    if policy.name == "buzz":
        assert kept.evictions == 2


def test_layers_with_a_window_of_their_own_are_left_out():
    assert look(POLICIES[1], "gemma3-mixed").kinds.shape == (2 * 2, SEEN)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_shown(name):
    """Also those whose layers hold different numbers."""
    kept = look(METHODS[name])
    held = (kept.kinds != EVICTED).reshape(3, -1, SEEN).sum(-1)
    assert (held == held[:, :1]).all() and held.mean() == pytest.approx(kept.entries)
    if name not in ("full", "local", "streaming_llm", "vatp"):  # all but sink and window
        assert (kept.kinds == HISTORY).any()


@pytest.mark.parametrize("name", ["h2o", "buzz", "streaming_llm"])
def test_whole_pages_leave_and_heads_agree(name):
    policy = constrained(METHODS[name], "page:4", heads="layer")
    kept = look(Budget(20).policy(policy, TOKENS)[0])
    held = (kept.kinds != EVICTED)[:, : SEEN - SEEN % 4].reshape(3, 2, -1, 4)
    assert (held == held[..., :1]).all() and (held == held[:, :1]).all()
    assert 0 < held.mean() < 1
    assert (kept.kinds[:, :4] == SINK).all() == (name != "h2o")
    assert kept.described.endswith("granularity=page:4 heads=layer")
    assert kept.parameters.endswith("granularity=page:4, heads=layer")


@pytest.mark.parametrize(
    "text", ["two words", "naïve 🐝🐝 <b>&amp;</b>\n", "\u0915\u094d\u0937", "🐝"]
)
def test_pieces_join_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece, _ in found] == list(text)  # no replacement characters
    assert sum(tokens for _, tokens in found) == len(ids)


def test_pieces_keep_the_spaces_of_tokenizers_that_drop_the_first():
    """Llama's: a token is a word and the space before it."""
    words = ["\u2581the", "\u2581with", "\u2581statement"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [piece for piece, _ in pieces(tokenizer, [0, 1, 2])] == ["the", " with", " statement"]


def test_pieces_survive_bytes_that_are_no_text():
    tokenizer = byte_tokenizer()
    ids = tokenizer("🐝")["input_ids"][:1] * 6 + tokenizer("ok")["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in found).endswith("ok")
    assert sum(tokens for _, tokens in found) == len(ids)


def test_what_was_dropped_when_is_what_was_held_at_each_step():
    """Beside caches that stop there; methods side by side as alone."""
    ids = prompt(TOKENS)[0].tolist()
    together = keep(tiny("llama"), ids, POLICIES, NEW)
    for policy, kept in zip(POLICIES, together, strict=True):
        assert kept.ids == look(policy).ids and kept.dropped.shape == (6, SEEN)
        assert ((kept.dropped == 0) == (kept.kinds != EVICTED)).all()
        for step in range(NEW):
            (sooner,) = keep(tiny("llama"), ids, [policy], step + 1)
            seen = TOKENS + step
            known = kept.dropped[:, :seen]
            held = (known == 0) | (known > step + 1)
            assert (held == (sooner.kinds != EVICTED)).all()


def test_an_answer_goes_on_where_the_model_would_end():
    model = tiny("llama")
    ids = prompt(TOKENS)[0].tolist()
    first = look(POLICIES[0]).ids[TOKENS]
    model.generation_config.eos_token_id = [first]
    try:
        (kept,) = keep(model, ids, POLICIES[:1], NEW)
    finally:
        model.generation_config.eos_token_id = None
    assert first not in kept.ids[TOKENS:] and len(kept.ids) == SEEN + 1


def data_of(content: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', content, re.S)[1])


def shown(policies: list[Policy]) -> str:
    """The page of kept tokens, with a hostile text."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("<script>alert('🐝')</script> & \"quoted\" ")["input_ids"]
    kept = [dataclasses.replace(look(policy), ids=ids) for policy in policies]
    answers = [pieces(tokenizer, ids[TOKENS:]) for _ in kept]
    return page(kept, pieces(tokenizer, ids[:TOKENS]), answers, "a <model>")


def test_page_is_escaped_and_loads_nothing():
    content = shown(POLICIES)
    assert "alert('" not in content and "<model>" not in content
    assert content.count("<script") == 2 and content.count("<section") == 4
    assert "src=" not in content and "default-src 'none'" in content
    found = data_of(content)
    assert "".join(found["prompt"]["texts"]).startswith("<script>alert('🐝')")
    assert found["prompt"]["several"] == {"15": 4}  # bytes of the bee
    assert len(found["methods"]) == 4 and found["heads"] == 2 and found["layers"] == [0, 1, 2]


def test_a_page_of_many_tokens_is_small():
    """8,000 tokens, 90 heads that drop a random three quarters, four methods: under 5 MB."""
    generator = np.random.default_rng(0)
    dropped = generator.choice([0, 1, 1, 1], size=(90, 8031)).astype(np.uint16)
    one = dataclasses.replace(look(POLICIES[1]), dropped=dropped, layers=[*range(30)])
    one = dataclasses.replace(one, kinds=(dropped == 0).astype(np.uint8), prompt_tokens=8000)
    words = [(" token", 1)] * 8000
    content = page([one], words, [words[:32]], "a model")
    assert 4 * len(content) < 5e6 and len(content) > len(dropped[0]) * 90 / 8


def test_the_papers_picture_is_vectors_a_column_wide(tmp_path):
    paths = [tmp_path / "kept.pdf", tmp_path / "kept.svg"]
    draw_for_paper([look(policy) for policy in POLICIES], paths)
    pdf, svg = (path.read_bytes() for path in paths)
    assert b"/MediaBox [ 0 0 237.6 " in pdf and b"/Subtype /Image" not in pdf
    assert b'width="237.6pt"' in svg and b"<image" not in svg
    assert b"StreamingLLM: 10 of 45 entries" in svg
    sizes = [float(size) for size in re.findall(rb"font-size: ([\d.]+)px", svg)]
    assert min(sizes) >= 6


def test_picture_is_wide_and_shows_every_kind(tmp_path):
    path = tmp_path / "kept.png"
    draw([look(policy) for policy in POLICIES], path)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[1] == 2400
    pixels = (image * 255).round().astype(int)
    for color in ((0xD5, 0x5E, 0), (0x08, 0x51, 0x9C), (0x9E, 0xCA, 0xE1)):
        assert (pixels == color).all(-1).mean() > 1e-3


def test_command_writes_both_files(tmp_path, capsys):
    out = tmp_path / "new" / "kept"
    text = tmp_path / "text.txt"
    text.write_text("bees & <hives> " * 12, encoding="utf-8")
    arguments = f"--text {text} --model llama_random --methods full,buzz_strided --new-tokens 4"
    constraints = ["--granularity", "page:8", "--heads", "layer"]
    rest = ["--budget", "48", "--paper", "--out", str(out), *constraints]
    assert main([*arguments.split(), *rest]) == 0
    assert out.with_suffix(".pdf").exists() and out.with_suffix(".svg").exists()
    assert out.with_suffix(".png").stat().st_size > 10_000
    said = capsys.readouterr()
    assert "bees" not in said.err
    assert said.out.count("granularity=page:8 heads=layer") == 1  # the full cache has no pages
    content = out.with_suffix(".html").read_text(encoding="utf-8")
    assert "".join(data_of(content)["prompt"]["texts"]).startswith("bees & <hives> bees")


@pytest.mark.parametrize("name", ["buzz", "h2o", "snapkv", "honeycomb", "pyramid_kv"])
def test_a_budget_makes_the_policy_that_run_py_makes(name):
    plan = Plan.of(composed(f"method={name}", "budget=0.25", "task=needle"))
    assert plan.budget.policy(method_of(name), 1000) == plan.fit(1000)


def test_a_model_may_be_a_folder(tmp_path, capsys):
    folder = checkpoint(tmp_path / "my_model")
    out = ["--prompt", "some bees", "--methods", "h2o", "--new-tokens", "2", "--out"]
    assert main([*out, str(tmp_path / "kept"), "--model", str(folder)]) == 0
    assert "my_model, a prompt of 9 tokens" in (tmp_path / "kept.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--methods", "full,nosuchmethod"], "methods"),
        (["--model", "gpt5"], "model"),
        (["--model", "hf"], "model"),
        (["--budget", "0"], "budget"),
        (["--budget", "nan"], "budget"),
        (["--budget", "12.5"], "budget"),
        (["--granularity", "page:0"], "cache.granularity"),
        (["--new-tokens", "0"], "new-tokens"),
        (["--new-tokens", "100000"], "new-tokens"),
        (["--text", "no/such/file"], "text"),
        (["--prompt", " "], "text"),
    ],
)
def test_mistakes_take_one_line_and_load_no_model(arguments, field, capsys, monkeypatch):
    monkeypatch.setattr(
        "scripts.show_kept.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {field}=") and error.count("\n") == 1
