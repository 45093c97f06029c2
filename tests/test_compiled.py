"""Compiled decoding: the eager cache's tokens, from one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import METHODS
from runs import LAYERS, MODEL, read, timeless
from tiny import prompt, tiny

from buzz import ConfigError, EvictionCache, Policy, compiled
from evals.results.frame import load
from evals.run import generate as generate_module
from evals.run import runner
from evals.run.row import Row

pytestmark = pytest.mark.skipif(not compiled.tested(), reason=f"needs torch {compiled.TORCH}")
EIGHT = ("full", "local", "streaming_llm", "h2o", "buzz", "buzz_strided", "buzz_fast", "tova")
MORE = {name: policy for name, policy in METHODS.items() if name not in EIGHT}
graphs = torch._dynamo.utils.counters["stats"]


def some(*quick: str) -> pytest.MarkDecorator:
    """The eight, of which all but these are slow."""
    each = [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in EIGHT]
    return pytest.mark.parametrize("name", each)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is captured, without the minute that inductor takes to compile it."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    graphs.clear()


def generate(model, cache: EvictionCache, ids, mask, new: int):
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def padded(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of which all but the last row are padded, each by another number of tokens."""
    ids = prompt(50, rows, seed)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 5 + 3 * row] = 0
    return ids, mask


def same(model, policy: Policy, rows: int, new: int, seed: int = 0, **options) -> EvictionCache:
    """Both caches, through stock generate: tokens, logits, lengths, entries, trace."""
    ids, mask = padded(rows, seed)
    eager = EvictionCache(model, policy, **options)
    graph = EvictionCache(model, policy, compiled=True, **options)
    want, got = (generate(model, cache, ids, mask, new) for cache in (eager, graph))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )
    assert graph.evicting[0].lengths == eager.evicting[0].lengths
    assert graph.evictions == eager.evictions and graph.trace() == eager.trace()
    for layer in range(3):
        assert torch.equal(graph.kept_positions(layer), eager.kept_positions(layer))
    return graph


@some("full", "h2o", "buzz", "tova")
def test_tokens_are_the_eager_caches_from_one_graph(name: str) -> None:
    model = tiny("llama")
    same(model, METHODS[name], 1, 60)
    assert graphs["unique_graphs"] == 1
    same(model, METHODS[name], 1, 60, seed=1)  # another prompt, another cache, later evictions
    assert graphs["unique_graphs"] == 1


@some("streaming_llm", "h2o", "buzz", "buzz_fast")
def test_padded_batches_decode_alike(name: str) -> None:
    model = tiny("llama")
    same(model, METHODS[name], 3, 40)
    assert graphs["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", EIGHT)
def test_a_thousand_steps_with_all_their_evictions(name: str, rows: int) -> None:
    model = tiny("llama")
    model.config.max_position_embeddings = 2048
    cache = same(model, METHODS[name], rows, 1000)
    assert graphs["unique_graphs"] == 1
    assert name == "full" or min(cache.evictions) > 80


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("buzz", {"positions": "true"}),
        ("h2o", {"logn_base": 16.0}),
        ("streaming_llm", {"logn_base": 16.0, "logn_clamp": True}),
    ],
    ids=["true", "logn", "clamp"],
)
def test_with_the_caches_options(name: str, options) -> None:
    same(tiny("llama"), METHODS[name], 2, 30, **options)


@pytest.mark.parametrize("family", ["llama-mqa", "qwen3", "smollm3", "phi3-partial", "gpt-oss"])
def test_of_other_models(family: str) -> None:
    same(tiny(family), METHODS["buzz"], 2, 30)


def test_half_precision_gives_the_eager_caches_lengths() -> None:
    model, policy = tiny("llama", dtype=torch.bfloat16), METHODS["buzz"]
    ids, mask = padded(2)
    eager, graph = (EvictionCache(model, policy, compiled=on) for on in (False, True))
    want, got = (generate(model, cache, ids, mask, 30) for cache in (eager, graph))
    assert graph.trace() == eager.trace()
    torch.testing.assert_close(got.logits[1], want.logits[1], atol=5e-2, rtol=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", MORE.values(), ids=MORE)
def test_other_methods_do_the_same_or_are_refused_by_name(policy: Policy) -> None:
    model = tiny("llama")
    try:
        EvictionCache(model, policy, compiled=True)
    except ConfigError as refusal:
        assert policy.name in str(refusal) and "model.compile" in str(refusal)
    else:
        same(model, policy, 1, 30)


@pytest.mark.parametrize("name", ["r_kv", "a2sf", "pyramid_kv", "expected_attention"])
def test_what_needs_more_of_a_step_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EvictionCache(tiny("llama"), METHODS[name], compiled=True)


@pytest.mark.parametrize("family", ["llama-dynamic", "gemma3-mixed"])
def test_models_that_no_graph_serves_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="model.compile"):
        EvictionCache(tiny(family), METHODS["buzz"], compiled=True)


def test_a_forward_of_somebody_else_is_not_replaced() -> None:
    model = tiny("llama")
    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="forward"):
        EvictionCache(model, METHODS["buzz"], compiled=True)


def test_prompts_chunks_and_other_caches_run_as_ever() -> None:
    model, policy = tiny("llama"), METHODS["buzz"]
    ids = prompt(60)
    eager, graph = (EvictionCache(model, policy, compiled=on) for on in (False, True))
    with torch.no_grad():
        for chunk in (ids[:, :40], ids[:, 40:59]):
            for cache in (eager, graph):
                model(chunk, past_key_values=cache)
        assert graphs["unique_graphs"] == 0
        want = model(ids[:, 59:], past_key_values=eager)
        got = model(ids[:, 59:], past_key_values=graph)
        assert graphs["unique_graphs"] == 1
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert got.past_key_values is graph
    model(ids[:, :1], past_key_values=graph)  # with gradients enabled: not by the graph
    assert graphs["unique_graphs"] == 1


def test_two_caches_take_turns_and_a_copied_model_has_its_own_graph() -> None:
    model, policy = tiny("llama"), METHODS["buzz"]
    other = copy.deepcopy(model)
    ids = prompt(50)
    want = generate(model, EvictionCache(model, policy), ids, None, 20).sequences
    caches = [EvictionCache(m, policy, compiled=True) for m in (model, model, other)]
    with torch.no_grad():
        for m, cache in zip((model, model, other), caches, strict=True):
            m(ids, past_key_values=cache)
        for step in range(50, 69):
            for m, cache in zip((model, model, other), caches, strict=True):
                logits = m(want[:, step : step + 1], past_key_values=cache).logits
                assert logits.argmax() == want[0, step + 1]


@pytest.mark.parametrize("grown", [False, True])
def test_in_one_mode_and_then_another(grown: bool) -> None:
    """Caches of one model share bounds, whichever mode they were made in; so does one by turns."""
    model, ids = tiny(), prompt(30, 2)
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode)
    eager, graph = (EvictionCache(model, METHODS["h2o"], compiled=own) for own in (False, True))
    for number, mode in enumerate(modes):
        for cache in (eager, graph):
            if not grown:
                cache.reset()
        steps = [ids] if number == 0 or not grown else []
        with mode():
            for step in [*steps, *prompt(4, 2, seed=number).split(1, 1)]:
                want, got = (model(step, past_key_values=own).logits for own in (eager, graph))
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert graph.kept_positions(0).equal(eager.kept_positions(0))


@torch._dynamo.config.patch(recompile_limit=1)
def test_one_graph_too_many_is_no_error() -> None:
    """It is named once, eager steps go on where graphs ended, and present graphs still serve."""
    model = tiny()
    same(model, METHODS["h2o"], 1, 5)
    with pytest.warns(UserWarning, match="recompile_limit") as told:
        same(model, METHODS["h2o"], 2, 30)
        same(model, METHODS["streaming_llm"], 1, 30, logn_base=16.0)
    assert len([one for one in told if "recompile_limit" in str(one.message)]) == 1
    made = graphs["unique_graphs"]
    same(model, METHODS["h2o"], 1, 30, seed=1)
    assert graphs["unique_graphs"] == made == 1


def test_a_step_sends_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds are counted up where they are; only an eviction of some rows writes them anew."""
    model = tiny("llama")
    cache = EvictionCache(model, METHODS["local"], compiled=True)
    with torch.no_grad():
        model(prompt(50), past_key_values=cache)
        for _ in range(3):
            model(prompt(1), past_key_values=cache)
        sent: list[object] = []
        monkeypatch.setattr(
            torch, "tensor", lambda *a, made=torch.tensor, **k: sent.append(a) or made(*a, **k)
        )
        for _ in range(40):  # evicts in each, and slides back at times
            model(prompt(1), past_key_values=cache)
    assert not sent


def test_a_text_is_read_by_the_graph_too(go, tmp_path, monkeypatch) -> None:
    """So that its speed is that of what the run says it is."""
    monkeypatch.delattr("evals.run.runner.generate")  # the warm-up, whose steps have a mask
    (tmp_path / "text").write_text("A text that is long enough to be read. " * 9)
    asked = "task=wikitext", f"task.data_file={tmp_path}/text", "task.tokens=200", "method=buzz"
    sizes = "method.window=64", "method.threshold=64"
    eager, graph = (
        read(go(*asked, *sizes, f"model.compile={on}", needle=False)) for on in ("false", "true")
    )
    assert graphs["unique_graphs"] > 0
    assert graph[0]["scores"] == pytest.approx(eager[0]["scores"], rel=1e-4)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """By sample, addresses and capacities of each layer's buffers that no sample decoded in before.

    What is recorded on CUDA serves no others.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    known: dict[tuple[int, ...], object] = {}  # with the buffers, so that no address comes again
    follow, add = compiled.ReplayLayer.follow, Row.add

    def followed(layer, own, bounds) -> None:
        follow(layer, own, bounds)
        buffers = [t for t in (layer.keys, layer.values, layer.scores) if t is not None]
        place = layer.keys.shape[2], *(buffer.data_ptr() for buffer in buffers)
        if place not in known:
            known[place] = buffers
            found.setdefault("now", []).append(place)

    def added(row, record) -> None:
        found[f"{row.plan.policy.name} {record['id']}"] = found.pop("now", [])
        add(row, record)

    monkeypatch.setattr(compiled.ReplayLayer, "follow", followed)
    monkeypatch.setattr(Row, "add", added)
    return found


LENGTHS = "task.lengths=[350,620,430]", "task.depths=[0]", "task.max_new_tokens=24"


def by_sample(recorded: dict[str, list[tuple[int, ...]]], method: str) -> list[int]:
    """Buffers that each sample of a method took for the first time."""
    return [len(places) for name, places in recorded.items() if name.startswith(method)]


@pytest.mark.parametrize(("method", "chunk"), [("buzz", "null"), ("snapkv", "128")])
def test_samples_of_one_budget_take_the_buffers_of_the_first(go, recorded, method, chunk) -> None:
    """Whatever their lengths; and the last gives what it gives alone."""
    asked = f"method={method}", "budget=100", *LENGTHS, "model.compile=true"
    asked += (f"prefill_chunk={chunk}",)
    *_, last = timeless(go(*asked))
    first, *later = by_sample(recorded, method)
    assert first >= LAYERS and later == [0, 0]
    (alone,) = timeless(go(*asked, "task.lengths=[430]"))
    for name in ("tokens", "evictions", "trace", "allocated_nbytes"):
        assert alone[name] == last[name]


COPIES = "task.variant=multikey", "task.questions=3", "task.lengths=[800]", "task.depths=[0,99]"
TIMED = "task=throughput", "task.lengths=[300]", "task.max_new_tokens=9", "task.samples=2"


@pytest.mark.parametrize("asked", [(*COPIES, "compress=context"), TIMED], ids=["copies", "timed"])
def test_so_do_questions_on_copies_and_what_is_timed(go, recorded, asked) -> None:
    go("method=tova", "budget=60", "model.compile=true", *asked, needle=asked is not TIMED)
    first, *later = by_sample(recorded, "tova")
    assert first >= LAYERS and later and not any(later)


def test_buffers_that_wait_count_in_no_other_methods_memory(main, monkeypatch) -> None:
    monkeypatch.setattr(generate_module, "memory_peak", lambda device: 10**9)
    lengths, methods = "task.lengths=[350]", "method=h2o,tova"
    asked = "task=needle", "budget=60", "model.compile=true", "task.repeats=2", "task.depths=[0]"
    assert main("-m", methods, *MODEL, *asked, lengths, "task.max_new_tokens=4") == 0
    h2o, tova = (
        read(file) for name in ("h2o", "tova") for file in main.runs.glob(f"*/{name}@60.jsonl")
    )
    beside = [h2o[0]["allocated_nbytes"], tova[0]["allocated_nbytes"]]
    found = [r["memory_peak_nbytes"] for r in (h2o[0], tova[0], h2o[1], tova[1])]
    assert found == [10**9, 10**9 - beside[0], 10**9 - beside[1], 10**9 - beside[0]]


def test_a_cache_that_failed_or_has_another_budget_serves_no_more(
    go, recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "method=h2o", *LENGTHS, "model.compile=true"
    go(*asked, "budget=0.2")  # other entries for each prompt
    assert all(by_sample(recorded, "h2o"))
    used, real = [], runner.generate

    def generate(*given, cache=None, **more):
        found = real(*given, cache=cache, **more)
        if cache is not None:  # not the full cache's, nor a warm-up
            used.append(cache)
            if len(used) == 2:
                raise RuntimeError("too late")
        return found

    monkeypatch.setattr(runner, "generate", generate)
    records = read(go(*asked, "budget=100"))
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]
    assert used[0] is used[1] is not used[2]


def test_a_run_is_compiled_where_the_model_says_so(go) -> None:
    asked = "method=buzz", "method.window=64", "method.threshold=64", "task.depths=[0]"
    files = [go(*asked, f"model.compile={on}") for on in ("false", "true")]
    (eager,), (graph,) = map(read, files)
    assert graphs["unique_graphs"] > 0 and graph["timed"]
    assert (graph["tokens"], graph["evictions"]) == (eager["tokens"], eager["evictions"])
    # Tables name both, and compare neither with the other.
    rows = load(files[0].parent.parent)
    assert set(rows.model) == {"llama_random", "llama_random, compiled"}
    assert rows.setting.nunique() == 2
    with pytest.raises(ConfigError, match=r"model\.compile.*r_kv"):
        go("method=r_kv", "model.compile=true")
