"""Memory in use and its peak, of a CUDA device or of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from baselines import FullPolicy
from buzz import EvictionCache


def reset_memory_peak(device: torch.device) -> None:
    """Start over measuring the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux: VmHWM starts again from the present resident size (proc(5)). Elsewhere the peak is
        # the process's own, over all its samples.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def memory_peak(device: torch.device) -> int:
    """Bytes allocated on the device (CUDA), or resident in this process (CPU), at the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM:")


def memory_in_use(device: torch.device) -> int:
    """As :func:`memory_peak`, now; where there is no /proc, the process's peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS:")


def free_nbytes(device: torch.device) -> int:
    """Bytes that can still be had on the device (CUDA), or on this machine (CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def row_nbytes(model: PreTrainedModel, held: int, seen: int) -> int:
    """Bytes of a row's keys and values over all layers.

    Args:
        held: entries of each layer that evicts.
        seen: tokens read, of which other layers hold what their windows leave.
    """
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = EvictionCache(model, FullPolicy())
    windows = [min(seen, layer.sliding_window - 1) for layer in cache.windowed]
    entries = held * len(cache.evicting) + sum(windows)
    return int(2 * entries * config.num_key_value_heads * dim * model.dtype.itemsize)


def _of_process(name: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
