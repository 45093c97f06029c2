"""Scored attention in Triton for CUDA.

Prefill takes two kernels. The first gives the output and the log-sum-exp of every query: PyTorch's
flash attention where it can serve the inputs, else :func:`_attend_kernel`. The second recomputes
the probabilities from the log-sum-exp, block by block, and sums them over the queries: each program
owns a block of keys, so nothing is added up atomically and results repeat to the bit.

Decoding splits the keys over programs (as in flash-decoding); a small second kernel normalises.
A step whose bounds lie on the device has a grid that follows from the buffers' capacity.

Every launch is made on the device of its tensors, whichever is the current one, and no kernel is
compiled anew because a length changed.

What has run: the kernels in Triton's interpreter on the CPU, against the full matrix, and Triton's
compiler for compute capability 8.0 and 9.0. Nothing here has run, been timed or tuned on a GPU yet;
that includes PyTorch's flash attention and its log-sum-exp.
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
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from buzz.kernels.reference import Leading


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the device of the first tensor as the current one: Triton launches on that."""

    @functools.wraps(function)
    def on_device(first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        with torch.cuda.device_of(tensor):
            return function(first, *args, **kwargs)

    return on_device


@triton.jit(do_not_specialize=["queries", "keys"])
def _attend_kernel(
    query, key, value, out, lse,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sob, soh, sot,
    queries, keys, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: flash attention that also stores the log-sum-exp."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    position = keys - queries + i  # the last key that each query sees
    q = tl.load(
        query + b * sqb + h * sqh + i.to(tl.int64)[:, None] * sqt + d[None, :],
        mask=(i < queries)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    key += b * skb + h // GROUP * skh
    value += b * svb + h // GROUP * svh
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last = tl.minimum(keys, keys - queries + (tl.program_id(0) + 1) * BLOCK_M)
    for low in range(0, last, BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)
        k = tl.load(
            key + j.to(tl.int64)[None, :] * skt + d[:, None],
            mask=(j < keys)[None, :] & (d < DIM)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            value + j.to(tl.int64)[:, None] * svt + dv[None, :],
            mask=(j < keys)[:, None] & (dv < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        visible = j[None, :] <= position[:, None]
        s = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))  # finite: every query sees key 0
        p = tl.exp(s - new_top[:, None])
        old = tl.exp(top - new_top)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    acc = acc / total[:, None]
    tl.store(
        out + b * sob + h * soh + i.to(tl.int64)[:, None] * sot + dv[None, :],
        acc.to(out.dtype.element_ty), mask=(i < queries)[:, None] & (dv < VALUE_DIM)[None, :],
    )  # fmt: skip
    logsum = top + tl.log(total)
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + i, logsum, mask=i < queries)


@triton.jit(do_not_specialize=["slb", "slh", "queries", "keys", "first"])
def _received_kernel(
    query, key, lse, received,
    sqb, sqh, sqt, skb, skh, skt, slb, slh,
    queries, keys, kv_heads, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: the sum of its probabilities over queries and group."""
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = tl.load(
        key + b * skb + g * skh + j.to(tl.int64)[None, :] * skt + d[:, None],
        mask=(j < keys)[None, :] & (d < DIM)[:, None], other=0.0,
    )  # fmt: skip
    share = tl.zeros([BLOCK_N], tl.float32)
    # Earlier queries do not see this block, or are not observed.
    begin = tl.maximum(first, tl.program_id(0) * BLOCK_N - (keys - queries)) // BLOCK_M * BLOCK_M
    for member in range(GROUP):
        h = g * GROUP + member
        for low in range(begin, queries, BLOCK_M):
            i = low + tl.arange(0, BLOCK_M)
            q = tl.load(
                query + b * sqb + h * sqh + i.to(tl.int64)[:, None] * sqt + d[None, :],
                mask=(i < queries)[:, None] & (d < DIM)[None, :], other=0.0,
            )  # fmt: skip
            norm = tl.load(
                lse + b * slb + h * slh + i, mask=(i < queries) & (i >= first), other=float("inf")
            )
            visible = j[None, :] <= (keys - queries + i)[:, None]
            s = tl.dot(q, k, input_precision="ieee") * scale
            share += tl.sum(tl.where(visible, tl.exp(s - norm[:, None]), 0.0), 0)
    tl.store(received + tl.program_id(1).to(tl.int64) * keys + j, share, mask=j < keys)


@triton.jit(do_not_specialize=["keys", "chunk"])
def _decode_kernel(
    query, key, value, starts, scores, tops, totals, partial,
    sqb, sqh, skb, skh, skt, svb, svh, svt,
    keys, batch, kv_heads, chunk, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys of one key head, for its whole group: logits, maximum, sum, output.

    `starts` holds a first key for each row, and behind these, if BOUNDED, one past the last.
    """
    split = tl.program_id(0)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    member = tl.arange(0, BLOCK_G)
    row = tl.program_id(1).to(tl.int64) * GROUP + member  # of [B * Hq]
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    start = tl.load(starts + b).to(tl.int32) if PADDED else 0
    end = tl.load(starts + batch + b).to(tl.int32) if BOUNDED else keys
    q = tl.load(
        query + b * sqb + (g * GROUP + member)[:, None] * sqh + d[None, :],
        mask=(member < GROUP)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    key += b * skb + g * skh
    value += b * svb + g * svh
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for low in range(split * chunk, tl.minimum(end, (split + 1) * chunk), BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)
        valid = (j < end) & (j >= start)
        k = tl.load(
            key + j.to(tl.int64)[None, :] * skt + d[:, None],
            mask=valid[None, :] & (d < DIM)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            value + j.to(tl.int64)[:, None] * svt + dv[None, :],
            mask=valid[:, None] & (dv < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        s = tl.where(valid[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        tl.store(
            scores + row[:, None] * keys + j[None, :], s,
            mask=(member < GROUP)[:, None] & (j < keys)[None, :],
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # before the row's first key
        p = tl.exp(s - safe[:, None])
        old = tl.exp(top - safe)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    at = row * tl.num_programs(0) + split
    tl.store(tops + at, top, mask=member < GROUP)
    tl.store(totals + at, total, mask=member < GROUP)
    tl.store(
        partial + at[:, None] * VALUE_DIM + dv[None, :], acc,
        mask=(member < GROUP)[:, None] & (dv < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["keys", "splits"])
def _combine_kernel(
    scores, tops, totals, partial, out, received, bounds,
    srb, srh,
    keys, splits, batch, kv_heads, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BOUNDED: tl.constexpr, SCORED: tl.constexpr, ADDS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: what it received; the first block also the output.

    If BOUNDED, `received` is a buffer whose numbers grow (ADDS) or are replaced.
    """
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    start = tl.load(bounds + b).to(tl.int32) if BOUNDED else 0
    end = tl.load(bounds + batch + b).to(tl.int32) if BOUNDED else keys
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = (j >= start) & (j < end)
    dv = tl.arange(0, BLOCK_V)
    share = tl.zeros([BLOCK_N], tl.float32)
    for member in range(GROUP):
        row = tl.program_id(1).to(tl.int64) * GROUP + member
        top = tl.load(tops + row * splits)
        for split in range(1, splits):
            top = tl.maximum(top, tl.load(tops + row * splits + split))
        total = 0.0
        acc = tl.zeros([BLOCK_V], tl.float32)
        for split in range(splits):
            at = row * splits + split
            weight = tl.exp(tl.load(tops + at) - top)
            total += weight * tl.load(totals + at)
            acc += weight * tl.load(partial + at * VALUE_DIM + dv, mask=dv < VALUE_DIM, other=0.0)
        s = tl.load(scores + row * keys + j, mask=held, other=float("-inf"))
        share += tl.exp(s - top) / total
        if tl.program_id(0) == 0:
            mixed = (acc / total).to(out.dtype.element_ty)
            tl.store(out + row * VALUE_DIM + dv, mixed, mask=dv < VALUE_DIM)
    if SCORED:
        received += b * srb + g * srh + j
        if ADDS:  # the new entry has none yet
            share += tl.load(received, mask=held & (j < end - 1), other=0.0)
        tl.store(received, share, mask=held)


@triton.jit(do_not_specialize=["slot", "token"])
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
    elif PADDED:
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


@triton.jit(do_not_specialize=["count", "to", "shift", "residents", "position"])
def _move_kernel(
    keys, values, positions, scores, new_keys, new_values, new_positions, new_scores,
    index, rows, cosine, sine, leading, leading_positions, frequencies,
    skb, skh, skt, svb, svh, svt, spb, sph, ssb, ssh,
    tkb, tkh, tkt, tvb, tvh, tvt, tpb, tph, tsb, tsh,
    count, heads, to, shift, residents, position,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    TURNED: tl.constexpr, LED: tl.constexpr,
    INTERLEAVED: tl.constexpr, SOME_ROWS: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All kept entries of one row and head, keys turned if TURNED, from the last to the first.

    If LED, the first `residents` are turned from `leading` to `position` and on.

    Within one buffer no entry moves towards slot 0, so that what a block overwrites was read by it
    or by one that came before it.
    """
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    index += tl.program_id(0).to(tl.int64) * count
    if SOME_ROWS:
        b = tl.load(rows + b)
    keys += b * skb + h * skh
    values += b * svb + h * svh
    positions += b * spb + h * sph
    new_keys += b * tkb + h * tkh
    new_values += b * tvb + h * tvh
    new_positions += b * tpb + h * tph
    if SCORED:
        scores += b * ssb + h * ssh
        new_scores += b * tsb + h * tsh
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    # x cos - y sin in one half of the pairs, y cos + x sin in the other, the rest as it is.
    if INTERLEAVED:
        is_first = d % 2 == 0
        partner = tl.where(d >= 2 * HALF, d, tl.where(is_first, d + 1, d - 1))
        angle = d // 2
    else:
        is_first = d < HALF
        partner = tl.where(d >= 2 * HALF, d, tl.where(is_first, d + HALF, d - HALF))
        angle = tl.where(is_first, d, d - HALF)
    for block in range(tl.cdiv(count, BLOCK_N) - 1, -1, -1):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = i < count
        source = tl.load(index + i, mask=inside, other=0)
        target = (to + i).to(tl.int64)
        mask = inside[:, None] & (d < DIM)[None, :]
        value_mask = inside[:, None] & (dv < VALUE_DIM)[None, :]
        x = tl.load(keys + source[:, None] * skt + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + source[:, None] * svt + dv[None, :], mask=value_mask, other=0.0)
        p = tl.load(positions + source, mask=inside, other=0)
        turned = inside[:, None] & (d < 2 * HALF)[None, :]
        if TURNED:
            y = tl.load(keys + source[:, None] * skt + partner[None, :], mask=mask, other=0.0)
            turn = (shift + i - source)[:, None] * HALF + angle[None, :]
            c = tl.load(cosine + turn, mask=turned, other=1.0)
            s = tl.load(sine + turn, mask=turned, other=0.0)
            s = tl.where(is_first[None, :], -s, s)
            x = (x.to(c.dtype) * c + y.to(c.dtype) * s).to(new_keys.dtype.element_ty)
        if LED:
            led = i < residents
            row = (tl.program_id(0).to(tl.int64) * residents + i)[:, None]
            mask_led = mask & led[:, None]
            x_led = tl.load(leading + row * DIM + d[None, :], mask=mask_led, other=0.0)
            y_led = tl.load(leading + row * DIM + partner[None, :], mask=mask_led, other=0.0)
            at = tl.load(leading_positions + row, mask=led[:, None], other=0)
            moved = (position + i)[:, None].to(tl.int64) - at
            speed = tl.load(frequencies + angle, mask=d < 2 * HALF, other=0.0).to(tl.float64)
            phase = moved.to(tl.float64) * speed[None, :]
            s = tl.where(is_first[None, :], -tl.sin(phase), tl.sin(phase))
            z = x_led.to(tl.float64) * tl.cos(phase) + y_led.to(tl.float64) * s
            z = tl.where(turned, z, x_led.to(tl.float64)).to(new_keys.dtype.element_ty)
            x = tl.where(led[:, None], z, x)
        if SCORED:
            score = tl.load(scores + source, mask=inside, other=0.0)
        tl.debug_barrier()  # all of the block is read before any of it is written
        tl.store(new_keys + target[:, None] * tkt + d[None, :], x, mask=mask)
        tl.store(new_values + target[:, None] * tvt + dv[None, :], v, mask=value_mask)
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
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    h = row % heads
    if SOME_ROWS:
        b = tl.load(rows + b)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _wide(size: int) -> int:
    """The block that holds a head's dimension: a power of two, at least what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(size))


def _block(tensor: Tensor, kib: int) -> int:
    """Tokens whose vectors take `kib`; all tiles together stay below a small GPU's 99 KiB."""
    tokens = kib * 1024 // (_wide(tensor.shape[-1]) * tensor.element_size())
    return max(16, min(128, tokens))


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention; this operator aligns the causal mask at the bottom right.

    Returns:
        Output [B, Hq, q, Dv] and log-sum-exp [B, Hq, >= q] in float32.
    """
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scale
    )
    return output, lse


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same from :func:`_attend_kernel`: any dtype, any head size."""
    batch, heads, queries, dim = query.shape
    value_dim = value.shape[-1]
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    block = _block(query, 32)
    _attend_kernel[(triton.cdiv(queries, block), batch * heads)](
        query, key, value, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        queries, key.shape[2], heads, scale,
        GROUP=heads // key.shape[1], DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim), BLOCK_M=block, BLOCK_N=_block(key, 8),
    )  # fmt: skip
    return output, lse


@_on_device
def scored_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    observe: int | None = None,
    decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_prefill`."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    params = SDPAParams(query, key, value, None, 0.0, False, heads != kv_heads)
    if dim % 8 == 0 and can_use_flash_attention(params):
        output, lse = _flash(query, key, value, scale)
    else:
        output, lse = _attend(query, key, value, scale)
    if decay != 1:  # exp(s - lse) of a query times decay to the power of its age
        age = torch.arange(lse.shape[-1] - 1, -1, -1, device=lse.device)
        lse = lse - (age - (lse.shape[-1] - queries)) * math.log(decay)
    received = query.new_empty(batch, kv_heads, keys, dtype=torch.float32)
    block = _block(key, 32)
    _received_kernel[(triton.cdiv(keys, block), batch * kv_heads)](
        query, key, lse, received,
        *query.stride()[:3], *key.stride()[:3], *lse.stride()[:2],
        queries, keys, kv_heads, 0 if observe is None else max(0, queries - observe), scale,
        GROUP=heads // kv_heads, DIM=dim,
        BLOCK_D=_wide(dim), BLOCK_M=_block(query, 16), BLOCK_N=block,
    )  # fmt: skip
    return output, received


@_on_device
def scored_decode(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
    received = query.new_empty(*key.shape[:3], dtype=torch.float32)
    return _decode(query, key, value, scale, starts, received), received


@_on_device
def append(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    slot: int,
    token: int,
    padding: Tensor | None = None,
) -> None:
    """See :func:`buzz.kernels.append`."""
    _append(buffers, key, value, padding, slot, token)


def _append(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    slot: int,
    token: int,
    bounded: bool = False,
) -> None:
    key, value = _dense(key), _dense(value)
    keys, values, positions, scores = [*buffers, buffers[2]][:4]
    batch, heads, _, dim = keys.shape
    value_dim = values.shape[-1]
    _append_kernel[(batch * heads,)](
        key, value, keys, values, positions, scores, bounds,
        *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        *positions.stride()[:2], *scores.stride()[:2], batch, heads, slot, token,
        BOUNDED=bounded, PADDED=bounds is not None, SCORED=len(buffers) > 3,
        DIM=dim, VALUE_DIM=value_dim, BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim),
    )  # fmt: skip


@_on_device
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
) -> Tensor:
    """See :func:`buzz.kernels.step`."""
    _append([keys, values, positions], key, value, bounds, 0, 0, bounded=True)
    return _decode(query, keys, values, scale, bounds, scores, bounded=True, adds=adds)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None,
    received: Tensor | None,
    bounded: bool = False,
    adds: bool = False,
) -> Tensor:
    """The output; what keys receive goes to `received`, if there is any."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    value_dim, group = value.shape[-1], heads // kv_heads
    block = _block(key, 8)
    # About 256 programs fill a large GPU.
    splits = max(1, min(triton.cdiv(keys, block), 256 // (batch * kv_heads), 32))
    chunk = triton.cdiv(triton.cdiv(keys, splits), block) * block
    splits = triton.cdiv(keys, chunk)
    new = query.new_empty
    scores = new(batch, heads, keys, dtype=torch.float32)
    tops, totals = new(2, batch, heads, splits, dtype=torch.float32)
    partial = new(batch, heads, splits, value_dim, dtype=torch.float32)
    output = new(batch, heads, 1, value_dim)
    _decode_kernel[(splits, batch * kv_heads)](
        query, key, value, starts, scores, tops, totals, partial,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        keys, batch, kv_heads, chunk, scale,
        GROUP=group, PADDED=starts is not None, BOUNDED=bounded, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_G=_wide(group), BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim), BLOCK_N=block,
    )  # fmt: skip
    block = 256
    _combine_kernel[(1 if received is None else triton.cdiv(keys, block), batch * kv_heads)](
        scores, tops, totals, partial, output, received, starts,
        *(received.stride()[:2] if received is not None else (0, 0)),
        keys, splits, batch, kv_heads,
        GROUP=group, VALUE_DIM=value_dim, BOUNDED=bounded, SCORED=received is not None, ADDS=adds,
        BLOCK_V=_wide(value_dim), BLOCK_N=block,
    )  # fmt: skip
    return output


@_on_device
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
    _move_kernel[(batch * heads,)](
        *old, *new, index.contiguous(), rows, cos, sin, led[0], led[1], led[3],
        *(stride for t in (*old, *new) for stride in t.stride()[: t.ndim - 1]),
        count, heads, to, shift, 0 if leading is None else leading.source.shape[2], led[2],
        DIM=dim, VALUE_DIM=value_dim, HALF=half, TURNED=cos is not None, LED=leading is not None,
        INTERLEAVED=interleaved, SOME_ROWS=rows is not None, SCORED=len(source) > 3,
        BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim), BLOCK_N=32 if leading is None else 16,
    )  # fmt: skip


@_on_device
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
    _originals_kernel[(triton.cdiv(count, 32), size * heads)](
        keys, index.contiguous(), rows, source, at, found, positions,
        *keys.stride()[:3], count, heads, first, position, 0 if source is None else source.shape[2],
        DIM=dim, KNOWN=source is not None, SOME_ROWS=rows is not None,
        BLOCK_D=_wide(dim), BLOCK_N=32,
    )  # fmt: skip
    return found, positions
