"""Scored attention in C++ for the CPU: compiled on first use, then loaded from a cache.

``cpu.cpp`` is built with ``$CXX`` (else ``g++`` or ``clang++``) for this very processor, which
takes a second or two. The library lies under ``$BUZZ_CACHE``, else ``~/.cache/buzz``; its name
carries a hash of the source, the compiler and the instruction set, so that machines that share a
home directory do not load each other's code. Two processes may build at once: each writes a file
of its own and renames it.

float32 and bfloat16 are read as they are, float16 is widened first. Entries of int8 are widened in
registers, for a prompt a tile at a time. Sums, the softmax and scores are float32. Of bfloat16, a
prompt's logits are exact products, added in float32; its weights are rounded once they are counted,
as stock attention rounds them.
"""

from __future__ import annotations

import array
import ctypes
import functools
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buzz.kernels import reference

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF, INT8 = 1, 2  # kinds of what the library reads, beside 0 for float32


def user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BUZZ_CACHE") or Path(base) / "buzz")


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build() -> Path:
    """The compiled library, built where the cache does not hold it.

    Raises:
        OSError: there is no compiler, or the cache cannot be written.
        subprocess.CalledProcessError: the compiler failed.
    """
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [path for path in map(shutil.which, ("g++", "clang++")) if path][:1]
    )
    if not compiler:
        raise FileNotFoundError("no C++ compiler: set CXX or install g++")
    # The predefined macros name the compiler's version and every instruction set it may use.
    macros = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    digest = hashlib.sha256(macros.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = user_cache() / f"kernels-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _run([*compiler, *FLAGS, "-shared", "-fPIC", "-w", str(SOURCE), "-o", str(built)])
            built.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None after one warning where it cannot be had."""
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the C++ kernels are not available, scored attention will be slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _function(name: str) -> Any:
    """One of the library's; only asked for where it is :func:`available`."""
    return getattr(library(), name)


def available() -> bool:
    """Whether the kernels can run here; the first call compiles them."""
    return library() is not None


@functools.cache
def _least() -> int:
    """Multiplications that are worth waking other threads for.

    Few where the compiler's OpenMP is the one that PyTorch brought: its threads are awake. Where
    it is another, the two are in each other's way while they wait for more work.
    """
    theirs = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    both = (theirs and ctypes.CDLL(str(theirs)), library())
    asked: list[Any] = [getattr(found, "omp_get_max_threads", None) for found in both]
    if None in asked:
        return 2**22
    return 2**14 if len({ctypes.cast(one, ctypes.c_void_p).value for one in asked}) == 1 else 2**22


def _threads(work: int) -> int:
    """How many to share so many multiplications, about."""
    return torch.get_num_threads() if work > _least() else 1


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(strides))(*strides)


def _dense(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As the kernels read it: of that type, neighbours in the last dimension one element apart."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _attend(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sinks: Tensor | None,
    observe: int | None = None,
    *starts: Tensor | None,
    decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Call one of the two kernels; only decoding's takes `starts`, and only the other `decay`."""
    dtype = query.dtype
    kind = INT8 if key.dtype == torch.int8 else dtype == torch.bfloat16
    read = dtype if kind == HALF else torch.float32
    held = torch.int8 if kind == INT8 else read
    query, key, value = _dense(query, read), _dense(key, held), _dense(value, held)
    sinks = None if sinks is None else _dense(sinks)
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    value_dim = reference.width(value)
    # [B, q, Hq, Dv] in memory, as models want it; zeros for rows that hold nothing.
    output = query.new_zeros(batch, queries, heads, value_dim).transpose(1, 2)
    received = torch.zeros(batch, kv_heads, keys, device=query.device)
    observe = queries if observe is None else observe
    shape = (batch, heads, kv_heads, queries, keys, dim, value_dim, observe)
    _function(function)(
        *map(_pointer, (query, key, value, output, received, sinks, *starts)),
        (ctypes.c_int64 * len(shape))(*shape),
        _strides(query, key, value, output),
        ctypes.c_float(scale),
        _threads(batch * heads * queries * keys * dim),
        kind,
        *([] if decay is None else [ctypes.c_float(decay)]),
    )
    return output.to(dtype), received


def quantized(x: Tensor) -> Tensor:
    """See :func:`buzz.kernels.quantized`."""
    x = _dense(x, x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    *rows, dim = x.shape
    entries = x.new_empty(*rows, dim + reference.BEHIND, dtype=torch.int8)
    shape = (rows[0], 0, rows[1], 0, rows[2], dim, 0, 0)
    _function("buzz_quantized")(
        *map(_pointer, (x, entries)),
        (ctypes.c_int64 * len(shape))(*shape),
        _strides(x),
        _threads(x.numel()),
        x.dtype == torch.bfloat16,
    )
    return entries


def scored_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    observe: int | None = None,
    decay: float = 1.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_prefill`."""
    name = "buzz_scored_prefill"
    return _attend(name, query, key, value, scale, sinks, observe, decay=decay)


def scored_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
    starts = None if starts is None else _dense(starts, torch.int64)
    return _attend("buzz_scored_decode", query, key, value, scale, sinks, None, starts)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor | None,
    bounds: Tensor,
    scale: float,
    adds: bool,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`buzz.kernels.step`; float16 through the plain version of what is held."""
    dtype, is_int8 = query.dtype, keys.dtype == torch.int8
    kind = INT8 if is_int8 else keys.dtype == torch.bfloat16
    if not kind and keys.dtype != torch.float32:
        first, last = int(bounds[0].min()), int(bounds[1, 0])
        keys, values, positions = (t[:, :, first:last] for t in (keys, values, positions))
        scores = None if scores is None else scores[:, :, first:last]
        low = bounds - bounds.new_tensor([[first], [first], [0]])
        return reference.step(
            query, key, value, keys, values, positions, scores, low, scale, adds, sinks
        )
    read = torch.float32 if is_int8 else keys.dtype
    query, key, value = (_dense(tensor, read) for tensor in (query, key, value))
    sinks = None if sinks is None else _dense(sinks)
    batch, heads, _, dim = query.shape
    output = query.new_zeros(batch, 1, heads, value.shape[-1]).transpose(1, 2)
    shape = (batch, heads, keys.shape[1], 1, keys.shape[2], dim, value.shape[-1], 1)
    tensors = (query, key, value, keys, values, positions, scores, output)
    _function("buzz_step")(
        *map(_pointer, (*tensors, bounds, sinks)),
        (ctypes.c_int64 * len(shape))(*shape),
        _strides(*(query if tensor is None else tensor for tensor in tensors)),
        ctypes.c_float(scale),
        adds,
        torch.get_num_threads(),
        kind,
        ctypes.c_int64(_least()),
    )
    return output.to(dtype)


def step_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Sequence[int]],
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`buzz.kernels.step_rows`."""
    query, key, value = (_dense(tensor, query.dtype) for tensor in (query, key, value))
    sinks = None if sinks is None else _dense(sinks)
    batch, heads, _, dim = query.shape
    output = query.new_empty(batch, 1, heads, value.shape[-1]).transpose(1, 2)
    shape = (batch, heads, key.shape[1], 1, 1, dim, value.shape[-1], 1)
    table = array.array("q", itertools.chain.from_iterable(rows))
    _function("buzz_step_rows")(
        *map(_pointer, (query, key, value, output, sinks)),
        ctypes.c_void_p(table.buffer_info()[0]),
        (ctypes.c_int64 * len(shape))(*shape),
        _strides(query, key, value, output),
        ctypes.c_float(scale),
        _threads(heads * dim * sum(row[6] - row[5] for row in rows)),
        query.dtype == torch.bfloat16,
    )
    return output


class _Moved(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("target", ctypes.c_void_p)] + [
        (f"{end}_{dim}", ctypes.c_int64)
        for end in ("source", "target")
        for dim in ("batch", "head", "slot")
    ]
    _fields_ += [("size", ctypes.c_int64)]


class _Leading(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("source", "positions", "frequencies")]
    _fields_ += [(name, ctypes.c_int64) for name in ("count", "position")]


class _Move(ctypes.Structure):
    _fields_ = [("tensors", ctypes.POINTER(_Moved))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("index", "rows", "cosine", "sine")]
    _fields_ += [("leading", _Leading)]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in ("n_tensors", "batch", "heads", "count", "to", "shift", "half")
    ]


def move(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    index: Tensor,
    to: int,
    shift: int,
    turns: tuple[Tensor, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
    interleaved: bool = False,
    leading: reference.Leading | None = None,
) -> None:
    """See :func:`buzz.kernels.move`; keys of float32 or bfloat16."""
    move_all([reference.Move(source, target, index, to, shift, turns, rows, interleaved, leading)])


def move_all(moves: Sequence[reference.Move]) -> None:
    """Several moves, of one layout of pairs and one dtype, in one call."""
    calls = (_Move * len(moves))()
    alive: list[Tensor] = []  # until the call is over
    work = 0
    for call, one in zip(calls, moves, strict=True):
        n_tensors = len(one.source)
        moved = (_Moved * n_tensors)()
        for own, old, new in zip(moved, one.source, one.target, strict=True):
            size, (batch, head, slot, *_) = old.element_size(), old.stride()
            own.source = own.target = old.data_ptr()
            own.source_batch = own.target_batch = batch * size
            own.source_head = own.target_head = head * size
            own.source_slot = own.target_slot = slot * size
            own.size = size * (old.shape[3] if old.ndim == 4 else 1)
            if new is not old:
                batch, head, slot, *_ = new.stride()
                own.target, own.target_batch = new.data_ptr(), batch * size
                own.target_head, own.target_slot = head * size, slot * size
        call.tensors, call.n_tensors = moved, n_tensors
        index = one.index.contiguous()
        alive.append(index)
        call.index = index.data_ptr()
        call.batch, call.heads, call.count = index.shape
        call.to, call.shift = one.to, one.shift
        work += index.numel() * one.source[0].shape[-1]
        if one.rows is not None:
            call.rows = one.rows.data_ptr()
        if one.turns is not None:
            cosine, sine = one.turns
            call.cosine, call.sine = cosine.data_ptr(), sine.data_ptr()
            call.half = cosine.shape[-1]
        if (first := one.leading) is not None:
            came = [t.contiguous() for t in (first.source, first.positions, first.frequencies)]
            alive += came
            call.leading = _Leading(*(t.data_ptr() for t in came), came[0].shape[2], first.position)
            call.half = came[2].shape[0]
    _function("buzz_move")(
        calls,
        ctypes.c_int64(len(moves)),
        moves[0].interleaved,
        _threads(work),
        moves[0].source[0].dtype == torch.bfloat16,
    )


def originals(
    keys: Tensor,
    index: Tensor,
    first: int,
    position: int,
    known: tuple[Tensor, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.originals`."""
    size, heads, count = index.shape
    dim, bytes_of = keys.shape[-1], keys.element_size()
    index = index.contiguous()
    rows = torch.arange(size) if rows is None else rows
    known = None if known is None else (known[0].contiguous(), known[1].contiguous())
    found = keys.new_empty(size, heads, count, dim)
    positions = torch.empty(size, heads, count, dtype=torch.int64)
    at = [step * bytes_of for step in keys.stride()[:3]]
    n_known = 0 if known is None else known[0].shape[2]
    _function("buzz_originals")(
        *map(_pointer, (keys, index, rows, *(known or (None, None)), found, positions)),
        *map(ctypes.c_int64, (size, heads, count, n_known, first, position, *at, dim * bytes_of)),
        _threads(index.numel() * dim),
    )
    return found, positions
