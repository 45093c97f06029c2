"""Memory in use and its peak, of a CUDA device or of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, EvictionCache
from buzz.adapter import entries_of

_read: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, EvictionCache]] = (
    weakref.WeakKeyDictionary()
)


def reset_memory_peak(device: torch.device) -> None:
    """Start over measuring the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # On Linux VmHWM starts again from the present resident size (proc(5)). Elsewhere the peak
        # is that of the process over all its samples.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def memory_peak(device: torch.device) -> int:
    """Bytes allocated on the device (CUDA), or resident in this process (CPU), at the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # elsewhere than on Linux
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use(device: torch.device) -> int:
    """As :func:`memory_peak`, now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def free_nbytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (CUDA), or on this machine (CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def row_nbytes(model: PreTrainedModel, held: int, seen: int, dtype: Any = None) -> int:
    """Bytes of a row's keys, values and recurrent states over all layers.

    The model reads one token, once per model, to find the bytes of each layer: layers may differ.

    Args:
        held: entries of each layer that evicts.
        seen: tokens read, of which other layers hold what their windows leave.
        dtype: of entries, see :class:`buzz.EvictionCache`.
    """
    known = _read.setdefault(model, {})
    cache = known.get(dtype)
    if cache is None:
        cache = EvictionCache(model, FullPolicy(), positions="true", dtype=dtype)
        known[dtype] = cache
        given: dict[str, Any] = {CACHE_ARGUMENT: cache}
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **given)
    other: list[Any] = cache.stock.layers
    windows = [
        min(seen, layer.sliding_window - 1) * tensor.nbytes
        for layer in other
        for tensor in entries_of(layer)
    ]
    return held * cache.entry_nbytes + sum(windows) + cache.window_nbytes(seen=0)
