"""How methods are ordered, called and drawn, in every table and figure."""

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


# What readers know them by. A method that is not here comes after these and keeps its own name.
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
# Colours that colour-blind readers tell apart (Okabe and Ito, Tol), on white and as text; markers
# for those who print in grey.
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
MORE = [  # no two alike before all pairs are used, as the numbers have no common divisor
    (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(len(COLORS) * len(MARKERS))
]
GREY = "#BBBBBB"
HIGHLIGHTED = 8  # methods that a picture names in colour; the others are grey

RIVAL = "h2o"  # whom the others are compared with, in pairs
CONTRASTED = ("streaming_llm", "h2o", "buzz", "snapkv")  # where a picture has room for a few


def order() -> list[str]:
    """All methods that are registered, in the order in which they are shown."""
    known = [name for name in NAMES if name in POLICIES]
    return [*known, *sorted(POLICIES.keys() - NAMES.keys())]


def place(method: str) -> int:
    """Where a method comes; one that is not registered, last."""
    known = order()
    return known.index(method) if method in known else len(known)


def style_of(method: str) -> Style:
    """How a method is called and drawn."""
    more = MORE[(place(method) - len(STYLES)) % len(MORE)]
    return STYLES.get(method) or Style(NAMES.get(method, method), *more)


def called(name: str) -> str:
    """A method's name for readers, whatever stands behind it (a mark, a budget, settings)."""
    method = re.match(r"\w*", name)[0]
    return NAMES.get(method, method) + name[len(method) :]


def highlighted(methods: Sequence[str]) -> set[str]:
    """Those that a picture names in colour: methods of the reader's own, then by :func:`place`."""
    own = POLICIES.keys() - NAMES.keys()
    ranked = sorted(dict.fromkeys(methods), key=lambda name: (name not in own, place(name)))
    return set(ranked[:HIGHLIGHTED])
