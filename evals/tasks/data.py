"""Reads users' files and data sets of the hub."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from buzz.errors import ConfigError


def read_jsonl(
    path: str | Path,
    field: str,
    required: Sequence[str] = (),
    problem: Callable[[dict[str, Any]], str | None] = lambda row: None,
) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are skipped.

    Args:
        path: the file.
        field: the setting that named it, for error messages.
        required: keys that every object must have.
        problem: gives what else is wrong with an object, or None.

    Raises:
        ConfigError: naming file and line: the file is missing, empty, or neither UTF-8 nor UTF-16
            with a byte-order mark; or a line is not a JSON object, lacks a key, has another
            problem, or holds half a surrogate pair (which no tokenizer takes).
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike pathlib, of any name
        raise ConfigError(field, str(path), _no_file(path, "JSON-lines"))
    rows = []
    for number, line in enumerate(_utf8(path, field).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeDecodeError as error:
            raise _bad_line(field, path, number, f"not UTF-8 ({error.reason})") from error
        except UnicodeEncodeError as error:
            raise _bad_line(field, path, number, "holds a lone surrogate") from error
        except (ValueError, RecursionError) as error:  # also NaN, and thousands of digits
            raise _bad_line(field, path, number, f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _bad_line(field, path, number, "not a JSON object")
        if missing := [key for key in required if key not in row]:
            raise _bad_line(field, path, number, f"lacks {', '.join(missing)}")
        if wrong := problem(row):
            raise _bad_line(field, path, number, wrong)
        rows.append(row)
    if not rows:
        raise ConfigError(field, str(path), "the file holds no samples")
    return rows


def read_json(path: Path, field: str) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return json.loads(_utf8(path, field))
    except (ValueError, RecursionError) as error:
        raise ConfigError(field, str(path), f"is not JSON ({error})") from error


def read_text(path: str | Path, field: str) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte-order mark.

    Raises:
        ConfigError: the file is missing, empty or in another encoding.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike pathlib, of any name
        raise ConfigError(field, str(path), _no_file(path, "text"))
    try:
        text = _utf8(path, field).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(field, str(path), f"not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ConfigError(field, str(path), "the file holds no text")
    return text


def load_hub(
    name: str, config: str | None, split: str, field: str, revision: str | None = None
) -> list[dict[str, Any]]:
    """A split of a data set of the Hugging Face hub, from its local cache if it is there.

    Args:
        name, config, split: what `datasets` calls it.
        field: the setting that names a local file instead, for error messages.
        revision: a commit, tag or branch; None: the main branch. `datasets` runs no scripts since
            version 4, so it must be one with data files.

    Raises:
        ConfigError: it can neither be fetched nor found.
    """
    import datasets  # slow to import, and not needed with local files

    logging.disable(logging.WARNING)  # the client reports every retry
    try:
        return list(datasets.load_dataset(name, config, split=split, revision=revision))
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            field,
            None,
            f"{name} (revision {revision or 'main'}) could not be loaded ({reason});"
            " give a local file instead",
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def are_texts(value: object) -> bool:
    """Whether `value` is a list of at least one text."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _utf8(path: Path, field: str) -> bytes:
    """A file's bytes in UTF-8, without a byte-order mark."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ConfigError(field, str(path), f"not UTF-16 ({error.reason})") from error
    return content.removeprefix(codecs.BOM_UTF8)


def _no_file(path: Path, kind: str) -> str:
    if os.path.isdir(path):
        return f"is a folder; give a {kind} file"
    return f"no such file; give the path of a {kind} file"


def _bad_line(field: str, path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(field, f"{path}:{number}", f"{problem}; correct or remove the line")
