"""A sample that fails costs no other: its memory is given back and its record says what it was."""

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

# What running out of memory is called where it has no exception of its own.
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


# The environment variable by which a command line asks for them.
TRACEBACKS = "BUZZ_TRACEBACKS"


def show_tracebacks() -> bool:
    """Whether HYDRA_FULL_ERROR=1 was given: what went wrong is shown in full."""
    return os.environ.get(TRACEBACKS) == "1"


class LengthMismatch(RuntimeError):
    """The cache did not do what its policy says: the measurements would be of something else."""


class NotFinite(ArithmeticError):
    """NaN or infinite logits, of which greedy decoding would make some token all the same."""

    def __init__(self, what: str, step: int, dtype: torch.dtype) -> None:
        remedy = "; try bfloat16 or float32" if dtype == torch.float16 else ""
        name = str(dtype).removeprefix("torch.")
        super().__init__(f"{what} not finite at step {step} (model.dtype={name}{remedy})")


def attempt(
    rows: list[Row], work: Callable[[list[Row]], list[Record]], device: torch.device
) -> list[Record]:
    """Records of all rows; a batch that fails is tried again in halves, down to single rows.

    That takes less memory, and finds the row that is to blame. A row that fails alone gets
    :func:`fault` for a record.

    Args:
        work: makes the rows' records.

    Raises:
        ConfigError, LengthMismatch, RunFailed: which no smaller batch would mend.
    """
    try:
        return work(rows)
    except (ConfigError, LengthMismatch, RunFailed):
        raise
    except Exception as error:
        found = fault(error, device)
        if show_tracebacks():
            traceback.print_exc()
    # The exception held the cache, by its traceback; only out here is it gone.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(rows) == 1:
        return [found]
    half = len(rows) // 2
    return attempt(rows[:half], work, device) + attempt(rows[half:], work, device)


def fault(error: Exception, device: torch.device) -> Record:
    """What went wrong, to be called while the failed attempt still holds its memory.

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
    """Whether that is what an exception means."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in SIGNS)


def asked_nbytes(error: Exception) -> int | None:
    """The bytes that could not be had, where the message of torch or NumPy tells."""
    match = ASKED.search(str(error))
    return round(float(match[1]) * UNITS[match[2]]) if match else None
