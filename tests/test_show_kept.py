"""The picture and the page of kept tokens, on small random models."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from methods import METHODS
from tiny import prompt, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from baselines import FullPolicy, H2OPolicy, StreamingLLMPolicy
from buzz import BuzzPolicy, Policy
from evals.run.models import byte_tokenizer
from scripts.show_kept import EVICTED, HISTORY, SINK, WINDOW, Kept, draw, keep, main, page, pieces

TOKENS, NEW = 40, 6
SEEN = TOKENS + NEW - 1
POLICIES = [
    FullPolicy(),
    StreamingLLMPolicy(sink=2, window=8),
    H2OPolicy(heavy=5, recent=7),
    BuzzPolicy(sink=2, window=6, stride=4, threshold=10),
]


def look(policy: Policy, family: str = "llama") -> Kept:
    return keep(tiny(family), prompt(TOKENS)[0].tolist(), policy, NEW)


def counts(kept: Kept) -> list[list[int]]:
    """How many tokens of each kind every head has, without repetitions."""
    kinds = (EVICTED, SINK, HISTORY, WINDOW)
    return np.unique(
        [[(row == kind).sum() for kind in kinds] for row in kept.kinds], axis=0
    ).tolist()


def test_streaming_llm_keeps_the_ends():
    kept = look(POLICIES[1])
    assert kept.kinds.shape == (3 * 2, SEEN)
    assert (kept.kinds == [SINK] * 2 + [EVICTED] * (SEEN - 10) + [WINDOW] * 8).all()
    assert kept.share.tolist() == [1] * 2 + [0] * (SEEN - 10) + [1] * 8
    assert kept.nbytes == 10 * kept.full_nbytes / SEEN
    assert len(kept.ids) == SEEN + 1


def test_full_cache_is_all_window():
    kept = look(POLICIES[0])
    assert (kept.kinds == WINDOW).all()
    assert kept.nbytes == kept.full_nbytes


def test_heavy_hitters_are_history_and_differ_between_heads():
    kept = look(POLICIES[2])
    assert counts(kept) == [[SEEN - 12, 0, 5, 7]]
    assert (kept.kinds[:, -7:] == WINDOW).all()
    assert len(np.unique(kept.kinds, axis=0)) > 1


def test_buzz_has_sampled_history_and_entries_that_wait():
    """The prompt leaves 32 entries between sink and window: 8 cells, of which one stays each."""
    kept = look(POLICIES[3])
    assert kept.evictions == 2  # after 3 more tokens old history is halved, 3 new ones are a cell
    policy = POLICIES[3]
    held = policy.lengths([TOKENS] + [1] * (NEW - 1))[-1]
    history = 5  # 8 in cells of 2, and the cell of the 3 that had come
    assert counts(kept) == [[SEEN - held, 2, history, held - 2 - history]]
    assert kept.entries == held > 2 + history + policy.window


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


@pytest.mark.parametrize(
    "text", ["two words", "naïve 🐝🐝 <b>&amp;</b>\n", "\u0915\u094d\u0937", "🐝"]
)
def test_pieces_join_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = list(pieces(tokenizer, ids))
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece, _ in found] == list(text)  # no replacement characters
    assert [i for _, where in found for i in range(where.start, where.stop)] == [*range(len(ids))]


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
    found = list(pieces(tokenizer, ids))
    assert "".join(piece for piece, _ in found).endswith("ok")
    assert found[-1][1].stop == len(ids)


class Reader(HTMLParser):
    """Collects tags and text; checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "span":
            self.text += data


def test_page_is_escaped_complete_and_shaded():
    tokenizer = byte_tokenizer()
    hostile = "<script>alert('🐝')</script> & \"quoted\" "
    ids = tokenizer(hostile)["input_ids"]
    shown = [
        dataclasses.replace(look(policy), ids=ids, prompt_tokens=TOKENS) for policy in POLICIES
    ]
    shown = [dataclasses.replace(k, kinds=k.kinds[:, -len(ids) + 1 :]) for k in shown]
    content = page(shown, tokenizer, "a <model>")
    assert content.count("&lt;") == 4 * hostile.count("<") + 1
    assert content.count("&amp;") == 4
    reader = Reader()
    reader.feed(content)
    assert not reader.open
    tags = [tag for tag, _ in reader.seen]
    assert tags.count("section") == 4 and "script" not in tags and "model" not in tags
    assert reader.text.count(hostile) == 4
    assert not any("src" in attributes for _, attributes in reader.seen)
    full = [a["class"] for tag, a in reader.seen if tag == "span"][6 : 6 + 4]
    assert full == ["k10"] * 4  # after the 6 of the scale


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
    assert main([*arguments.split(), "--budget", "48", "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "bees" not in capsys.readouterr().err
    content = out.with_suffix(".html").read_text(encoding="utf-8")
    assert "&lt;" in content and "<hives>" not in content


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--methods", "full,nosuchmethod"], "methods"),
        (["--model", "gpt5"], "model"),
        (["--budget", "0"], "budget"),
        (["--budget", "nan"], "budget"),
        (["--budget", "12.5"], "budget"),
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
