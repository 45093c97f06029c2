"""Memory in use and its peak, of a CUDA device or of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig


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


def entry_nbytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * dim * dtype.itemsize)


def _of_process(name: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
