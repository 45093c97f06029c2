"""What a steady decoding step asks of a device: how many operations, and that it never waits."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from tiny import SHAPE, from_config, prompt
from tools.operations import Operations, operations
from transformers import DynamicCache, LlamaConfig

from buzz import EvictionCache

# More than stock's operations, per layer and step.
BARS = {
    "full": 0,
    "local": 4,
    "buzz": 4,
    "buzz_strided": 4,
    "buzz_fast": 4,
    "streaming_llm": 15,
    "h2o": 15,
    "tova": 15,
}
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def steady(name: str, layers: int, dtype: torch.dtype, rows: int = 1) -> Operations:
    """A step like those before it; of BUZZ one between two evictions.

    Rows but the last are padded, each by another number of tokens.
    """
    model = from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": layers}), dtype=dtype)
    cache = DynamicCache() if name == "stock" else EvictionCache(model, METHODS[name])
    padding = torch.tensor([7 + row for row in range(rows - 1)] + [0])[:, None]
    seen, ids = 0, prompt(50, rows)
    with torch.no_grad():
        while True:
            slots = torch.arange(seen + ids.shape[1])
            inputs = {"attention_mask": (slots >= padding).long()} if rows > 1 else {}
            inputs["position_ids"] = (slots[seen:] - padding).clamp(min=0)
            if seen > 90 and not (name.startswith("buzz") and due(cache)):
                return operations(model, cache, ids, **inputs)
            model(ids, past_key_values=cache, **inputs)
            seen, ids = len(slots), prompt(1, rows)


def due(cache: EvictionCache) -> bool:
    """Whether the next step evicts, or the last did."""
    layer = cache.evicting[0]
    coming = any(
        layer.policy.next_length(group.held + 1, group.state)[0] <= group.held
        for group in layer.groups
    )
    return coming or any(group.cut == group.seen for group in layer.groups)


@both_types
@pytest.mark.parametrize("name", BARS)
def test_operations_of_a_layer(name: str, dtype: torch.dtype) -> None:
    per_layer = {}
    for method in ("stock", name):
        whole, less = (steady(method, layers, dtype).launches for layers in (3, 2))
        per_layer[method] = whole.total() - less.total()
    more = per_layer[name] - per_layer["stock"]
    assert more <= BARS[name]


@both_types
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", BARS)
def test_a_steady_step_waits_for_nothing(name: str, rows: int, dtype: torch.dtype) -> None:
    waits = steady(name, 2, dtype, rows).waits
    # On a CPU the checks of a step's inputs are read at once, and by nobody else: once each.
    checks = {"_local_scalar_dense": 2 if rows > 1 else 1}
    assert all(waits[wait] <= checks.get(wait, 0) for wait in waits), waits


def test_waiting_is_seen() -> None:
    with Operations() as counted:
        torch.tensor([1, 2])
        torch.ones(2).sum().item()
    assert counted.waits == {"torch.tensor": 1, "_local_scalar_dense": 1}
    assert counted.launches["sum"] == 1
