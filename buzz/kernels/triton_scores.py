"""Scored attention in Triton for CUDA.

Prefill takes two kernels. The first gives the output and the log-sum-exp of every query: PyTorch's
flash attention where it can serve the inputs, else :func:`_attend_kernel`. The second recomputes
the probabilities from the log-sum-exp, block by block, and sums them over the queries: each program
owns a block of keys, so nothing is added up atomically and results repeat to the bit.

Decoding splits the keys over programs (as in flash-decoding); a small second kernel normalises.

What has run: the kernels in Triton's interpreter on the CPU, against the full matrix, and Triton's
compiler for compute capability 8.0 and 9.0. Nothing here has run, been timed or tuned on a GPU yet;
that includes PyTorch's flash attention and its log-sum-exp.
"""

# mypy: disallow-untyped-defs=False
# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention


@triton.jit
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


@triton.jit
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
    keys, kv_heads, chunk, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys of one key head, for its whole group: logits, maximum, sum, output."""
    split = tl.program_id(0)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    member = tl.arange(0, BLOCK_G)
    row = tl.program_id(1).to(tl.int64) * GROUP + member  # of [B * Hq]
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    start = tl.load(starts + b).to(tl.int32) if PADDED else 0
    q = tl.load(
        query + b * sqb + (g * GROUP + member)[:, None] * sqh + d[None, :],
        mask=(member < GROUP)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    key += b * skb + g * skh
    value += b * svb + g * svh
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for low in range(split * chunk, tl.minimum(keys, (split + 1) * chunk), BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)
        valid = (j < keys) & (j >= start)
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


@triton.jit(do_not_specialize=["keys"])
def _combine_kernel(
    scores, tops, totals, partial, out, received,
    keys, splits, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: what it received; the first block also the output."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
        s = tl.load(scores + row * keys + j, mask=j < keys, other=float("-inf"))
        share += tl.exp(s - top) / total
        if tl.program_id(0) == 0:
            mixed = (acc / total).to(out.dtype.element_ty)
            tl.store(out + row * VALUE_DIM + dv, mixed, mask=dv < VALUE_DIM)
    tl.store(received + tl.program_id(1).to(tl.int64) * keys + j, share, mask=j < keys)


@triton.jit
def _gather_kernel(
    keys, values, index, cosine, sine, new_keys, new_values,
    skb, skh, skt, svb, svh, svt,
    count, heads, shift,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of kept entries of one head, rotated, to dense buffers [B, H, count, :]."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * count + i
    inside = (i < count)[:, None]
    source = tl.load(index + row, mask=i < count, other=0)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    # x cos - y sin in the first half, y cos + x sin in the second, the rest as it is.
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    turned = inside & (d < 2 * HALF)[None, :]
    angle = (d % HALF)[None, :]
    turn = (shift + i - source)[:, None] * HALF + angle
    c = tl.load(cosine + turn, mask=turned, other=1.0)
    s = tl.load(sine + turn, mask=turned, other=0.0)
    s = tl.where((d < HALF)[None, :], -s, s)
    base = keys + b * skb + h * skh + source[:, None] * skt
    mask = inside & (d < DIM)[None, :]
    x = tl.load(base + d[None, :], mask=mask, other=0.0).to(c.dtype)
    y = tl.load(base + partner[None, :], mask=mask, other=0.0).to(c.dtype)
    tl.store(
        new_keys + row[:, None] * DIM + d[None, :],
        (x * c + y * s).to(new_keys.dtype.element_ty), mask=mask,
    )  # fmt: skip
    mask = inside & (dv < VALUE_DIM)[None, :]
    moved = tl.load(values + b * svb + h * svh + source[:, None] * svt + dv[None, :], mask=mask)
    tl.store(new_values + row[:, None] * VALUE_DIM + dv[None, :], moved, mask=mask)


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


def scored_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    observe: int | None = None,
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


def scored_decode(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
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
    received = new(batch, kv_heads, keys, dtype=torch.float32)
    _decode_kernel[(splits, batch * kv_heads)](
        query, key, value, starts, scores, tops, totals, partial,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        keys, kv_heads, chunk, scale,
        GROUP=group, PADDED=starts is not None, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_G=_wide(group), BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim), BLOCK_N=block,
    )  # fmt: skip
    block = 256
    _combine_kernel[(triton.cdiv(keys, block), batch * kv_heads)](
        scores, tops, totals, partial, output, received, keys, splits,
        GROUP=group, VALUE_DIM=value_dim, BLOCK_V=_wide(value_dim), BLOCK_N=block,
    )  # fmt: skip
    return output, received


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
) -> None:
    """See :func:`buzz.kernels.move`; whole batches with half-split pairs only."""
    assert turns is not None and rows is None and not interleaved
    # Through dense buffers: programs run in any order, so that none may write where another reads.
    keys, values = source[:2]
    batch, heads, count = index.shape
    dim, value_dim, half = keys.shape[-1], values.shape[-1], turns[0].shape[-1]
    cos, sin = (table.contiguous() for table in turns)
    new_keys = keys.new_empty(batch, heads, count, dim)
    new_values = values.new_empty(batch, heads, count, value_dim)
    block = 32
    _gather_kernel[(triton.cdiv(count, block), batch * heads)](
        keys, values, index.contiguous(), cos, sin, new_keys, new_values,
        *keys.stride()[:3], *values.stride()[:3],
        count, heads, shift,
        DIM=dim, VALUE_DIM=value_dim, HALF=half,
        BLOCK_D=_wide(dim), BLOCK_V=_wide(value_dim), BLOCK_N=block,
    )  # fmt: skip
    moved = [new_keys, new_values, *(tensor.gather(2, index) for tensor in source[2:])]
    for tensor, entries in zip(target, moved, strict=True):
        tensor[:, :, to : to + count] = entries
