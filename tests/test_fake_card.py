"""Every method on CUDA devices that are not there: what would wait, mix them, or run too often."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS
from tiny import tiny
from torch._subclasses.fake_tensor import unset_fake_temporarily

from buzz import ConfigError, EvictionCache, cache, compiled, kernels
from buzz.kernels import reference
from buzz.store import with_spare

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

import fake_card

pytestmark = pytest.mark.skipif(not fake_card.available(), reason="no C++ compiler")
NAMES = [name for name in METHODS if name != "kvzip"]  # which reads its prompt's tokens
# The first layer on one card, the others on the next, or all on one.
ONE: Callable[[str], str] = lambda name: "cuda:0"  # noqa: E731
TWO: Callable[[str], str] = lambda name: f"cuda:{int('layers.1' in name or 'layers.2' in name)}"  # noqa: E731


class Played:
    """A model on fake cards and a cache that decodes.

    Attributes:
        prompt: what the host would have waited for while it read the prompt.
    """

    def __init__(
        self,
        noted: fake_card.Noted,
        name: str,
        place: Callable[[str], str] = ONE,
        padding: tuple[int, ...] = (0,),
        tokens: int = 60,
        family: str = "llama",
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        with unset_fake_temporarily():
            self.model = tiny(family, dtype=dtype)
            self.cache = EvictionCache(self.model, METHODS[name], **options)
        self.noted, self.rows, self.seen = noted, len(padding), 0
        fake_card.send(self.model, place)
        if place is TWO:
            self._cross(place)
        self.read(tokens, padding)

    def read(self, tokens: int, padding: tuple[int, ...] = (0,)) -> None:
        """A new prompt. The rows' padding, which is in numbers, is told instead of read."""
        self.cache.reset()
        self.seen = 0
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(cache, "padding_of", lambda mask: list(padding))
            patched.setattr(cache, "first_positions", lambda positions, padding: [0] * self.rows)
            patched.setattr(cache, "_may_wait", lambda device, new: False)
            self.noted.clear()
            self._step(tokens)
        self.prompt = dict(self.noted.waits)
        self.noted.clear()

    def decode(self, steps: int) -> Played:
        for _ in range(steps):
            self._step(1)
        return self

    def _step(self, new: int) -> None:
        self.seen += new
        given = {}
        if self.rows > 1:
            given["attention_mask"] = torch.ones(self.rows, self.seen, device="cuda:0").long()
            given["position_ids"] = torch.zeros(self.rows, new, device="cuda:0").long()
        ids = torch.zeros(self.rows, new, device="cuda:0").long()
        with torch.inference_mode():
            self.model(ids, past_key_values=self.cache, **given)

    def _cross(self, place: Callable[[str], str]) -> None:
        """Activations follow the layers, as accelerate moves them."""

        def to(device: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=True)
            return tuple(to(device, one) for one in value) if isinstance(value, tuple) else value

        def follow(device: str) -> Callable[..., Any]:
            return lambda module, args, kwargs: (
                to(device, args),
                {k: v if k == "past_key_values" else to(device, v) for k, v in kwargs.items()},
            )

        decoder = self.model.get_decoder()
        for number, layer in enumerate(decoder.layers):
            device = place(f"layers.{number}")
            layer.register_forward_pre_hook(follow(device), with_kwargs=True)
        decoder.norm.register_forward_pre_hook(follow(place("norm")), with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "place"),
    [pytest.param(name, TWO, id=f"{name}-two") for name in NAMES]
    + [pytest.param(name, ONE, id=f"{name}-one") for name in ("full", "streaming_llm", "h2o")],
)
def test_no_method_waits_for_its_cards_or_mixes_them(name: str, place) -> None:
    with fake_card.card() as noted:
        played = Played(noted, name, place).decode(14)
        assert not played.prompt and not noted.waits
    policy = METHODS[name].for_layer(0, 3)
    assert played.cache.lengths[0] == policy.lengths([60] + [1] * 14)[-1]
    kernel = {launched for launched, _ in noted.launches}
    assert "_append_kernel" in kernel  # and not the reference
    if policy.needs_scores and policy.evicts != "prompt":
        assert "_decode_kernel" in kernel


@pytest.mark.parametrize(
    "options",
    [{"logn_base": 16.0}, {"positions": "true"}, {"padding": (21, 7, 0)}],
    ids=["logn", "true", "padded"],
)
@pytest.mark.parametrize("name", ["full", "streaming_llm", "h2o", "h2o-mean", "buzz", "r_kv"])
def test_nor_do_they_with_options_and_padding(name: str, options: dict[str, Any]) -> None:
    with fake_card.card() as noted:
        played = Played(noted, name, **options).decode(14)
        assert not played.prompt and not noted.waits


@pytest.mark.parametrize(("name", "most"), [("h2o", 200), ("streaming_llm", 130), ("tova", 200)])
def test_rows_of_many_lengths_take_one_launch_each(name: str, most: int) -> None:
    """Sixteen prompts of sixteen lengths: once all rows hold equally much, they evict as one."""
    padding = tuple(7 * row for row in reversed(range(16)))
    with fake_card.card() as noted:
        played = Played(noted, name, padding=padding, tokens=200).decode(4)
        noted.clear()
        played.decode(10)
    assert noted.operations.total() / 10 / 3 <= most
    moves = [launched for launched, _ in noted.launches if launched == "_move_kernel"]
    assert len(moves) == 10 * 3


@pytest.mark.parametrize("name", ["local", "streaming_llm"])
def test_rows_that_hold_equally_much_need_no_mask(name: str) -> None:
    """So that the stock backend is given none, and takes flash attention."""
    with fake_card.card() as noted:
        played = Played(noted, name, padding=(21, 7, 0))
        assert len(played.cache.evicting[0].groups) == 3
        assert all(layer.starts is None for layer in played.cache.evicting)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A compiled step's Python, and for each step the tensors that a capture would depend on.

    CUDA's graphs replay addresses: another buffer, or another size, is another recording.
    """
    recorded: list[tuple[int, int]] = []
    kept: list[Any] = []  # so that no address is used twice
    follow = compiled.ReplayLayer.follow

    def followed(self: compiled.ReplayLayer, layer: Any, bounds: torch.Tensor) -> None:
        before = self.keys, self.values, self.positions, self.scores
        follow(self, layer, bounds)
        now = self.keys, self.values, self.positions, self.scores
        if any(one is not other for one, other in zip(before, now, strict=True)):
            recorded.append((layer.index, self.keys.shape[2]))
            kept.append(now)

    monkeypatch.setattr(compiled.ReplayLayer, "follow", followed)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.ops.buzz, "step", kernels._step)
    compiled._replays.clear()
    return recorded


graphed = pytest.mark.skipif(not compiled.tested(), reason=f"needs torch {compiled.TORCH}")


@graphed
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz", "tova"])
def test_evictions_between_replays_leave_a_capture_valid(name: str, uncompiled: list[Any]) -> None:
    """They run on the stream between two replays, in the buffers that the graph was captured on."""
    with fake_card.card() as noted:
        played = Played(noted, name, compiled=True).decode(1)
        uncompiled.clear()
        noted.clear()
        played.decode(60)
        assert not uncompiled and not noted.waits
        assert max(played.cache.evictions) > 2
        assert {launched for launched, _ in noted.launches} >= {"_append_kernel", "_move_kernel"}


@graphed
@pytest.mark.parametrize("name", ["h2o", "buzz", "full"])
def test_one_cache_records_once_for_samples_of_all_lengths(
    name: str, uncompiled: list[Any]
) -> None:
    """With :meth:`EvictionCache.reset` between them; a cache that holds all grows at times."""
    new = []
    with fake_card.card() as noted:
        played = Played(noted, name, compiled=True)
        for sample in range(4):
            uncompiled.clear()
            played.read(60 + 37 * sample)
            played.decode(30)
            new.append(len(uncompiled))
    if name == "full":
        assert sum(count > 0 for count in new) <= 2
    else:
        assert new[0] == 3 and not any(new[1:])


def test_a_sweep_over_lengths_makes_few_capacities() -> None:
    made = {with_spare(entries) for entries in range(1024, 4096)}
    assert len(made) <= 20
    for entries in range(1, 5000):
        spare = with_spare(entries) - entries
        assert 64 + entries // 8 <= spare <= 1.3 * (64 + entries // 4)


def test_which_cards_and_types_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card.card(80):
        tensor = torch.empty(1, 2, 3, 16, device="cuda:0")
        assert kernels.implementation(tensor).__name__.endswith("triton_scores")
        assert kernels.implementation(tensor.double()) is reference
        assert kernels.implementation(tensor.requires_grad_()) is reference
        with torch.no_grad():
            assert kernels.implementation(tensor) is not reference
    model, too_old = tiny("llama"), "A card of sm_75, sm_75.*sm_80"
    with fake_card.card(75):
        fake_card.send(model, ONE)
        with pytest.raises(ConfigError, match=too_old):
            kernels.implementation(torch.empty(1, device="cuda:0"))
        with pytest.raises(ConfigError, match=too_old):
            EvictionCache(model, METHODS["h2o"])  # before any text is read
    monkeypatch.setenv("BUZZ_KERNELS", "reference")
    with fake_card.card(75):
        assert kernels.implementation(torch.empty(1, device="cuda:0")) is reference
    monkeypatch.setenv("BUZZ_KERNELS", "triton")
    with fake_card.card(80), pytest.raises(ConfigError, match="float64"):
        kernels.implementation(torch.empty(1, device="cuda:0").double())


class TestWhatIsWrongIsNoticed:
    """So that the tests above can fail."""

    def test_a_number_that_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(METHODS["h2o"])
        select = kind.select
        monkeypatch.setattr(kind, "select", lambda *given: print(select(*given).tolist()))
        with fake_card.card() as noted, pytest.raises(Exception, match="_local_scalar_dense"):
            Played(noted, "h2o")

    def test_an_upload(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(METHODS["streaming_llm"])
        select = kind.select

        def sending(*given: Any) -> torch.Tensor:
            return select(*given) + torch.zeros(1, dtype=torch.int64, device="cpu").to("cuda:0")

        monkeypatch.setattr(kind, "select", sending)
        with fake_card.card() as noted:
            played = Played(noted, "streaming_llm").decode(2)
        assert any("cpu to cuda" in wait for wait in played.prompt) and noted.waits

    def test_two_devices_in_one_operation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(METHODS["h2o"])
        select = kind.select

        def elsewhere(*given: Any) -> torch.Tensor:
            return select(*given) + torch.zeros(12, dtype=torch.int64, device="cuda:1")

        monkeypatch.setattr(kind, "select", elsewhere)
        with fake_card.card() as noted, pytest.raises(Exception, match="device"):
            Played(noted, "h2o")

    def test_a_launch_on_the_current_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("buzz.kernels.triton_scores")
        monkeypatch.setattr(module, "append", module.append.__wrapped__)
        with fake_card.card() as noted, pytest.raises(AssertionError, match="launched on cuda:0"):
            Played(noted, "h2o", TWO).decode(1)
