"""Moving kept keys to new positions.

At cache positions an entry is attended as if it stood at its index in the thinned cache. RoPE is
relative, so queries and recent keys stay at their true positions, and only entries that moved
relative to the newest token are rotated, at the moment of eviction, by the difference. At true
positions nothing moves: a cache then treats every layer as one without RoPE.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from buzz.inputs import on
from buzz.kernels.reference import rotate

Rotation = tuple[Tensor, Tensor]
SMALL_TABLE = 512  # rows


class Rope:
    """The rotation that one layer of a model applies to its keys.

    It reads the model's own rotary module, so it serves every RoPE variant that is a table of
    inverse frequencies: default, linear, dynamic, llama3, yarn, longrope, and partial rotary
    dimensions. A factor on cos and sin (yarn, longrope) is in the keys already and stays.

    Args:
        module: the model's rotary embedding; None for a layer without one (NoPE): nothing rotates.
        layer_type: prefix of the buffers of modules that hold one table per layer type.
        interleaved: whether pairs are (0, 1), (2, 3), ... and not (0, R/2), (1, R/2 + 1), ...
    """

    def __init__(
        self, module: nn.Module | None, layer_type: str = "", interleaved: bool = False
    ) -> None:
        self.module = module
        self.interleaved = interleaved
        self._buffer = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        rope_type = getattr(module, "rope_type", "default")
        if isinstance(rope_type, dict):
            rope_type = rope_type[layer_type]
        # Whether frequencies may change from one forward pass to the next.
        self.static = "dynamic" not in rope_type and rope_type != "longrope"
        self._two_tables = rope_type == "longrope"  # written into one buffer, by a text's length
        self._tables: dict[torch.device, Rotation] = {}
        self._observed: Tensor | None = None  # the buffer that was looked at last
        self._history: list[tuple[int, Tensor]] = []

    def frequencies(self) -> Tensor:
        """Inverse frequencies that the current forward pass uses, float32 [R / 2]."""
        return getattr(self.module, self._buffer)

    def observe(self, slot: int, new: int) -> None:
        """Note the frequencies that tokens are rotated with, if they can change.

        To compare numbers waits for the device, so it is done only where a change is possible:
        dynamic RoPE brings another buffer; LongRoPE's changes once, behind its short context.

        Args:
            slot: the first of these tokens.
            new: how many there are.
        """
        if self.static or self.module is None:
            return
        current = self.frequencies()
        if self._history:
            if self._two_tables:
                if len(self._history) > 1 or slot + new <= self._short_context():
                    return
            elif current is self._observed:
                return
        self._observed = current
        if not self._history or not torch.equal(self._history[-1][1], current):
            self._history.append((slot, current.clone()))

    def _short_context(self) -> int:
        """Tokens up to which LongRoPE has its short frequencies."""
        config: Any = getattr(self.module, "config", None)
        parameters = config.rope_parameters
        prefix = self._buffer.removesuffix("inv_freq").removesuffix("_")
        own = parameters[prefix] if prefix else parameters
        return int(own["original_max_position_embeddings"])

    def forget(self) -> None:
        """Start over, with a new prompt, whose frequencies are those of a text that begins.

        A dynamic RoPE keeps those of the longest text that it has met, in whatever cache.
        """
        self._history.clear()
        module: Any = self.module
        prefix = self._buffer.removesuffix("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if not self.static and not self._two_tables and original is not None:
            current = self.frequencies()
            if current is not original:
                module.register_buffer(self._buffer, original.to(current.device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def __deepcopy__(self, memo: dict[int, object]) -> Rope:
        """A copy that reads the same module, since it is in that one that frequencies change."""
        other = memo[id(self)] = copy.copy(self)
        other._history = list(self._history)
        return other

    def turn(self, new: Tensor, old: Tensor, slots: Tensor) -> Rotation | None:
        """cos and sin that take keys from positions `old` to positions `new`, however far.

        Angles come from exact integers in float64. With static frequencies only the difference
        counts; otherwise the old rotation is undone with the frequencies in force at `slots`.

        Args:
            new, old: int64 [..., k].
            slots: int [..., k], arrival of each entry as a count of tokens seen; read only where
                frequencies change.

        Returns:
            Two float32 [..., k, R / 2]; None for a layer without RoPE.
        """
        if self.module is None:
            return None
        frequencies = self.frequencies().to(new.device).double()
        if self.static or not self._history:
            angle = (new - old)[..., None] * frequencies
        else:
            starts = on(slots.device, [slot for slot, _ in self._history])
            tables = torch.stack([table for _, table in self._history]).double()
            used = tables[torch.bucketize(slots, starts, right=True) - 1]
            angle = new[..., None] * frequencies - old[..., None] * used
        angle = angle.remainder(2 * torch.pi).float()
        return angle.cos(), angle.sin()

    def table(self, turns: int, device: torch.device | None = None) -> Rotation | None:
        """cos and sin of moves by 0, 1, ... positions: float64 [at least `turns`, R / 2].

        None for a layer without RoPE. Only where frequencies are static.

        Args:
            device: where the keys lie, in case a model's layers lie on several; else that of the
                frequencies.
        """
        if self.module is None:
            return None
        device = device or self.frequencies().device
        known = self._tables.get(device)
        rows = 0 if known is None else known[0].shape[0]
        if known is None or not turns <= rows <= max(2 * turns, SMALL_TABLE):
            moves = torch.arange(max(turns, SMALL_TABLE), device=device)
            angles = moves[:, None] * self.frequencies().to(device).double()
            known = self._tables[device] = angles.cos(), angles.sin()
        return known

    def rotate(self, keys: Tensor, rotation: Rotation | None) -> Tensor:
        """Turn `keys` [..., D] by cos and sin [..., R / 2]."""
        return keys if rotation is None else rotate(keys, *rotation, self.interleaved)

    def sizes(self, vectors: Tensor) -> Tensor:
        """L2 norm of each pair of `vectors` [..., D] that turns together: [..., R / 2]."""
        half = 0 if self.module is None else self.frequencies().shape[-1]
        turned = vectors[..., : 2 * half]
        return turned.unflatten(-1, (half, 2) if self.interleaved else (2, half)).norm(
            dim=-1 if self.interleaved else -2
        )
