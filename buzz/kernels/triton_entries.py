"""Entries in Triton for CUDA: appended, moved and turned, remembered as they came.

Every launch is made on the device of its tensors, whichever is the current one, and no kernel is
compiled anew because a length changed. What has run of them is told in
:mod:`buzz.kernels.triton_scores`.
"""

# mypy: disallow-untyped-defs=False
# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from buzz.kernels.reference import Leading


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the device of the first tensor as the current one: Triton launches on that."""

    @functools.wraps(function)
    def launched(first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        with torch.cuda.device_of(tensor):
            return function(first, *args, **kwargs)

    return launched


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wide(size: int) -> int:
    """The block that holds a head's dimension: a power of two, at least what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(size))


# Strides of positions and scores, which change with a buffer's capacity.
_COUNTED = ("spb", "sph", "ssb", "ssh", "tpb", "tph", "tsb", "tsh")
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit(do_not_specialize=["slot", "token", *_COUNTED[:4]])
def _append_kernel(
    key, value, keys, values, positions, scores, bounds,
    snb, snh, swb, swh, skb, skh, skt, svb, svh, svt, spb, sph, ssb, ssh,
    batch, heads, slot, token,
    BOUNDED: tl.constexpr, PADDED: tl.constexpr, SCORED: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The new entry of one row and head, into `slot` or, if BOUNDED, the last that `bounds` names.

    If PADDED, `bounds` holds the padding of each row.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    if BOUNDED:
        slot = tl.load(bounds + batch + b) - 1
        token = tl.load(bounds + 2 * batch + b)
    else:
        slot = slot.to(tl.int64)
        if PADDED:
            token = token - tl.load(bounds + b)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    k = tl.load(key + b * snb + h * snh + d, mask=d < DIM)
    tl.store(keys + b * skb + h * skh + slot * skt + d, k, mask=d < DIM)
    v = tl.load(value + b * swb + h * swh + dv, mask=dv < VALUE_DIM)
    tl.store(values + b * svb + h * svh + slot * svt + dv, v, mask=dv < VALUE_DIM)
    tl.store(positions + b * spb + h * sph + slot, token)
    if SCORED:
        tl.store(scores + b * ssb + h * ssh + slot, 0.0)


@triton.jit(do_not_specialize=["count", "to", "shift", "residents", "position", *_COUNTED])
def _move_kernel(
    keys, values, positions, scores, new_keys, new_values, new_positions, new_scores,
    index, rows, cosine, sine, leading, leading_positions, frequencies,
    skb, skh, skt, svb, svh, svt, spb, sph, ssb, ssh,
    tkb, tkh, tkt, tvb, tvh, tvt, tpb, tph, tsb, tsh,
    count, heads, to, shift, residents, position,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    TURNED: tl.constexpr, LED: tl.constexpr, EXACT: tl.constexpr,
    INTERLEAVED: tl.constexpr, SOME_ROWS: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All kept entries of one row and head, keys turned if TURNED, from the last to the first.

    The first program of the second axis moves keys, the other one all else. If LED, the first
    `residents` keys are turned from `leading` to `position` and on. EXACT: in float64.

    Within one buffer no entry moves towards slot 0, so that what a block overwrites was read by it
    or by one that came before it.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // heads
    h = program % heads
    index += program * count
    if SOME_ROWS:
        b = tl.load(rows + b)
    blocks = tl.cdiv(count, BLOCK_N)
    if tl.program_id(1) == 0:
        keys += b * skb + h * skh
        new_keys += b * tkb + h * tkh
        dtype = new_keys.dtype.element_ty
        # A pair is turned by one angle: (x, y) to (x cos - y sin, y cos + x sin). z is the rest.
        pair = tl.arange(0, BLOCK_H)
        if INTERLEAVED:
            dx = 2 * pair
            dy = 2 * pair + 1
        else:
            dx = pair
            dy = pair + HALF
        dz = 2 * HALF + tl.arange(0, BLOCK_R)
        for block in range(blocks - 1, -1, -1):
            i = block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = i < count
            source = tl.load(index + i, mask=inside, other=0)[:, None]
            target = (to + i).to(tl.int64)[:, None]
            mask = inside[:, None] & (pair < HALF)[None, :]
            rest = inside[:, None] & (dz < DIM)[None, :]
            x = tl.load(keys + source * skt + dx[None, :], mask=mask, other=0.0)
            y = tl.load(keys + source * skt + dy[None, :], mask=mask, other=0.0)
            if 2 * HALF < DIM:
                z = tl.load(keys + source * skt + dz[None, :], mask=rest, other=0.0)
            if TURNED:
                turn = (shift + i[:, None] - source) * HALF + pair[None, :]
                c = tl.load(cosine + turn, mask=mask, other=1.0)
                s = tl.load(sine + turn, mask=mask, other=0.0)
                if not EXACT:
                    c = c.to(tl.float32)
                    s = s.to(tl.float32)
                wide_x = x.to(c.dtype)
                wide_y = y.to(c.dtype)
                # By way of float32: old compilers know no other from float64 to bfloat16.
                x = (wide_x * c - wide_y * s).to(tl.float32).to(dtype)
                y = (wide_y * c + wide_x * s).to(tl.float32).to(dtype)
            if LED:  # noqa: SIM102  (what it holds is compiled, or not)
                if block * BLOCK_N < residents:
                    led = (i < residents)[:, None]
                    row = (program * residents + i)[:, None]
                    at = tl.load(leading_positions + row, mask=led, other=0)
                    speed = tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
                    moved = (position + i[:, None]).to(tl.int64) - at
                    phase = moved.to(tl.float64) * speed.to(tl.float64)[None, :]
                    # Below pi, float32 is exact enough; the way there is not.
                    near = (phase - tl.floor(phase * (1 / TWO_PI) + 0.5) * TWO_PI).to(tl.float32)
                    c = tl.cos(near)
                    s = tl.sin(near)
                    came = leading + row * DIM
                    wide_x = tl.load(came + dx[None, :], mask=mask & led, other=0.0).to(tl.float32)
                    wide_y = tl.load(came + dy[None, :], mask=mask & led, other=0.0).to(tl.float32)
                    x = tl.where(led, (wide_x * c - wide_y * s).to(dtype), x)
                    y = tl.where(led, (wide_y * c + wide_x * s).to(dtype), y)
            tl.debug_barrier()  # all of the block is read before any of it is written
            tl.store(new_keys + target * tkt + dx[None, :], x, mask=mask)
            tl.store(new_keys + target * tkt + dy[None, :], y, mask=mask)
            if 2 * HALF < DIM:
                tl.store(new_keys + target * tkt + dz[None, :], z, mask=rest)
            tl.debug_barrier()
    else:
        values += b * svb + h * svh
        positions += b * spb + h * sph
        new_values += b * tvb + h * tvh
        new_positions += b * tpb + h * tph
        if SCORED:
            scores += b * ssb + h * ssh
            new_scores += b * tsb + h * tsh
        dv = tl.arange(0, BLOCK_V)[None, :]
        for block in range(blocks - 1, -1, -1):
            i = block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = i < count
            source = tl.load(index + i, mask=inside, other=0)
            target = (to + i).to(tl.int64)
            mask = inside[:, None] & (dv < VALUE_DIM)
            v = tl.load(values + source[:, None] * svt + dv, mask=mask, other=0.0)
            p = tl.load(positions + source, mask=inside, other=0)
            if SCORED:
                score = tl.load(scores + source, mask=inside, other=0.0)
            tl.debug_barrier()
            tl.store(new_values + target[:, None] * tvt + dv, v, mask=mask)
            tl.store(new_positions + target, p, mask=inside)
            if SCORED:
                tl.store(new_scores + target, score, mask=inside)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "first", "position", "known"])
def _originals_kernel(
    keys, index, rows, source, source_positions, found, positions,
    skb, skh, skt,
    count, heads, first, position, known,
    DIM: tl.constexpr, KNOWN: tl.constexpr, SOME_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys as they came: from `source` the first `known` entries, from the cache the others."""
    row = tl.program_id(0).to(tl.int64)
    b = row // heads
    h = row % heads
    if SOME_ROWS:
        b = tl.load(rows + b)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = i < count
    entry = tl.load(index + row * count + i, mask=inside, other=0)
    mask = inside[:, None] & (d < DIM)[None, :]
    base = keys + b * skb + h * skh
    x = tl.load(base + (first + entry)[:, None] * skt + d[None, :], mask=mask, other=0.0)
    p = position + entry
    if KNOWN:
        earlier = inside & (entry < known)
        place = row * known + entry
        old = tl.load(
            source + place[:, None] * DIM + d[None, :], mask=mask & earlier[:, None], other=0.0
        )
        x = tl.where(earlier[:, None], old, x)
        p = tl.where(earlier, tl.load(source_positions + place, mask=earlier, other=0), p)
    tl.store(found + (row * count + i)[:, None] * DIM + d[None, :], x, mask=mask)
    tl.store(positions + row * count + i, p, mask=inside)


@on_device
def append(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    slot: int,
    token: int,
    padding: Tensor | None = None,
) -> None:
    """See :func:`buzz.kernels.append`."""
    write(buffers, key, value, padding, slot, token)


def write(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    slot: int,
    token: int,
    bounded: bool = False,
) -> None:
    key, value = dense(key), dense(value)
    keys, values, positions, scores = [*buffers, buffers[2]][:4]
    batch, heads, _, dim = keys.shape
    value_dim = values.shape[-1]
    _append_kernel[(batch * heads,)](
        key, value, keys, values, positions, scores, bounds,
        *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        *positions.stride()[:2], *scores.stride()[:2], batch, heads, slot, token,
        BOUNDED=bounded, PADDED=bounds is not None, SCORED=len(buffers) > 3,
        DIM=dim, VALUE_DIM=value_dim, BLOCK_D=wide(dim), BLOCK_V=wide(value_dim),
        enable_fp_fusion=True,
    )  # fmt: skip


@on_device
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
    """See :func:`buzz.kernels.move`; keys, values, positions and, if there are any, scores."""
    batch, heads, count = index.shape
    old = [*source, source[2]][:4]
    new = [*target, target[2]][:4]
    dim, value_dim = old[0].shape[-1], old[1].shape[-1]
    cos, sin = (None, None) if turns is None else (table.contiguous() for table in turns)
    led = (None, None, 0, None) if leading is None else leading
    half = 0 if cos is None else cos.shape[-1]
    half = half if leading is None else leading.frequencies.shape[-1]
    _move_kernel[(batch * heads, 2)](
        *old, *new, index.contiguous(), rows, cos, sin, led[0], led[1], led[3],
        *(stride for t in (*old, *new) for stride in t.stride()[: t.ndim - 1]),
        count, heads, to, shift, 0 if leading is None else leading.source.shape[2], led[2],
        DIM=dim, VALUE_DIM=value_dim, HALF=half, TURNED=cos is not None, LED=leading is not None,
        EXACT=old[0].dtype == torch.float32, INTERLEAVED=interleaved, SOME_ROWS=rows is not None,
        SCORED=len(source) > 3, BLOCK_H=triton.next_power_of_2(max(1, half)),
        BLOCK_R=triton.next_power_of_2(max(1, dim - 2 * half)), BLOCK_V=wide(value_dim),
        BLOCK_N=16, enable_fp_fusion=True,
    )  # fmt: skip


@on_device
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
    dim = keys.shape[-1]
    found = keys.new_empty(size, heads, count, dim)
    positions = index.new_empty(size, heads, count)
    source, at = (None, None) if known is None else (tensor.contiguous() for tensor in known)
    _originals_kernel[(size * heads, triton.cdiv(count, 32))](
        keys, index.contiguous(), rows, source, at, found, positions,
        *keys.stride()[:3], count, heads, first, position, 0 if source is None else source.shape[2],
        DIM=dim, KNOWN=source is not None, SOME_ROWS=rows is not None,
        BLOCK_D=wide(dim), BLOCK_N=32, enable_fp_fusion=True,
    )  # fmt: skip
    return found, positions
