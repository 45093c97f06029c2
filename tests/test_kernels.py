"""Every implementation against the full attention matrix, and the build of the C++ one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import interpreter  # noqa: F401  (of Triton: computes with bfloat16)
import pytest
import torch
from tiny import tiny
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from baselines import H2OPolicy
from buzz import attention, kernels
from buzz.errors import ConfigError
from buzz.kernels import cpu, reference
from buzz.kernels.reference import Leading
from buzz.layer import EvictionLayer
from buzz.rope import Rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see the last test
TRITON = importlib.util.find_spec("triton") is not None
GPU = TRITON and torch.cuda.is_available() and not INTERPRETED
compiled = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


@pytest.fixture(params=["reference", "cpu"] + ["triton_scores"] * (GPU or INTERPRETED))
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Each implementation, with its device as the default one."""
    if request.param == "cpu":
        if not cpu.available():
            pytest.skip("no C++ compiler")
        # Also for what is small, and where PyTorch has one; other tests use one.
        monkeypatch.setattr(cpu, "_threads", lambda work: 3)
    with torch.device("cuda" if GPU and request.param == "triton_scores" else "cpu"):
        yield importlib.import_module(f"buzz.kernels.{request.param}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    observe: int | None = None,
    starts: Tensor | None = None,
    decay: float = 1.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in float64, with the whole matrix and with repeated heads."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    visible = visible.expand(batch, 1, queries, keys)
    if starts is not None:
        visible = visible & (torch.arange(keys) >= starts[:, None, None, None])
    logits = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    if sinks is not None:  # what is left of the sum of exponentials for those with values
        weights = weights * (logits.logsumexp(-1, True) - sinks.double()[:, None, None]).sigmoid()
    age = torch.arange(queries - 1, -1, -1)[:, None]
    received = (weights * decay**age)[:, :, queries - (observe or queries) :].sum(2)
    return weights @ value, received.view(batch, kv_heads, -1, keys).sum(2)


with_sinks = pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])


def drawn_sinks(sunk: bool, heads: int = 4) -> Tensor | None:
    """Of each head one: from what takes next to nothing to what takes nearly all."""
    return torch.linspace(-4, 8, heads) if sunk else None


def draw(
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    q: int,
    n: int,
    dim: int = 64,
    vdim: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views such as a cache gives: a transposed query, keys and values inside a longer buffer."""
    random = seeded(q * 1000 + n)
    query = torch.randn(batch, q, heads, dim, generator=random).transpose(1, 2) * 2
    key = torch.randn(batch, kv_heads, n + 9, dim, generator=random)[:, :, 5 : n + 5]
    value = torch.randn(batch, kv_heads, n + 9, vdim, generator=random)[:, :, 3 : n + 3]
    return query, key, value


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got[0].double(), want[0], atol=tolerance, rtol=tolerance)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].double(), want[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(q=1, n=1),
        dict(q=1, n=77),
        dict(q=7, n=7, heads=3, kv_heads=3),
        dict(q=48, n=48, heads=9, kv_heads=3),
        dict(q=130, n=130, dim=128, vdim=128),
        dict(q=64, n=200, batch=2),
        dict(q=131, n=215, batch=2, heads=4, kv_heads=1, dim=20, vdim=36),
        dict(q=315, n=315, heads=1, kv_heads=1, dim=7, vdim=3),
    ],
    ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
@with_sinks
def test_prefill_equals_the_full_matrix(
    impl: ModuleType, sizes: dict[str, int], sunk: bool
) -> None:
    inputs = draw(**sizes)
    scale, sinks = inputs[0].shape[-1] ** -0.5, drawn_sinks(sunk, inputs[0].shape[1])
    close(impl.scored_prefill(*inputs, scale, sinks=sinks), full(*inputs, scale, sinks=sinks))


def test_nobody_needs_to_be_observed(impl: ModuleType) -> None:
    inputs = draw(q=315, n=400)
    output, received = impl.scored_prefill(*inputs, 0.125, observe=0)
    close((output, received), (full(*inputs, 0.125)[0], torch.zeros(1, 2, 400).double()))


@pytest.mark.parametrize("observe", [1, 100, 150])
def test_only_the_observed_queries_count(impl: ModuleType, observe: int) -> None:
    inputs = draw(q=150, n=170)
    close(impl.scored_prefill(*inputs, 0.125, observe=observe), full(*inputs, 0.125, observe))


@pytest.mark.parametrize(
    ("decay", "observe", "sunk"),
    [(0.9, None, False), (0.98, 100, True), (0.5, None, True), (0.9, 1, False)],
)
def test_queries_count_less_the_older_they_are(
    impl: ModuleType, decay: float, observe: int | None, sunk: bool
) -> None:
    inputs, options = draw(q=150, n=170, batch=2), {"decay": decay, "sinks": drawn_sinks(sunk)}
    got = impl.scored_prefill(*inputs, 0.125, observe=observe, **options)
    close(got, full(*inputs, 0.125, observe, **options))


def test_without_memory_the_last_query_alone_counts() -> None:
    inputs = draw(q=150, n=170)
    close(kernels.scored_prefill(*inputs, 0.125, decay=0.0), full(*inputs, 0.125, 1))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n=1),
        dict(n=130, heads=9, kv_heads=3),
        dict(n=317, batch=2, heads=4, kv_heads=4, dim=128, vdim=80),
        dict(n=63, heads=8, kv_heads=1, dim=7, vdim=19),
    ],
    ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
@with_sinks
def test_decode_equals_the_full_matrix(impl: ModuleType, sizes: dict[str, int], sunk: bool) -> None:
    inputs = draw(q=1, **sizes)
    sinks = drawn_sinks(sunk, inputs[0].shape[1])
    close(impl.scored_decode(*inputs, 0.3, sinks=sinks), full(*inputs, 0.3, sinks=sinks))


@with_sinks
def test_decode_skips_what_precedes_a_shorter_row(impl: ModuleType, sunk: bool) -> None:
    inputs, sinks = draw(batch=3, q=1, n=90), drawn_sinks(sunk)
    starts = torch.tensor([0, 89, 37])
    want = full(*inputs, 0.125, starts=starts, sinks=sinks)
    close(impl.scored_decode(*inputs, 0.125, starts, sinks), want)


@pytest.mark.parametrize("sink", [None, 400.0, -400.0])
def test_huge_logits_stay_finite(impl: ModuleType, sink: float | None) -> None:
    query, key, value = draw(q=100, n=100)
    key[:, :, 0] *= 100  # logits in the hundreds and of both signs
    sinks = None if sink is None else torch.full((4,), sink)
    for kernel, last in ((impl.scored_prefill, query), (impl.scored_decode, query[:, :, -1:])):
        want = full(last, key, value, 1.0, sinks=sinks)
        # A logit of 500 is known to 3e-5 in float32.
        close(kernel(last, key, value, 1.0, sinks=sinks), want, 3e-4)


def test_maxima_that_rise_along_the_prompt(impl: ModuleType) -> None:
    query, key, value = draw(q=500, n=600)
    key *= torch.linspace(0, 8, 600)[:, None]  # later keys outweigh what was summed before
    want = full(query, key, value, 0.5)
    close(impl.scored_prefill(query, key, value, 0.5), want, 2e-4)
    for row in (query, key, value):
        row.neg_()
    close(impl.scored_prefill(query, key, value, 0.5), (-want[0], want[1]), 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(q=150, n=150),
        dict(q=131, n=331, batch=2, heads=4, kv_heads=1, dim=20, vdim=36),
        dict(q=315, n=315, heads=1, kv_heads=1, dim=7, vdim=3),
        dict(q=1, n=301, batch=2, heads=6, kv_heads=2, dim=80, vdim=19),
    ],
    ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
@with_sinks
def test_half_precision_is_summed_in_float32(
    impl: ModuleType, dtype: torch.dtype, sizes: dict[str, int], sunk: bool
) -> None:
    inputs = tuple(x.to(dtype) for x in draw(**sizes))
    sinks = torch.linspace(-4, 8, inputs[0].shape[1]).to(dtype) if sunk else None
    want = full(*inputs, 0.125, sinks=sinks)
    kernels = [impl.scored_prefill, impl.scored_decode][: 2 if sizes["q"] == 1 else 1]
    for kernel in kernels:
        output, received = kernel(*inputs, 0.125, sinks=sinks)
        assert output.dtype == dtype and received.dtype == torch.float32
        torch.testing.assert_close(output.double(), want[0], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(received.double(), want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_nothing_quadratic_is_held() -> None:
    # What one head's matrix would take at 8,192 tokens is 256 MiB; the process gets 96 more.
    code = """
import resource, torch
from buzz.kernels import cpu, reference
implementations = [reference, cpu] if cpu.available() else [reference]
x = torch.randn(1, 1, 8192, 8)
for each in implementations:
    each.scored_prefill(x[:, :, :99], x[:, :, :99], x[:, :, :99], 1.0)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 96 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for each in implementations:
    each.scored_prefill(x, x, x, 1.0)
    print("scored")
try:
    torch.empty(8192, 8192)
except RuntimeError:
    print("no room for a matrix")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scored = ["scored"] * (1 + cpu.available())
    assert done.stdout.splitlines() == [*scored, "no room for a matrix"]


def test_repeated_runs_agree_to_the_bit(impl: ModuleType) -> None:
    inputs = draw(q=100, n=100)
    first, second = (impl.scored_prefill(*inputs, 0.125)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("padding", [None, [0, 7]])
@pytest.mark.parametrize("scored", [True, False])
def test_append_writes_one_slot(impl: ModuleType, scored: bool, padding: list[int] | None) -> None:
    if impl is cpu:
        pytest.skip("served by the reference")
    random = seeded(0)
    buffers = [
        torch.randn(2, 3, 12, 20, generator=random)[:, :, 1:],
        torch.randn(2, 3, 11, 5, generator=random),
        torch.full((2, 3, 11), 3, dtype=torch.int32),
        torch.rand(2, 3, 11, generator=random),
    ][: 3 + scored]
    key, value = torch.randn(2, 3, 1, 20), torch.randn(2, 3, 1, 5)
    want = [tensor.clone() for tensor in buffers]
    want[0][:, :, 6:7], want[1][:, :, 6:7] = key, value
    want[2][:, :, 6] = 41 - torch.tensor(padding or [0, 0])[:, None]
    for tensor in want[3:]:
        tensor[:, :, 6] = 0
    impl.append(buffers, key, value, 6, 41, None if padding is None else torch.tensor(padding))
    assert all(torch.equal(x, y) for x, y in zip(buffers, want, strict=True))


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@with_sinks
def test_a_step_appends_attends_and_scores(
    impl: ModuleType, scored: bool, adds: bool, dtype: torch.dtype, sunk: bool
) -> None:
    random, sinks = seeded(0), drawn_sinks(sunk)
    query, key, value = (x.to(dtype) for x in draw(batch=2, q=1, n=1, vdim=36))
    buffers = [
        torch.randn(2, 2, 320, 64, generator=random).to(dtype),
        torch.randn(2, 2, 320, 36, generator=random).to(dtype),
        torch.zeros(2, 2, 320, dtype=torch.int32),
        torch.rand(2, 2, 320, generator=random),
    ]
    bounds = torch.tensor([[3, 170], [300, 300], [500, 131]])
    want = [tensor.clone() for tensor in buffers]
    want[0][:, :, 299], want[1][:, :, 299] = key[:, :, 0], value[:, :, 0]
    want[2][0, :, 299], want[2][1, :, 299], want[3][:, :, 299] = 500, 131, 0
    starts = torch.tensor([0, 167])
    output, received = full(
        query, want[0][:, :, 3:300], want[1][:, :, 3:300], 0.125, starts=starts, sinks=sinks
    )
    for row, start in enumerate((3, 170)):
        held = want[3][row, :, start:300]
        held.copy_(held * adds + received[row, :, start - 3 :])
    scores = buffers[3] if scored else None
    got = impl.step(query, key, value, *buffers[:3], scores, bounds, 0.125, adds, sinks)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), output, atol=tolerance, rtol=tolerance)
    assert got.dtype == dtype
    assert all(torch.equal(x, y) for x, y in zip(buffers[:3], want, strict=False))
    for row, start in enumerate((3, 170) if scored else ()):
        torch.testing.assert_close(
            buffers[3][row, :, start:300], want[3][row, :, start:300], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_move_turns_keys_and_survives_overlap(
    impl: ModuleType, in_place: bool, interleaved: bool, rows: list[int] | None
) -> None:
    random = seeded(0)
    batch, heads, capacity, dim, half, to, k = 3, 2, 40, 12, 4, 10, 14
    source = [
        torch.randn(batch, heads, capacity + 2, dim, generator=random)[:, :, 1:-1],
        torch.randn(batch, heads, capacity, 5, generator=random),
        torch.arange(capacity, dtype=torch.int32).repeat(batch, heads, 1),
    ]
    target = source if in_place else [torch.zeros_like(tensor) for tensor in source]
    chosen = list(range(batch)) if rows is None else rows
    picks = [torch.randperm(to + k, generator=random)[:k].sort().values for _ in chosen * heads]
    index = torch.stack(picks).view(len(chosen), heads, k)
    index = torch.minimum(index, to + torch.arange(k))  # entries only move towards the newest
    angle = torch.rand(half, generator=random).double() * torch.arange(to + k)[:, None]

    before = [tensor.clone() for tensor in source]
    want = [tensor.clone() for tensor in target]
    for r, row in enumerate(chosen):
        for h in range(heads):
            for i in range(k):
                slot = int(index[r, h, i])
                for old, new in zip(before, want, strict=True):
                    new[row, h, to + i] = old[row, h, slot]
                key = before[0][row, h, slot].double()
                pairs = key[: 2 * half]
                pairs = pairs.view(half, 2).T if interleaved else pairs.view(2, half)
                turn = torch.polar(torch.ones((), dtype=torch.float64), angle[to + i - slot])
                turned = torch.complex(*pairs) * turn
                turned = torch.stack([turned.real, turned.imag], 1 if interleaved else 0)
                want[0][row, h, to + i, : 2 * half] = turned.flatten().float()

    at = None if rows is None else torch.tensor(rows)
    table = angle.cos(), angle.sin()
    impl.move(source, target, index, to, to, table, rows=at, interleaved=interleaved)
    torch.testing.assert_close(target[0], want[0], atol=1e-6, rtol=0)
    # Rounded once: what float32 cosines would add comes again with every eviction.
    assert (target[0] == want[0]).float().mean() > 0.99
    assert torch.equal(target[1], want[1]) and torch.equal(target[2], want[2])


@compiled
@pytest.mark.parametrize("strided", [False, True])
def test_moves_of_several_stores_are_one_call(strided: bool) -> None:
    """As one by one: neighbours that move together, some that stay, one store into another."""
    random, angle = seeded(1), torch.arange(50)[:, None] * torch.rand(4, dtype=torch.float64)

    def store() -> list[Tensor]:
        wide = torch.randn(1, 2, 30, 16, generator=random)
        keys = wide[..., :8] if strided else wide[..., :8].contiguous()
        return [keys, torch.randn(1, 2, 30, 3, generator=random), torch.randn(1, 2, 30)]

    first, second, third, fourth = (store() for _ in range(4))
    one_leaves = torch.tensor([5, 6, 7, 9, 10, 11, 12]).expand(1, 2, -1)
    last = torch.tensor([2, 3, 4, 20, 21, 29]).expand(1, 2, -1)
    moves = [
        kernels.Move(first, first, one_leaves, 6, 6, (angle.cos(), angle.sin())),
        kernels.Move(second, third, last, 0, 24, (angle.cos(), angle.sin())),
        kernels.Move(fourth, fourth, one_leaves, 6, 6),
    ]
    every = [tensor for tensors in (first, second, third, fourth) for tensor in tensors]
    before = [tensor.clone() for tensor in every]
    for move in moves:
        reference.move(**vars(move))
    want = [tensor.clone() for tensor in every]
    for tensor, old in zip(every, before, strict=True):
        tensor.copy_(old)
    kernels.move_all(moves)
    for tensor, expected in zip(every, want, strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)
    assert not torch.equal(want[0], before[0]) and not torch.equal(want[6], before[6])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@with_sinks
def test_a_token_of_rows_that_lie_apart(dtype: torch.dtype, sunk: bool) -> None:
    """Each row as a step of its own buffers, of its own length and type; some without scores."""
    random, bounds = seeded(2), [(0, 1), (3, 20), (0, 40), (11, 33)]
    sinks = drawn_sinks(sunk, heads=6)
    query = torch.randn(4, 6, 1, 16, generator=random).to(dtype)
    key, value = (torch.randn(4, 2, 1, dim, generator=random).to(dtype) for dim in (16, 8))
    rows, want, stores = [], [], []
    for row, (start, end) in enumerate(bounds):
        capacity = end + row
        store = [torch.randn(1, 2, capacity, dim, generator=random).to(dtype) for dim in (16, 8)]
        if is_int8 := row in (1, 3):
            store = [kernels.quantized(tensor) for tensor in store]
        store += [torch.zeros(1, 2, capacity, dtype=torch.int32), torch.rand(1, 2, capacity)]
        own, adds = slice(row, row + 1), row != 2
        expected = [tensor.clone() for tensor in store]
        scores = None if row == 1 else expected[3]
        at = torch.tensor([[start], [end], [70 + row]])
        step = reference.step(
            query[own], key[own], value[own], *expected[:3], scores, at, 0.25, adds, sinks
        )
        want.append(step)
        address = 0 if row == 1 else store[3].data_ptr()
        places = [tensor.data_ptr() for tensor in store[:3]]
        rows.append((*places, address, capacity, start, end, 70 + row, adds, is_int8))
        stores.append((store, expected, start, end))
    found = kernels.step_rows(query, key, value, rows, 0.25, sinks)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, torch.cat(want), **close)
    for store, expected, start, end in stores:
        for tensor, other in zip(store, expected, strict=True):
            torch.testing.assert_close(
                tensor[:, :, start:end], other[:, :, start:end], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 2]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leading_keys_are_turned_from_how_they_came(
    impl: ModuleType, rows: list[int] | None, interleaved: bool, dtype: torch.dtype
) -> None:
    """One entry leaves in each of three steps: keys are as if turned once."""
    if impl is cpu and dtype == torch.float16:
        pytest.skip("served by the reference")
    random, half, seen = seeded(0), 4, 3_000_000  # angles of many turns
    chosen = list(range(3)) if rows is None else rows
    at = None if rows is None else torch.tensor(rows)
    frequencies = torch.rand(half, generator=random)
    keys = torch.randn(3, 2, 40, 12, generator=random).to(dtype)
    store = [keys, keys[..., :5].clone(), torch.zeros(3, 2, 40, dtype=torch.int32)]
    came, known, held = keys[:, :, :30].clone(), None, 30
    names = torch.arange(30).expand(len(chosen), 2, 30)
    for leaves in (7, 0, 3):
        stay = torch.arange(held)
        stay = stay[stay != leaves].expand(len(chosen), 2, held - 1)
        first, kept = 30 - held, held - 1
        lead = stay[..., :20]
        known = impl.originals(store[0], lead, first, seen - held, known, rows=at)
        leading = Leading(*known, seen - kept, frequencies)
        angle = torch.arange(2)[:, None] * frequencies.double()
        impl.move(
            store, store, first + stay, 30 - kept, first + 1, (angle.cos(), angle.sin()),
            rows=at, interleaved=interleaved, leading=leading,
        )  # fmt: skip
        names, held = names.gather(2, stay), kept
    moved = torch.arange(3, 23) - names[..., :20]  # from where it came to where it is
    angle = moved[..., None] * frequencies.double()
    batch = torch.tensor(chosen)[:, None, None]
    want = came[batch, torch.arange(2)[:, None], names[..., :20]].double()
    want = reference.rotate(want, angle.cos(), angle.sin(), interleaved)
    got = store[0][chosen, :, 3:23].double()
    tolerance = 2e-3 if dtype == torch.float16 else 1e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not GPU and not INTERPRETED, reason="test_rope has it of the others")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_keys_that_stay_do_not_drift_with_triton_scores(
    dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four keys that an eviction turns by one position each time, and once exactly."""
    triton_scores = importlib.import_module("buzz.kernels.triton_scores")
    monkeypatch.setattr(kernels, "implementation", lambda _: triton_scores)
    device = "cuda" if GPU else "cpu"
    rotary = tiny("llama").get_decoder().rotary_emb.to(device)
    layer = EvictionLayer(H2OPolicy(heavy=4, recent=2), Rope(rotary))
    came = torch.randn(1, 1, steps, 16, generator=seeded(0)).to(device, dtype)
    with torch.inference_mode():
        for key in came.split(1, 2):
            layer.update(key, key)
            layer.after_attention((layer.view(layer.store.positions) < 4).float())
    kept = layer.view(layer.store.positions)[0, 0].tolist()
    assert kept == [0, 1, 2, 3, steps - 2, steps - 1] and layer.evictions == [steps - 6]
    angle = (steps - 6) * rotary.inv_freq.double()
    exact = reference.rotate(came[:, :, :4].double(), angle.cos(), angle.sin())
    error = (layer.view(layer.store.keys)[:, :, :4].double() - exact).abs().max()
    assert error < {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@compiled
@pytest.mark.parametrize("position", [0, 40_000])
def test_keys_turned_by_large_angles_are_as_exact_as_the_reference(
    impl: ModuleType, position: int
) -> None:
    random = seeded(0)
    source = torch.randn(1, 3, 200, 128, generator=random).bfloat16()
    where = torch.randint(0, 50_000, (1, 3, 200), generator=random)
    frequencies = 10_000 ** -(torch.arange(64) / 64)
    leading = Leading(source, where, position, frequencies)
    index = torch.arange(200).expand(1, 3, 200)
    found = []
    for implementation in (impl, reference):
        tensors = [torch.zeros_like(source), torch.zeros_like(source), torch.zeros(1, 3, 200)]
        implementation.move(tensors, tensors, index, 0, 0, None, leading=leading)
        found.append(tensors[0])
    differ = (found[0] != found[1]).float().mean()  # by a rounding to the other side
    assert differ < 2e-3
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=2**-7)


@pytest.mark.skipif(not INTERPRETED, reason="on a card it takes 14 GB: make gpu-check")
@pytest.mark.parametrize("what", ["prompt", "token", "append", "move", "originals"])
def test_offsets_of_triton_scores_are_of_64_bits(what: str) -> None:
    """Ten tokens 2^28 elements apart, of which only what is used is ever in memory."""
    triton_scores = importlib.import_module("buzz.kernels.triton_scores")
    tokens, heads, dim, apart = 10, 2, 16, 2**28
    try:
        memory = torch.empty((tokens - 1) * apart + heads * dim, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("5 GB of addresses are not to be had")
    far = memory.as_strided((1, heads, tokens, dim), (0, dim, apart, 1))
    far.copy_(torch.randn(far.shape, generator=seeded(0)))
    query = torch.randn(1, 4, tokens, dim, generator=seeded(1)).half()
    entry = query[:, :2, :1]
    positions = torch.arange(tokens, dtype=torch.int32).repeat(1, heads, 1)
    index = torch.tensor([0, 2, 3, 8]).repeat(1, heads, 1)
    found = []
    for module, keys in ((reference, far.clone()), (triton_scores, far)):
        buffers = [keys, keys.clone() if module is reference else far, positions.clone()]
        if what == "prompt":
            found.append(module.scored_prefill(query, keys, keys, 0.25))
        elif what == "token":
            found.append(module.scored_decode(query[:, :, :1], keys, keys, 0.25))
        elif what == "originals":
            found.append(module.originals(keys, index, 0, 0))
        elif what == "append":
            module.append(buffers, entry, entry, 9, 9)
            found.append([tensor.clone() for tensor in buffers])
        else:
            target = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in buffers]
            module.move(buffers, target, index, 6, 6)
            found.append(target)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=2e-3, rtol=2e-3)


def test_gradients_take_the_reference() -> None:
    query, key, value = draw(q=20, n=20)
    query.requires_grad_()
    assert kernels.implementation(query) is reference
    output, received = kernels.scored_prefill(query, key, value, 0.125)
    (output.sum() + received.square().sum()).backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


def test_an_implementation_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    monkeypatch.setenv("BUZZ_KERNELS", "reference")
    assert kernels.implementation(tensor) is reference
    for name in ("triton", "cuda"):  # not for this device; not a name
        monkeypatch.setenv("BUZZ_KERNELS", name)
        with pytest.raises(ConfigError, match="BUZZ_KERNELS"):
            kernels.implementation(tensor)


@pytest.mark.parametrize("q, n, heads, kv_heads", [(5, 4, 2, 2), (3, 4, 3, 2)])
def test_shapes_that_do_not_fit_are_refused(q: int, n: int, heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        kernels.scored_prefill(*draw(q=q, n=n, heads=heads, kv_heads=kv_heads), 1.0)
    with pytest.raises(ValueError, match="2 query heads"):
        kernels.scored_decode(*draw(q=1, n=n, heads=2), 1.0, sinks=torch.zeros(3))


def test_without_a_compiler_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no-such-compiler"):
            assert kernels.implementation(torch.zeros(1)) is reference
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.implementation(torch.zeros(1)) is reference
    finally:
        cpu.library.cache_clear()


@compiled
def test_two_build_at_once_and_a_third_finds_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUZZ_CACHE", str(tmp_path))
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: cpu.build(), range(2))
    assert [first] == [second] == list(tmp_path.iterdir())
    stamp = first.stat().st_mtime_ns
    assert cpu.build().stat().st_mtime_ns == stamp


def test_a_chunk_without_scores_needs_no_matrix_of_its_own() -> None:
    """Aligned at the bottom right, which flash attention serves where a device has it."""
    query, key, value = draw(q=7, n=30, heads=2, kv_heads=2)
    bias = attention._mask("sdpa", query, key, None)
    assert isinstance(bias, CausalBias)
    got = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=0.125)
    expected = full(query, key, value, 0.125)[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


@triton
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is the current one: Triton would take that."""
    module = importlib.import_module("buzz.kernels.triton_scores")
    current: list[int] = []
    launched: list[str] = []

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            current.append(id(self.tensor))

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(first: Tensor, *_: object, **__: object) -> None:
                assert current, f"{self.name} is launched on any device"
                launched.append(self.name)

            return launch

    parts = module, importlib.import_module("buzz.kernels.triton_entries")
    kernels_of = {name: part for part in parts for name in vars(part) if name.endswith("_kernel")}
    for name, part in kernels_of.items():
        monkeypatch.setattr(part, name, Kernel(name))
    monkeypatch.setattr(module.torch.cuda, "device_of", Guard)
    query, key, value = draw(q=20, n=20, dim=7, vdim=3)
    module.scored_prefill(query, key, value, 1.0)
    module.scored_decode(query[:, :, :1], key, value, 1.0)
    store = [key, value, torch.zeros(1, 2, 20, dtype=torch.int32)]
    bounds = torch.tensor([[0], [20], [19]])
    module.step(query[:, :, :1], key[:, :, :1], value[:, :, :1], *store, None, bounds, 1.0, True)
    module.originals(key, torch.zeros(1, 2, 1, dtype=torch.int64), 0, 0)
    module.append(store, key[:, :, :1], value[:, :, :1], 3, 3)
    module.move(store, store, torch.zeros(1, 2, 1, dtype=torch.int64), 2, 2)
    assert set(launched) == set(kernels_of) and not current


@triton
def test_flash_attention_still_returns_what_triton_needs() -> None:
    # The operator is internal to PyTorch; on "meta" its signature and shapes show without a GPU.
    query = torch.empty(2, 8, 100, 64, device="meta", dtype=torch.float16)
    key = torch.empty(2, 2, 300, 64, device="meta", dtype=torch.float16)
    module = importlib.import_module("buzz.kernels.triton_scores")
    output, logsumexp = module._flash(query, key, key, 0.125)
    assert output.shape == query.shape
    assert logsumexp.shape[:2] == (2, 8) and logsumexp.shape[2] >= 100
    assert logsumexp.dtype == torch.float32


@triton
def test_triton_in_the_interpreter() -> None:
    # A process of its own: Triton decides between compiler and interpreter when it is imported.
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-qx",
            "-k",
            "triton_scores",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
