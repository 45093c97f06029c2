"""The order, names and looks of methods in all tables and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES


class Style(NamedTuple):
    label: str
    color: str
    marker: str


# The names that readers know. Other methods come after these, under their own names.
NAMES = {
    "full": "full cache",
    "local": "local window",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "buzz": "BUZZ",
    "honeycomb": "honeycomb",
    "buzz_strided": "BUZZ-strided",
    "buzz_fast": "BUZZ-fast",
    "a2sf": "A2SF",
    "chunk_kv": "ChunkKV",
    "critical_kv": "CriticalKV",
    "defensive_kv": "DefensiveKV",
    "expected_attention": "Expected Attention",
    "keydiff": "KeyDiff",
    "knorm": "Knorm",
    "kvzip": "KVzip",
    "pyramid_kv": "PyramidKV",
    "r_kv": "R-KV",
    "random": "random",
    "snapkv_every": "SnapKV-every",
    "stock": "transformers' cache",
    "vatp": "VATP",
    "lag_kv": "LagKV",
    "compactor": "Compactor",
    "triattention": "TriAttention",
}
# Colours that colour-blind readers can tell apart, as lines and as text on white (Okabe and Ito;
# Tol), and markers for prints in grey.
LOOKS = {
    "full": ("#000000", "s"),
    "local": ("#7F5539", "v"),
    "streaming_llm": ("#0072B2", "^"),
    "h2o": ("#009E73", "D"),
    "tova": ("#56B4E9", "<"),
    "snapkv": ("#332288", ">"),
    "buzz": ("#D55E00", "o"),
    "honeycomb": ("#997700", "H"),
    "buzz_strided": ("#E69F00", "P"),
    "buzz_fast": ("#CC79A7", "X"),
}
STYLES = {name: Style(NAMES[name], *look) for name, look in LOOKS.items()}
COLORS = ("#882255", "#117733", "#AA4499", "#88CCEE", "#661100", "#DDCC77", "#6699CC")
MARKERS = ("*", "h", "p", "d", "8")
MORE = [  # all pairs of the two: their numbers have no common divisor
    (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(len(COLORS) * len(MARKERS))
]
GREY = "#BBBBBB"
HIGHLIGHTED = 8  # a figure draws so many methods in colour, and the others in grey

RIVAL = "h2o"  # the method that others are paired with, besides the full cache
CONTRASTED = ("streaming_llm", "h2o", "buzz", "snapkv")  # for figures with room for a few methods


def order() -> list[str]:
    """All registered methods in the order of tables."""
    known = [name for name in NAMES if name in POLICIES]
    return [*known, *sorted(POLICIES.keys() - NAMES.keys())]


def place(method: str) -> int:
    """A method's place in :func:`order`; one that is not registered comes last."""
    known = order()
    return known.index(method) if method in known else len(known)


def style_of(method: str) -> Style:
    """A method's name and look."""
    more = MORE[(place(method) - len(STYLES)) % len(MORE)]
    return STYLES.get(method) or Style(NAMES.get(method, method), *more)


def called(name: str) -> str:
    """A row's name with the method's name for readers; what follows the method stays."""
    method = re.match(r"\w*", name)[0]
    return NAMES.get(method, method) + name[len(method) :]


def highlighted(methods: Sequence[str]) -> set[str]:
    """The methods to draw in colour: the reader's own methods first, then by :func:`place`."""
    own = POLICIES.keys() - NAMES.keys()
    ranked = sorted(dict.fromkeys(methods), key=lambda name: (name not in own, place(name)))
    return set(ranked[:HIGHLIGHTED])
