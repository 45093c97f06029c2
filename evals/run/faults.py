"""Samples that fail: the others go on, memory is freed, and the record says what went wrong."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from buzz.errors import ConfigError
from evals.results.folder import RunFailed
from evals.results.record import Record
from evals.run.memory import memory_in_use

Row = TypeVar("Row")

# Messages of out-of-memory errors that have no exception class of their own.
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


TRACEBACKS = "BUZZ_TRACEBACKS"  # environment variable: 1 if the user wants tracebacks


def show_tracebacks() -> bool:
    """Whether the user gave HYDRA_FULL_ERROR=1."""
    return os.environ.get(TRACEBACKS) == "1"


class LengthMismatch(RuntimeError):
    """A cache held another number of entries than its policy's length recurrence says."""


class NotFinite(ArithmeticError):
    """NaN or infinite logits. Greedy decoding would choose a token all the same."""

    def __init__(self, what: str, step: int, dtype: torch.dtype) -> None:
        remedy = "; try bfloat16 or float32" if dtype == torch.float16 else ""
        name = str(dtype).removeprefix("torch.")
        super().__init__(f"{what} not finite at step {step} (model.dtype={name}{remedy})")


def attempt(
    rows: list[Row], work: Callable[[list[Row]], list[Record]], device: torch.device
) -> list[Record]:
    """Records of all rows; a batch that fails is tried again in halves, down to single rows.

    Halves take less memory, and in the end the row that causes the failure is alone. Its record is
    that of :func:`fault`.

    Args:
        work: makes the rows' records.

    Raises:
        ConfigError, LengthMismatch, RunFailed: a smaller batch would not help.
    """
    try:
        return work(rows)
    except (ConfigError, LengthMismatch, RunFailed):
        raise
    except Exception as error:
        found = fault(error, device)
        if show_tracebacks():
            traceback.print_exc()
    # The exception's traceback held the cache; it is gone only here, outside of the except block.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(rows) == 1:
        return [found]
    half = len(rows) // 2
    return attempt(rows[:half], work, device) + attempt(rows[half:], work, device)


def fault(error: Exception, device: torch.device) -> Record:
    """The fields of a record that failed; call it while the attempt still holds its memory.

    Returns:
        status: ``oom`` or ``failed``; error: type and first line of the message; of out-of-memory
        errors also asked_nbytes, where the message tells, and in_use_nbytes.
    """
    text = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    if not out_of_memory(error):
        return {"status": "failed", "error": text}
    return {
        "status": "oom",
        "error": text,
        "asked_nbytes": asked_nbytes(error),
        "in_use_nbytes": memory_in_use(device),
    }


def out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in SIGNS)


def asked_nbytes(error: Exception) -> int | None:
    """The bytes that could not be allocated, where the message of torch or NumPy says so."""
    match = ASKED.search(str(error))
    return round(float(match[1]) * UNITS[match[2]]) if match else None
