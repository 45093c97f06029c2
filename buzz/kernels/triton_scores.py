"""Scored attention in Triton for CUDA.

Prefill takes two kernels. The first gives the output and the log-sum-exp of every query: PyTorch's
flash attention where it can serve the inputs, else :func:`_attend_kernel`. The second recomputes
the probabilities from the log-sum-exp, block by block, and sums them over the queries: each program
owns a block of keys, so nothing is added up atomically and results repeat to the bit. Sinks are
added to the log-sum-exp in between, and the output shrinks by as much.

Decoding splits the keys over programs (as in flash-decoding); a small second kernel normalises.
A step whose bounds lie on the device has a grid that follows from the buffers' capacity.

Every launch is made on the device of its tensors, whichever is the current one, and no kernel is
compiled anew because a length changed.

What has run: the kernels in Triton's interpreter on the CPU, against the full matrix, and Triton's
compiler for compute capability 8.0 and up, whose machine code tests hold to a budget: registers,
shared memory, width of copies. Nothing here has run, been timed or tuned on a GPU yet; that
includes PyTorch's flash attention and its log-sum-exp.
"""

# mypy: disallow-untyped-defs=False
# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from buzz.kernels.triton_entries import append, dense, move, on_device, originals, wide, write

LOG2_E = tl.constexpr(math.log2(math.e))
MOST_SPLITS = 32

__all__ = ["append", "move", "originals", "scored_decode", "scored_prefill", "step"]


@triton.jit
def _place(blocks):
    """This program's block, and its row and head: of one axis, as the others end at 65,535."""
    return tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)


@triton.jit(do_not_specialize=["queries", "keys"])
def _attend_kernel(
    query, key, value, out, lse,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sob, soh, sot,
    queries, keys, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: flash attention that also stores the log-sum-exp."""
    block, program = _place(tl.cdiv(queries, BLOCK_M))
    b = program // heads
    h = program % heads
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
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
    last = tl.minimum(keys, keys - queries + (block + 1) * BLOCK_M)
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
    tl.store(lse + program * queries + i, logsum, mask=i < queries)


@triton.jit
def _probabilities(
    query, lse, k, low, queries, first, past, sqt, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What a block of queries, from `low` on, gives to the keys `k`; 0 of those before `first`.

    Args:
        past: int [BLOCK_N], how many queries come before the first that sees each key; None: all
            queries of the block see all keys.
    """
    i = low + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        query + i.to(tl.int64)[:, None] * sqt + d[None, :],
        mask=(i < queries)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    norm = tl.load(lse + i, mask=(i < queries) & (i >= first), other=float("inf"))
    # The exponential is that of base 2, which is an instruction.
    s = tl.dot(q, k, input_precision="ieee") * scale - (norm * LOG2_E)[:, None]
    if past is not None:
        s = tl.where(past[None, :] <= i[:, None], s, float("-inf"))
    return tl.exp2(s)


@triton.jit(do_not_specialize=["slb", "slh", "queries", "keys", "first"])
def _received_kernel(
    query, key, lse, received,
    sqb, sqh, sqt, skb, skh, skt, slb, slh,
    queries, keys, kv_heads, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: the sum of its probabilities over queries and group.

    They are added up where each thread has them, for every BLOCK_M-th query, and across threads
    once in the end: each time that would take as long as a block's exponentials.
    """
    block, program = _place(tl.cdiv(keys, BLOCK_N))
    b = program // kv_heads
    g = program % kv_heads
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = tl.load(
        key + b * skb + g * skh + j.to(tl.int64)[None, :] * skt + d[:, None],
        mask=(j < keys)[None, :] & (d < DIM)[:, None], other=0.0,
    )  # fmt: skip
    share = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    past = j - (keys - queries)
    # Earlier queries do not see this block, or are not observed; later ones see all of it.
    begin = tl.maximum(first, block * BLOCK_N - (keys - queries)) // BLOCK_M * BLOCK_M
    whole = tl.cdiv(tl.maximum((block + 1) * BLOCK_N - (keys - queries), 0), BLOCK_M) * BLOCK_M
    whole = tl.minimum(tl.maximum(whole, begin), queries)
    query += b * sqb + g * GROUP * sqh
    lse += b * slb + g * GROUP * slh
    for _ in range(GROUP):
        for low in range(begin, whole, BLOCK_M):
            share += _probabilities(
                query, lse, k, low, queries, first, past, sqt, scale * LOG2_E,
                DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        for low in range(whole, queries, BLOCK_M):
            share += _probabilities(
                query, lse, k, low, queries, first, None, sqt, scale * LOG2_E,
                DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        query += sqh
        lse += slh
    tl.store(received + program * keys + j, tl.sum(share, 0), mask=j < keys)


@triton.jit(do_not_specialize=["keys", "chunk", "splits"])
def _decode_kernel(
    query, key, value, starts, scores, tops, totals, partial,
    sqb, sqh, skb, skh, skt, svb, svh, svt,
    keys, batch, kv_heads, chunk, splits, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys of one key head, for its whole group: logits, maximum, sum, output.

    `starts` holds a first key for each row, and behind these, if BOUNDED, one past the last.
    """
    split, program = _place(splits)
    b = program // kv_heads
    g = program % kv_heads
    member = tl.arange(0, BLOCK_G)
    row = program * GROUP + member  # of [B * Hq]
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
    at = row * splits + split
    tl.store(tops + at, top, mask=member < GROUP)
    tl.store(totals + at, total, mask=member < GROUP)
    tl.store(
        partial + at[:, None] * VALUE_DIM + dv[None, :], acc,
        mask=(member < GROUP)[:, None] & (dv < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["keys", "splits", "blocks", "srb", "srh"])
def _combine_kernel(
    scores, tops, totals, partial, out, received, bounds, sinks,
    srb, srh,
    keys, splits, blocks, batch, kv_heads, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BOUNDED: tl.constexpr, SCORED: tl.constexpr, ADDS: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: what it received; the first block also the output.

    If BOUNDED, `received` is a buffer whose numbers grow (ADDS) or are replaced.
    """
    block, program = _place(blocks)
    b = program // kv_heads
    g = program % kv_heads
    start = tl.load(bounds + b).to(tl.int32) if BOUNDED else 0
    end = tl.load(bounds + batch + b).to(tl.int32) if BOUNDED else keys
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    held = (j >= start) & (j < end)
    dv = tl.arange(0, BLOCK_V)
    split = tl.arange(0, BLOCK_S)
    share = tl.zeros([BLOCK_N], tl.float32)
    for member in range(GROUP):
        row = program * GROUP + member
        at = row * splits + split
        own_top = tl.load(tops + at, mask=split < splits, other=float("-inf"))
        own_total = tl.load(totals + at, mask=split < splits, other=0.0)
        top = tl.max(own_top, 0)
        if SINKS:
            sink = tl.load(sinks + g * GROUP + member).to(tl.float32)
            top = tl.maximum(top, sink)
        weight = tl.exp(own_top - top)
        total = tl.sum(weight * own_total, 0)
        if SINKS:
            total += tl.exp(sink - top)
        if SCORED:
            s = tl.load(scores + row * keys + j, mask=held, other=float("-inf"))
            share += tl.exp(s - top) / total
        if block == 0:
            parts = tl.load(
                partial + at[:, None] * VALUE_DIM + dv[None, :],
                mask=(split < splits)[:, None] & (dv < VALUE_DIM)[None, :], other=0.0,
            )  # fmt: skip
            mixed = tl.sum(weight[:, None] * parts, 0) / total
            tl.store(
                out + row * VALUE_DIM + dv, mixed.to(out.dtype.element_ty), mask=dv < VALUE_DIM
            )
    if SCORED:
        received += b * srb + g * srh + j
        if ADDS:  # the new entry has none yet
            share += tl.load(received, mask=held & (j < end - 1), other=0.0)
        tl.store(received, share, mask=held)


def _block(tensor: Tensor, kib: int, most: int = 128) -> int:
    """Tokens whose vectors take `kib`; all tiles together stay below a small GPU's 99 KiB.

    Args:
        most: tokens; of float32, which has no tensor cores, at most 64: sums of products fill the
            registers then.
    """
    tokens = kib * 1024 // (wide(tensor.shape[-1]) * tensor.element_size())
    return max(16, min(most if tensor.element_size() < 4 else 64, tokens))


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
    _attend_kernel[(triton.cdiv(queries, block) * batch * heads,)](
        query, key, value, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        queries, key.shape[2], heads, scale,
        GROUP=heads // key.shape[1], DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=wide(dim), BLOCK_V=wide(value_dim), BLOCK_M=block, BLOCK_N=_block(key, 8),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return output, lse


@on_device
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
    query, key, value = dense(query), dense(key), dense(value)
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    params = SDPAParams(query, key, value, None, 0.0, False, heads != kv_heads)
    if dim % 8 == 0 and can_use_flash_attention(params):
        output, lse = _flash(query, key, value, scale)
    else:
        output, lse = _attend(query, key, value, scale)
    if sinks is not None:  # a term more of every query's sum
        entries, lse = lse, torch.logaddexp(lse, sinks.float()[:, None])
        output.mul_((entries - lse)[:, :, :queries, None].exp())
    if decay != 1:  # exp(s - lse) of a query times decay to the power of its age
        age = torch.arange(lse.shape[-1] - 1, -1, -1, device=lse.device)
        lse = lse - (age - (lse.shape[-1] - queries)) * math.log(decay)
    received = query.new_empty(batch, kv_heads, keys, dtype=torch.float32)
    block = _block(key, 32)
    _received_kernel[(triton.cdiv(keys, block) * batch * kv_heads,)](
        query, key, lse, received,
        *query.stride()[:3], *key.stride()[:3], *lse.stride()[:2],
        queries, keys, kv_heads, 0 if observe is None else max(0, queries - observe), scale,
        GROUP=heads // kv_heads, DIM=dim,
        BLOCK_D=wide(dim), BLOCK_M=_block(query, 16, 64), BLOCK_N=block,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return output, received


@on_device
def scored_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
    received = query.new_empty(*key.shape[:3], dtype=torch.float32)
    return _decode(query, key, value, scale, starts, received, sinks), received


@on_device
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
    """See :func:`buzz.kernels.step`."""
    write([keys, values, positions], key, value, bounds, 0, 0, bounded=True)
    return _decode(query, keys, values, scale, bounds, scores, sinks, bounded=True, adds=adds)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None,
    received: Tensor | None,
    sinks: Tensor | None,
    bounded: bool = False,
    adds: bool = False,
) -> Tensor:
    """The output; what keys receive goes to `received`, if there is any."""
    query, key, value = dense(query), dense(key), dense(value)
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    value_dim, group = value.shape[-1], heads // kv_heads
    block = _block(key, 8)
    # About 256 programs fill a large GPU.
    splits = max(1, min(triton.cdiv(keys, block), 256 // (batch * kv_heads), MOST_SPLITS))
    chunk = triton.cdiv(triton.cdiv(keys, splits), block) * block
    splits = triton.cdiv(keys, chunk)
    new = query.new_empty
    scores = new(batch, heads, keys, dtype=torch.float32)
    tops, totals = new(2, batch, heads, splits, dtype=torch.float32)
    partial = new(batch, heads, splits, value_dim, dtype=torch.float32)
    output = new(batch, heads, 1, value_dim)
    _decode_kernel[(splits * batch * kv_heads,)](
        query, key, value, starts, scores, tops, totals, partial,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        keys, batch, kv_heads, chunk, splits, scale,
        GROUP=group, PADDED=starts is not None, BOUNDED=bounded, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_G=wide(group), BLOCK_D=wide(dim), BLOCK_V=wide(value_dim), BLOCK_N=block,
        enable_fp_fusion=True,
    )  # fmt: skip
    block = 256
    blocks = 1 if received is None else triton.cdiv(keys, block)
    _combine_kernel[(blocks * batch * kv_heads,)](
        scores, tops, totals, partial, output, received, starts,
        None if sinks is None else dense(sinks),
        *(received.stride()[:2] if received is not None else (0, 0)),
        keys, splits, blocks, batch, kv_heads,
        GROUP=group, VALUE_DIM=value_dim, BOUNDED=bounded, SCORED=received is not None, ADDS=adds,
        SINKS=sinks is not None, BLOCK_V=wide(value_dim), BLOCK_N=block, BLOCK_S=MOST_SPLITS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return output
