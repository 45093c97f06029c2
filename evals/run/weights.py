"""Digests of weights, without reading all of them.

If the checkpoint under a path is replaced, its records must not count for the new one. A digest
covers names, sizes, every byte of small files and of safetensors' headers, and a page out of each
tensor (out of some, where a file has more than PAGES). It takes less than a second for weights of
any size, and differs where weights were trained, merged, quantized or converted differently. It can
miss a change of a few numbers inside a large tensor. Dates and paths do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

# What transformers reads of a checkpoint: weights, configuration, tokenizer, chat template.
READ = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".tiktoken", ".txt")
WHOLE = 32 * 2**20  # bytes up to which a file is read whole
PAGE = 4096  # bytes of a sample
PAGES = 512  # samples of a file, at most


def folder_digest(folder: Path) -> str:
    """Sixteen hexadecimal digits that name a checkpoint's content."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix in READ and path.is_file())
    known = [(path.name, file_digest(path)) for path in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Sixteen hexadecimal digits that name a file's content."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        found = hashlib.sha256(str(size).encode())
        for start, length in _samples(file.fileno(), size):
            found.update(os.pread(file.fileno(), length, start))
    return found.hexdigest()[:16]


def _samples(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are read, as (start, bytes)."""
    if size <= WHOLE:
        yield 0, size
        return
    tensors = _tensors(file, size)
    if tensors is None:
        yield 0, WHOLE // 8  # other formats have their tables at the beginning or at the end
        yield size - WHOLE // 8, WHOLE // 8
        step = size // PAGES
        yield from ((start, PAGE) for start in range(0, size, step))
        return
    data, ends = tensors
    yield 0, data
    for start, end in ends[:: len(ends) // PAGES + 1]:
        middle = data + (start + end) // 2
        yield middle - middle % PAGE, PAGE


def _tensors(file: int, size: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Of a safetensors file where the data start, and each tensor's (start, end) in them.

    None for any other file. Layout: https://huggingface.co/docs/safetensors, eight bytes that give
    the length of a JSON header, then that.
    """
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > min(size - 8, WHOLE):
        return None
    try:
        header = json.loads(os.pread(file, length, 8))
        places = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        return 8 + length, sorted((int(start), int(end)) for start, end in places)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
