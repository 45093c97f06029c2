"""Types of tasks' settings beyond pydantic's own; what they refuse is one line."""

from __future__ import annotations

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
Percent = Annotated[float, Field(ge=0, le=100)]

# How far apart the parts of one fact stand: within reach of a cell, in cells nearby, anywhere.
SPREADS = ("cell", "neighbours", "prompt")


def template(must: Sequence[str], may: Sequence[str] = ()) -> AfterValidator:
    """A text with all of `must` in braces, and nothing else there but `may`.

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
            remedy = f"must have {needed}, may have {optional} and nothing else in braces"
            raise PydanticCustomError("template", remedy)
        return value

    return AfterValidator(check)
