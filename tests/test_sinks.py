"""Models with attention sinks: a learned logit of each head, in the softmax's sum and no more."""

from __future__ import annotations

import pytest
import torch
from test_kernels import draw, drawn_sinks, full
from tiny import prompt, tiny
from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from baselines import FullPolicy, H2OPolicy
from buzz import ConfigError, EvictionCache, kernels

PADDING, TOKENS = [0, 7], 50


def stock(family: str, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [n, vocab], and what each layer's entries receive from all queries [kv_heads, n]."""
    model = tiny(family)
    output = model(ids, use_cache=False, output_attentions=True)
    return output.logits[0], [
        weights[0].sum(1).unflatten(0, (model.config.num_key_value_heads, -1)).sum(1)
        for weights in output.attentions
    ]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["reference", ""])
@pytest.mark.parametrize("chunks", [[TOKENS], [21, 20, 1, 1, 6, 1]])
@pytest.mark.parametrize("family", ["gpt-oss", "gpt-oss-mixed"])
def test_logits_and_scores_are_those_of_the_stock_model(
    family: str, chunks: list[int], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stock attention's weights, which leave the sink's column out; in a padded batch."""
    monkeypatch.setenv("BUZZ_KERNELS", implementation)
    model, ids = tiny(family), prompt(TOKENS, batch=2)
    mask = (torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]).long()
    cache = EvictionCache(model, H2OPolicy(heavy=TOKENS, recent=TOKENS))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, seen = [], 0
    for new in chunks:
        own, seen = slice(seen, seen + new), seen + new
        inputs = {"attention_mask": mask[:, :seen], "position_ids": positions[:, own]}
        logits.append(model(ids[:, own], past_key_values=cache, **inputs).logits)
    for row, padding in enumerate(PADDING):
        expected, received = stock(family, ids[row : row + 1, padding:])
        found = torch.cat(logits, 1)[row, padding:]
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)
        for layer, sums in zip(cache.layers, received, strict=True):
            if layer in cache.evicting:
                scores = layer.view(layer.store.scores)[row, :, padding:]
                torch.testing.assert_close(scores, sums, atol=1e-5, rtol=1e-5)
                assert (scores.sum(-1) < 0.9 * 2 * scores.shape[-1]).all()  # two heads a group


@torch.no_grad()
def test_the_full_cache_needs_no_backend_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eager attention makes a matrix of all weights, and no other can be chosen."""
    model, ids = tiny("gpt-oss"), prompt(TOKENS)
    expected = model(ids).logits
    cache = EvictionCache(model, FullPolicy())
    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", None)
    found = [model(part, past_key_values=cache).logits for part in ids.split([40, 1, 9], 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=3e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 20])
def test_they_are_served_within_a_graph(queries: int) -> None:
    inputs, sinks = draw(q=queries, n=40), drawn_sinks(True)
    kernel = kernels.scored_decode if queries == 1 else kernels.scored_prefill
    found = torch.compile(kernel, backend="aot_eager", fullgraph=True)(*inputs, 0.1, sinks=sinks)
    expected = full(*inputs, 0.1, sinks=sinks)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other, atol=1e-5, rtol=1e-5)


def refusal(model: torch.nn.Module) -> str:
    with pytest.raises(ConfigError, match="model=") as error:
        EvictionCache(model, FullPolicy())
    return error.value.remedy


def test_sinks_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is told of sinks, and does not put them into the softmax as they are."""
    monkeypatch.setattr(
        modeling_gpt_oss, "eager_attention_forward", modeling_llama.eager_attention_forward
    )
    assert "more than a softmax" in refusal(tiny("gpt-oss"))


def test_a_backend_that_leaves_them_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_gpt_oss.GptOssPreTrainedModel, "_supports_sdpa", True)
    model = tiny("gpt-oss")
    model.set_attn_implementation("sdpa")
    assert "sdpa leaves out; load it with eager" in refusal(model)
