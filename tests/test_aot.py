"""The Triton kernels as machine code, which needs no card: what a result would never show.

Registers that overflow into memory, copies of a few bytes, products without tensor cores and
kernels that are compiled anew give the right numbers, and take a multiple of the time.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)

import aot

from buzz.kernels import triton_scores as own
from buzz.kernels.reference import Leading

STACK = 64  # bytes of a thread, as sines need
SHARED = 99 * 1024  # bytes, what the smallest cards have for a block
BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
# Bits in shared memory are set and cleared where sm_100 takes and gives back tensor memory.
ATOMIC = r"ATOM(?!S\.(OR|AND)).*|RED[.G].*|RED"
ATTENDING = ("_attend_kernel", "_received_kernel", "_decode_kernel")
MOVING = ("_move_kernel", "_originals_kernel")
AXES = (80, 90, 100, 120), (BFLOAT, HALF, SINGLE), (64, 128, 256), (1, 4)


def shapes() -> list[Any]:
    """All cards, types, head sizes and groups; all but a third of the older cards' are slow.

    Of each two of the four that third has every pair.
    """
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in AXES)):
        target, dtype, dim, group = each = [axis[at] for axis, at in zip(AXES, places, strict=True)]
        quick = target <= 90 and sum(places) % 3 == 0
        name = f"sm_{target}-{str(dtype)[6:]}-{dim}-{group}"
        found.append(pytest.param(*each, id=name, marks=[] if quick else pytest.mark.slow))
    return found


def stored(dtype: torch.dtype, dim: int, heads: int = 8, capacity: int = 704) -> list[torch.Tensor]:
    new = torch.empty
    entries = [new(1, heads, capacity, dim, dtype=dtype) for _ in range(2)]
    return [*entries, new(1, heads, capacity, dtype=torch.int32), new(1, heads, capacity)]


def given(dtype: torch.dtype, dim: int, heads: int, tokens: int) -> torch.Tensor:
    """As a model projects it: [1, heads, tokens, dim], a token's heads side by side."""
    return torch.empty(1, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def turned(dtype: torch.dtype, dim: int, entries: int = 280) -> tuple[Any, Any, Leading]:
    """An index, tables of cosines and sines, and leading keys, of an eviction."""
    index = torch.zeros(1, 8, entries, dtype=torch.int64)
    table = torch.empty(512, dim // 2, dtype=torch.float64)
    leading = torch.empty(1, 8, entries, dim, dtype=dtype)
    return index, (table, table), Leading(leading, index, 30_000, torch.empty(dim // 2))


def compiled(target: int, dtype: torch.dtype, dim: int, group: int) -> list[dict[str, Any]]:
    """Figures of each kernel that a prompt, a token, a compiled step and evictions launch."""
    query, key = given(dtype, dim, 8 * group, 4096), given(dtype, dim, 8, 4096)
    one, entry, store = query[:, :, :1], key[:, :, :1], stored(dtype, dim)
    held = [tensor[:, :, 8:568] for tensor in store[:2]]
    bounds = torch.zeros(3, 1, dtype=torch.int64)
    index, table, leading = turned(dtype, dim)
    known = leading.source, index
    calls: list[Callable[[], Any]] = [
        lambda: own.scored_prefill(query, key, key, 0.1),
        lambda: own.scored_decode(one, *held, 0.1, bounds[0]),
        lambda: own.step(one, entry, entry, *store, bounds, 0.1, True),
        lambda: own.append(store, entry, entry, 5, 5),
    ]
    if dtype != SINGLE and dim == 64:  # the size of heads that have sinks
        sinks = torch.empty(8 * group, dtype=dtype)
        calls += [
            lambda: own.scored_prefill(query, key, key, 0.1, sinks=sinks),
            lambda: own.scored_decode(one, *held, 0.1, bounds[0], sinks),
            lambda: own.step(one, entry, entry, *store, bounds, 0.1, True, sinks),
        ]
    if dtype == SINGLE:  # of which no key is kept as it came
        calls += [lambda: own.move(store, store, index, 10, 9, table)]
    else:
        calls += [
            lambda: own.move(store, store, index, 10, 9, table, leading=leading),
            lambda: own.originals(store[0], index, 0, 0, known),
        ]
    with aot.compiling(target) as launches:
        for call in calls:
            call()
    return [aot.figures(launch) for launch in {each.variant: each for each in launches}.values()]


@pytest.mark.parametrize(("target", "dtype", "dim", "group"), shapes())
def test_machine_code_stays_within_its_budget(
    target: int, dtype: torch.dtype, dim: int, group: int, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    found = aot.kept(name, lambda: compiled(target, dtype, dim, group), __file__)
    wrong = []
    for each in found:
        kernel, code = each["kernel"], each["code"]

        def expect(holds: bool, what: str, kernel: str = kernel) -> None:
            if not holds:
                wrong.append(f"{kernel}: {what}")

        def counted(pattern: str, code: dict[str, int] = code) -> int:
            return aot.count(code, pattern)

        expect(each["stack"] <= STACK, f"{each['stack']} bytes of stack")
        expect(each["shared"] <= SHARED, f"{each['shared']} bytes of shared memory")
        expect(aot.warps_at_a_time(each, target) > 0, "not even one block fits")
        expect(counted("LDGSTS.*") == counted("LDGSTS.*128"), "copies of less than 16 bytes")
        expect(not counted(ATOMIC), "atomic operations, whose order is not fixed")
        if kernel in ATTENDING and dtype != SINGLE:
            expect(counted(aot.PRODUCT) > 0, "no tensor cores")
        if kernel in ATTENDING:
            expect(counted("LDGSTS.*|UTMALDG.*") > 0, "nothing is fetched ahead")
        if kernel in MOVING:
            expect(counted(r"STG\..*128") > 0, "entries are not moved by 16 bytes")
            if dtype != SINGLE:
                expect(counted("D(ADD|MUL|FMA|SETP).*") <= dim // 2, "sines in float64")
        if kernel == "_received_kernel":
            expect(each["last_product"] < each["first_shuffle"], "sums across threads in the loop")
    assert not wrong, "; ".join(wrong)
    moving = MOVING[:1] if dtype == SINGLE else MOVING
    kernels = {each["kernel"] for each in found}
    assert kernels == {*ATTENDING, *moving, "_combine_kernel", "_append_kernel"}


def test_quick_tests_pair_each_card_type_head_size_and_group() -> None:
    quick = [param.values for param in shapes() if not param.marks]
    for one, other in itertools.combinations(range(4), 2):
        pairs = itertools.product(*(AXES[at][: 2 if at == 0 else None] for at in (one, other)))
        assert {(values[one], values[other]) for values in quick} == {*pairs}


def test_no_kernel_is_compiled_anew_because_a_length_changed() -> None:
    """Nor because a buffer's capacity did, or how many entries an eviction moves."""
    variants: dict[str, set[str]] = {}
    for held, capacity in ((544, 704), (545, 703), (560, 720), (37, 129)):
        query, entry = given(BFLOAT, 64, 8, held), given(BFLOAT, 64, 8, 1)
        store = stored(BFLOAT, 64, capacity=capacity)
        view = [tensor[:, :, :held] for tensor in store[:2]]
        index, table, leading = turned(BFLOAT, 64, held - 16)
        padding = torch.zeros(1, dtype=torch.int64)
        bounds = torch.zeros(3, 1, dtype=torch.int64)
        with aot.compiling(90) as launches:
            own.scored_prefill(query, query, query, 0.1, observe=held - 3)
            own.scored_decode(entry, *view, 0.1, padding)
            own.append(store, entry, entry, held, held + 3, padding)
            own.originals(store[0], index, held, held, (leading.source, index))
            own.move(store, store, index, held, held + 1, table, leading=leading)
            plain = len(launches)
            own.step(entry, entry, entry, *store, bounds, 0.1, True)
        for number, each in enumerate(launches):
            name = each.kernel + " of a step" * (number >= plain)
            variants.setdefault(name, set()).add(each.compiled.hash)
    assert len(variants) == 10
    assert {name: len(kinds) for name, kinds in variants.items()} == dict.fromkeys(variants, 1)


def test_grids_end_where_cards_do_not() -> None:
    """65,536 pairs of a row and a key head: CUDA's second axis ends one before."""
    batch, heads = 2048, 32
    store = [tensor[:, :1].expand(batch, heads, *tensor.shape[2:]) for tensor in stored(HALF, 16)]
    store = [tensor[:, :, :20] for tensor in store]
    index = torch.zeros(batch, heads, 4, dtype=torch.int64)
    one = store[0][:, :, :1]
    with aot.compiling(80) as launches:
        own.scored_prefill(store[0], store[0], store[0], 0.1)
        own.scored_decode(one, *store[:2], 0.1)
        own.append(store, one, one, 5, 5)
        own.move(store, store, index, 3, 3)
        own.originals(store[0], index, 0, 0)
    assert {each.kernel for each in launches} == {*ATTENDING, *MOVING, "_combine_kernel"} | {
        "_append_kernel"
    }
    for each in launches:
        blocks, *others = each.grid
        assert blocks < 2**31 and all(axis < 2**16 for axis in others), each.kernel


def test_products_and_sums_fuse_whatever_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as a later Triton will have it
    index, table, leading = turned(HALF, 32)
    store, query = stored(HALF, 32), given(HALF, 32, 8, 100)
    with aot.compiling(80) as launches:
        own.scored_prefill(query, query, query, 0.1)
        own.scored_decode(query[:, :, :1], *store[:2], 0.1)
        own.append(store, query[:, :, :1], query[:, :, :1], 5, 5)
        own.move(store, store, index, 10, 9, table, leading=leading)
        own.originals(store[0], index, 0, 0)
    assert all(each.compiled.metadata.enable_fp_fusion for each in launches)
    assert len(launches) == 7
