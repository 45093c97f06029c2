"""Attention that also yields what every key received, and the move of kept entries.

The one place that chooses an implementation (:func:`implementation`):

============  ==========================================================================
``triton``    float32, float16, bfloat16 on CUDA, from sm_80 on, where Triton is installed
``cpu``       float32, float16, bfloat16 on the CPU, where a C++ compiler is found: fused
``reference`` all else (other devices, float64, gradients): plain PyTorch, slower
============  ==========================================================================

On the CPU, and by ``reference``, entries may be of int8 (:func:`quantized`), beside any queries.

A card older than sm_80, whose multiprocessors hold less than the kernels take, is refused by name.

The environment variable ``BUZZ_KERNELS`` set to one of the three names forces it for every call.
All give the same numbers up to rounding; ``reference`` is what the others must equal.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from buzz.errors import ConfigError
from buzz.kernels import cpu, reference
from buzz.kernels.reference import Leading, Move, widened, width

NAMES = ("triton", "cpu", "reference")
__all__ = [
    "NAMES",
    "Leading",
    "Move",
    "append",
    "implementation",
    "move",
    "move_all",
    "originals",
    "outruns_stock",
    "quantized",
    "scored_decode",
    "scored_prefill",
    "step",
    "step_rows",
    "steps_rows",
    "widened",
    "width",
]


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("buzz.kernels.triton_scores")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A CUDA device's compute capability."""
    return torch.cuda.get_device_capability(device)


def _too_old(device: torch.device) -> ConfigError:
    major, minor = capability(device)
    name = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    remedy = "the kernels need sm_80; the environment's BUZZ_KERNELS=reference does without, slowly"
    return ConfigError("device", name, remedy)


def implementation(tensor: Tensor) -> ModuleType:
    """The module that serves a tensor of this device and dtype.

    Raises:
        ConfigError: ``BUZZ_KERNELS`` names none, or one that cannot run here; a card too old.
    """
    forced = os.environ.get("BUZZ_KERNELS", "")
    if forced == "reference":
        return reference
    if forced not in ("", *NAMES):
        raise ConfigError("BUZZ_KERNELS", forced, f"write one of {', '.join(NAMES)}, or unset it")
    if tensor.dtype == torch.int8 and tensor.is_cuda:
        remedy = "the kernels of CUDA read floats alone; leave it out, or set device=cpu"
        raise ConfigError("cache.dtype", "int8", remedy)
    differentiable = torch.is_grad_enabled() and tensor.requires_grad
    if tensor.dtype in (*cpu.DTYPES, torch.int8) and not differentiable:
        if tensor.is_cuda and forced in ("", "triton") and (module := _triton()):
            if capability(tensor.device) < (8, 0):
                raise _too_old(tensor.device)
            return module
        if tensor.device.type == "cpu" and forced in ("", "cpu") and cpu.available():
            return cpu
    if forced:
        raise ConfigError(
            "BUZZ_KERNELS", forced, f"cannot serve {tensor.dtype} on {tensor.device}; unset it"
        )
    return reference


def quantized(x: Tensor) -> Tensor:
    """Keys or values as entries of int8, each with a scale of its own.

    Symmetric, by the largest number of each vector: that is 127 times the scale, and no number is
    off by more than half of it. The scale moves and is copied with its entry.

    Args:
        x: [B, H, n, D].

    Returns:
        int8 [B, H, n, D + 4]: the numbers, and behind them the four bytes of the float32 that they
        are times.
    """
    own = reference if torch.compiler.is_compiling() else implementation(x)
    return cpu.quantized(x) if own is cpu else reference.quantized(x)


def outruns_stock(query: Tensor) -> bool:
    """Whether attention is faster here than PyTorch's own, also where nobody asks for scores.

    On the CPU it is: methods must not differ by whose kernel they run. float16 is not, which would
    be widened in every step; and torch.compile has a kernel of its own.
    """
    if query.dtype == torch.float16 or torch.compiler.is_compiling():
        return False
    return implementation(query) is cpu


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
    """Causal attention of the last ``q`` of ``n`` tokens, and what every key received.

    Query ``i`` sees the keys up to ``n - q + i``. Query heads ``g*r .. g*r + r - 1`` share key head
    ``g`` (``r = Hq // Hkv``); repeated keys are never materialised, and views such as
    ``buffer[:, :, low:high]`` are read in place. The extra memory is O(block * n).

    Args:
        query: [B, Hq, q, D], q >= 1.
        key: [B, Hkv, n, D], n >= q; or of int8, as all keys and values here (:func:`quantized`).
        value: [B, Hkv, n, Dv].
        scale: factor of the logits, usually ``D ** -0.5``.
        observe: only the last ``observe`` queries count in what is received, 0: none; None: all.
        decay: a query counts ``decay`` to the power of how many come after it, from 0 to 1.
        sinks: [Hq], a learned logit of each query head: one more term of the softmax's denominator
            that has no value and of which nothing is received (gpt-oss, ``s_aux``). None: none.

    Returns:
        The output [B, Hq, q, Dv] in the query's dtype, dense as [B, q, Hq, Dv], and the received
        attention [B, Hkv, n] in float32: the column sums of the softmax over the queries and over
        the query heads of each group.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(query, key, value, sinks)
    if decay == 0:
        observe, decay = 1, 1.0
    if torch.compiler.is_compiling():
        return _compiled(query, key, value, scale, observe, decay, None, sinks)
    own = implementation(query)
    return own.scored_prefill(query, key, value, scale, observe=observe, decay=decay, sinks=sinks)


def scored_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`scored_prefill` of a single token (q = 1), in one pass over the cache.

    Args:
        query: [B, Hq, 1, D].
        key: [B, Hkv, n, D].
        value: [B, Hkv, n, Dv].
        scale: factor of the logits.
        starts: [B] int64, below n: the first key of each row. What precedes it, where rows hold
            less than the longest, is neither attended nor receives. None: all 0.
        sinks: as of :func:`scored_prefill`.

    Returns:
        The output [B, Hq, 1, Dv] and the received attention [B, Hkv, n] in float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(query, key, value, sinks)
    if query.shape[2] != 1:
        raise ValueError(f"scored_decode takes one query, got {query.shape[2]}")
    if torch.compiler.is_compiling():
        return _compiled(query, key, value, scale, None, 1.0, starts, sinks)
    return implementation(query).scored_decode(query, key, value, scale, starts, sinks)


def append(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    slot: int,
    token: int,
    padding: Tensor | None = None,
) -> None:
    """Write a token's entry into its slot.

    Args:
        buffers: keys [B, H, C, D], values, positions int32 [B, H, C], and scores float32 [B, H, C]
            if there are any, changed in place.
        key, value: [B, H, 1, D] and [B, H, 1, Dv].
        slot: where, the same in all rows.
        token: tokens before it, padding included.
        padding: int64 [B], of each row; None: none.
    """
    chosen = reference if torch.compiler.is_compiling() else implementation(buffers[0])
    if not hasattr(chosen, "append"):  # four copies are no slower on a CPU
        chosen = reference
    chosen.append(buffers, key, value, slot, token, padding)


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
    adds: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """A whole decoding step of one layer: append the token's entry, attend, and note what each got.

    Where it writes and reads stands in `bounds`, on the device: so the same call, with the same
    arguments, serves every step, and a compiled graph of it is never made anew.

    Args:
        query: [B, Hq, 1, D].
        key, value: [B, Hkv, 1, D] and [B, Hkv, 1, Dv], the new entry.
        keys, values, positions, scores: buffers [B, Hkv, C, ...], changed in place: `positions`
            int32, `scores` float32 or None where nobody reads any.
        bounds: int64 [3, B], of each row its first slot, one past its last, which takes the new
            entry and is the same in all rows, and the index of the new token.
        scale: factor of the logits.
        adds: whether `scores` grow by what was received, or become it.
        sinks: as of :func:`scored_prefill`.

    Returns:
        Output [B, Hq, 1, Dv].

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(query, keys, values, sinks)
    arguments = (query, key, value, keys, values, positions, scores, bounds, scale, adds, sinks)
    output: Tensor = torch.ops.buzz.step(*arguments)
    return output


def steps_rows(query: Tensor) -> bool:
    """Whether :func:`step_rows` serves this device and dtype."""
    return implementation(query) is cpu and query.dtype != torch.float16


def step_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Sequence[int]],
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`step` of rows whose entries lie in buffers of their own, each of its own length.

    Only where :func:`steps_rows`.

    Args:
        query: [B, Hq, 1, D].
        key, value: [B, Hkv, 1, D] and [B, Hkv, 1, Dv], the new entries.
        rows: for each row the addresses of its keys [Hkv, C, D], values, positions (int32) and
            scores (float32; 0: nobody asks), all dense; C; its first slot and one past its last,
            which takes the new entry; the index of the new token; and whether scores grow by what
            was received, or become it; and whether its entries are of int8.
        scale: factor of the logits.
        sinks: as of :func:`scored_prefill`.

    Returns:
        Output [B, Hq, 1, Dv].
    """
    return cpu.step_rows(query, key, value, rows, scale, sinks)


def move_all(moves: Sequence[Move]) -> None:
    """Several of :func:`move`, of tensors of one device, in any order.

    And of one dtype, or else nothing turns.
    """
    if moves and _mover(moves[0]) is cpu and all(_is_dense(one) for one in moves):
        cpu.move_all(moves)
    else:
        for one in moves:
            move(**vars(one))


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
    leading: Leading | None = None,
) -> None:
    """Move kept entries to their new slots, and turn their keys to the new positions.

    Slot ``to + i`` of the target takes the entry of slot ``index[..., i]`` of the source, its key
    turned by ``shift + i - index[..., i]`` positions.

    Args:
        source: keys [B, H, capacity, D], values, and any other tensors [B, H, capacity, ...].
        target: their counterparts, changed in place. They may be the same tensors; then
            ``index[..., i] <= to + i``.
        index: int64 [rows, H, k], ascending.
        to: the first slot written.
        shift: how far an entry that keeps its place among all moves in positions.
        turns: cosines and sines, float64 [turns, R / 2], row t for a move by t positions; None
            leaves keys as they are.
        rows: int64 [rows], the batch rows to move in; None: all.
        interleaved: the layout of the rotary pairs (:func:`buzz.kernels.reference.rotate`).
        leading: the keys of the first of them, which are turned from how they came.
    """
    one = Move(source, target, index, to, shift, turns, rows, interleaved, leading)
    more = {"rows": rows, "interleaved": interleaved, "leading": leading}
    _mover(one).move(source, target, index, to, shift, turns, **more)


def _mover(move: Move) -> Any:
    """The module that serves a move."""
    if torch.compiler.is_compiling() or not _is_dense(move):
        return reference
    keys = move.source[0]
    chosen = implementation(keys)
    return reference if chosen is cpu and keys.dtype == torch.float16 else chosen


def _is_dense(move: Move) -> bool:
    return move.source[0].stride(-1) == move.source[1].stride(-1) == 1


def originals(
    keys: Tensor,
    index: Tensor,
    first: int,
    position: int,
    known: tuple[Tensor, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys of leading entries as they came, and the positions that they are rotated to.

    Args:
        keys: [B, H, capacity, D].
        index: int64 [rows, H, R], the entries, counted from `first`.
        first: slot of entry 0.
        position: of entry 0.
        known: what this function returned before: originals of entries 0, 1, ...; the keys of
            others are as they came.
        rows: int64 [rows], the batch rows; None: all.

    Returns:
        [rows, H, R, D] and int64 [rows, H, R].
    """
    chosen = reference if torch.compiler.is_compiling() else implementation(keys)
    if keys.stride(-1) != 1:
        chosen = reference
    return chosen.originals(keys, index, first, position, known, rows=rows)


def _check(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    batch, heads, queries, dim = query.shape
    if (
        key.shape[0] != batch
        or width(key) != dim
        or value.shape[:3] != key.shape[:3]
        or heads % key.shape[1]
        or not 1 <= queries <= key.shape[2]
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"shapes of query, key, value do not fit: {shapes}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks do not fit {heads} query heads: {tuple(sinks.shape)}")


@torch.library.custom_op("buzz::scored_attention", mutates_args=())
def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    observe: int | None,
    decay: float,
    starts: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both functions as one opaque operator, so that torch.compile sees through to the next."""
    if query.shape[2] == 1:
        return scored_decode(query, key, value, scale, starts, sinks)
    return scored_prefill(query, key, value, scale, observe=observe, decay=decay, sinks=sinks)


@_compiled.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    observe: int | None,
    decay: float,
    starts: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, width(value)).transpose(1, 2)
    return output, query.new_empty(key.shape[:3], dtype=torch.float32)


def _step(
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
    sinks: Tensor | None,
) -> Tensor:
    served = implementation(query)
    return served.step(
        query, key, value, keys, values, positions, scores, bounds, scale, adds, sinks
    )


def _fake_step(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    batch, heads = query.shape[:2]
    return query.new_empty(batch, 1, heads, value.shape[-1]).transpose(1, 2)


# Not by `custom_op`, which takes 40 microseconds more for each layer and step.
_library = torch.library.Library("buzz", "FRAGMENT")
_written = ("keys", "values", "positions", "scores")
_library.define(f"step{torch.library.infer_schema(_step, mutates_args=_written)}")
_library.impl("step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("buzz::step", _fake_step, lib=_library)
