"""How methods are ordered, called and drawn, in every table and figure.

A method that is not named here comes after these, by name, and gets a colour and a marker of MORE.
"""

from __future__ import annotations

from typing import NamedTuple

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES


class Style(NamedTuple):
    label: str
    color: str
    marker: str


# Colours that colour-blind readers tell apart (Okabe and Ito), markers for those who print in grey.
STYLES = {
    "full": Style("full cache", "#000000", "s"),
    "local": Style("local window", "#999999", "v"),
    "streaming_llm": Style("StreamingLLM", "#0072B2", "^"),
    "h2o": Style("H2O", "#009E73", "D"),
    "tova": Style("TOVA", "#56B4E9", "<"),
    "snapkv": Style("SnapKV", "#332288", ">"),
    "buzz": Style("BUZZ", "#D55E00", "o"),
    "buzz_strided": Style("BUZZ, strided", "#E69F00", "P"),
    "buzz_fast": Style("BUZZ, one step's attention", "#CC79A7", "X"),
    "honeycomb": Style("honeycomb", "#F0E442", "H"),
    "lag_kv": Style("LagKV", "#44AA99", "p"),
    "compactor": Style("Compactor", "#999933", "h"),
    "triattention": Style("TriAttention", "#994F00", "*"),
}
COLORS = ("#882255", "#117733", "#AA4499", "#88CCEE", "#661100", "#DDCC77", "#6699CC")
MARKERS = ("*", "h", "p", "d", "8", "1", "2", "3", "4", "x", "+")
MORE = [  # no two alike before all pairs are used, as the numbers have no common divisor
    (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(len(COLORS) * len(MARKERS))
]

RIVAL = "h2o"  # whom the others are compared with, in pairs
CONTRASTED = ("streaming_llm", "h2o", "buzz", "snapkv")  # where a picture has room for a few


def order() -> list[str]:
    """All methods that are registered, in the order in which they are shown."""
    return [*STYLES, *sorted(POLICIES.keys() - STYLES.keys())]


def place(method: str) -> int:
    """Where a method comes; one that is not registered, last."""
    known = order()
    return known.index(method) if method in known else len(known)


def style_of(method: str) -> Style:
    """How a method is called and drawn."""
    more = MORE[(place(method) - len(STYLES)) % len(MORE)]
    return STYLES.get(method) or Style(method, *more)
