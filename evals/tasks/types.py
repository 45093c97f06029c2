"""Types of tasks' settings that pydantic does not have; each error is one line."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")


def _distinct(values: Any) -> Any:
    for value in values:
        if list(values).count(value) > 1:  # their samples would share an id
            raise PydanticCustomError("twice", f"{value} is there twice; give each once")
    return values


Grid = Annotated[Sequence[T], Field(min_length=1), AfterValidator(_distinct)]
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, None: 1}


def nbytes(size: str) -> int:
    """Bytes of a size such as 512MB or 0.5GB.

    Raises:
        ValueError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG])?B?", size)
    if not found or not float(found[1]):
        raise ValueError(f"{size!r} is no size; write, for example, 512MB")
    return int(float(found[1]) * UNITS[found[2]])


def _size(value: str) -> str:
    try:
        nbytes(value)
    except ValueError as error:
        raise PydanticCustomError("size", str(error)) from error
    return value


Size = Annotated[str, AfterValidator(_size)]
Percent = Annotated[float, Field(ge=0, le=100)]

# How far apart the parts of one fact stand: in one cell, in neighbouring cells, over the prompt.
SPREADS = ("cell", "neighbours", "prompt")


def template(must: Sequence[str], may: Sequence[str] = ()) -> AfterValidator:
    """A text that has all of `must` in braces, may have those of `may`, and no others.

    Other braces are written twice, as in :meth:`str.format`.
    """

    def check(value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            remedy = f"{error}; write {{{{ or }}}} for a brace"
            raise PydanticCustomError("template", remedy) from error
        found = {field for _, field, _, _ in parts if field is not None}
        plain = not any(spec or conversion for _, _, spec, conversion in parts)
        if not plain or not set(must) <= found <= {*must, *may}:
            needed, optional = (", ".join(f"{{{one}}}" for one in names) for names in (must, may))
            also = f", may have {optional}" if may else ""
            remedy = f"must have {needed}{also} and nothing else in braces"
            raise PydanticCustomError("template", remedy)
        return value

    return AfterValidator(check)
