"""Lets Triton's interpreter compute with bfloat16, which it keeps as uint16 and takes for that."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray


def floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits(numbers: NDArray) -> NDArray[np.uint16]:
    """The nearest, of two the even one."""
    wide = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    nearest = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def numeric(handle: TensorHandle) -> TensorHandle:
        is_bits = handle.dtype.scalar == tl.bfloat16
        return TensorHandle(floats(handle.data), tl.float32) if is_bits else handle

    def cast_numbers(self, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        if kind.scalar == tl.bfloat16 != source.dtype.scalar:
            return TensorHandle(bits(source.data), tl.bfloat16)
        return source if kind.scalar == tl.bfloat16 else cast(self, numeric(source), kind)

    def dot_of_numbers(self, left: TensorHandle, right: TensorHandle, *rest) -> TensorHandle:
        return dot(self, numeric(left), numeric(right), *rest)

    assert interpreter._get_np_dtype(tl.bfloat16) == np.uint16, "Triton does it by itself now"
    InterpreterBuilder.cast_impl = cast_numbers
    InterpreterBuilder.create_dot = dot_of_numbers
