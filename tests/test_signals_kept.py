"""Tokens by kind, of which a script says what each signal keeps."""

from __future__ import annotations

from scripts.signals_kept import KINDS, kinds


def test_kinds_of_tokens() -> None:
    start = ["<s>", "The", " key", " is"]
    pieces = [*start, " ", "12", "34", ".", " In", " 19", "9", "0", " it", "\n", "12", " was"]
    names = [KINDS[kind] for kind in kinds(pieces, ["1234"])]
    assert names[:4] == ["first 4"] * 4
    assert names[4:8] == ["punctuation", "answer's digits", "answer's digits", "punctuation"]
    assert names[8:12] == ["capitalised", *["other digits"] * 3]
    assert names[12:] == ["others", "punctuation", "other digits", "others"]
