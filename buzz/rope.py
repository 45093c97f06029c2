"""Rotating kept keys to new positions.

At cache positions, an entry's position is its index in the cache. RoPE is relative: queries and
recent keys keep their true positions, and an eviction rotates the other keys by as much as they
move relative to the newest token. At true positions no key is rotated, as in a layer without RoPE.
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
    """The RoPE of one layer of a model.

    It reads the inverse frequencies of the model's own rotary module. So it serves every variant
    that has them: default, linear, dynamic, llama3, yarn, longrope, and partial rotary dimensions.
    The factor on cos and sin of yarn and longrope is part of the keys, and stays.

    Args:
        module: the model's rotary embedding; None for a layer without RoPE (NoPE).
        layer_type: prefix of the buffers, in modules that have one table per layer type.
        interleaved: whether the pairs of dimensions are (0, 1), (2, 3), ... and not (0, R/2),
            (1, R/2 + 1), ...
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
        # Whether frequencies are the same in every forward pass.
        self.static = "dynamic" not in rope_type and rope_type != "longrope"
        self._two_tables = rope_type == "longrope"  # one buffer: its values depend on the length
        self._tables: dict[torch.device, Rotation] = {}
        self._observed: Tensor | None = None  # the buffer that was looked at last
        self._history: list[tuple[int, Tensor]] = []

    def frequencies(self) -> Tensor:
        """Inverse frequencies of the current forward pass, float32 [R / 2]."""
        return getattr(self.module, self._buffer)

    def observe(self, slot: int, new: int) -> None:
        """Records the frequencies that a step's tokens are rotated with, if they can change.

        Comparing frequencies waits for the device. So it is done only where they may have changed:
        dynamic RoPE replaces its buffer; LongRoPE changes once, after its short context.

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
        """Length of LongRoPE's short context, in tokens."""
        config: Any = getattr(self.module, "config", None)
        parameters = config.rope_parameters
        prefix = self._buffer.removesuffix("inv_freq").removesuffix("_")
        own = parameters[prefix] if prefix else parameters
        return int(own["original_max_position_embeddings"])

    def forget(self) -> None:
        """Starts a new text, with the frequencies of a short one.

        A dynamic RoPE would keep those of the longest text so far, of whatever cache.
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
        """A copy that reads the same module: frequencies change in the model's own."""
        other = memo[id(self)] = copy.copy(self)
        other._history = list(self._history)
        return other

    def turn(self, new: Tensor, old: Tensor, slots: Tensor) -> Rotation | None:
        """cos and sin that rotate keys from positions `old` to positions `new`.

        Angles are computed in float64 from whole positions. With static frequencies only the
        difference counts; otherwise the old rotation is undone with the frequencies of its time.

        Args:
            new, old: int64 [..., k].
            slots: int [..., k], tokens seen when each entry was appended; read only if frequencies
                change.

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

        For static frequencies; None for a layer without RoPE.

        Args:
            device: of the keys; None: that of the frequencies.
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
        """`keys` [..., D], rotated by cos and sin [..., R / 2]."""
        return keys if rotation is None else rotate(keys, *rotation, self.interleaved)

    def sizes(self, vectors: Tensor) -> Tensor:
        """L2 norm of each pair of dimensions of `vectors` [..., D]: [..., R / 2]."""
        half = 0 if self.module is None else self.frequencies().shape[-1]
        turned = vectors[..., : 2 * half]
        return turned.unflatten(-1, (half, 2) if self.interleaved else (2, half)).norm(
            dim=-1 if self.interleaved else -2
        )
