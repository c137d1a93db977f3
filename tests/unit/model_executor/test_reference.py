# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch model against the formulas in float64, against the dense models it contains,
and against itself: cache or no cache, padding or none, saved and loaded.
"""

from pathlib import Path
from typing import Any

import naive_models
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import DENSE_KINDS, PAD, make_dense, make_nvium
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import (
    NviumForCausalLM,
    register_with_transformers,
)
from vllm_nvium.model_executor.ops.mixture import exit_log_weights, mixture_log_probs


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "exits use the embeddings": {"exit_head": "embeddings"},
    "exits have their own": {"exit_head": "own"},
    "own beside tied": {"exit_head": "own", "tied": True},
    "no adapters": {"exit_adapter_size": 0, "final_adapter_size": 0},
    "two router blocks": {"router_num_blocks": 2, "router_hidden_size": 48},
    "one exit": {"exit_layers": (2,)},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {"qkv_bias": True},
    "Qwen3": {"qk_norm": True, "hidden_size": 96, "head_dim": 32},
    "constant hazards": {"hazards": (0.3, 0.0, 0.9)},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_the_law_is_the_formula(tmp_path: Path, variant: dict[str, Any]) -> None:
    model = make_nvium(tmp_path, **variant).double()
    prompt = tokens(2, 7)
    got = model(prompt).logits
    for row in range(2):
        expected = naive_models.nvium(model.state_dict(), model.config, prompt[row].tolist())
        # LlamaRMSNorm and the rotation compute in float32 whatever the model's dtype.
        torch.testing.assert_close(got[row], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_parts_of_the_output_fit_together(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    prompt = tokens(2, 9)
    out = model(prompt, output_head_logits=True)
    assert out.logits.shape == (2, 9, 256) and out.logits.dtype == torch.float32
    assert out.margins.shape == (2, 9, 3)
    assert out.exit_log_weights.shape == (2, 9, 4)
    assert out.head_hidden.shape == (2, 9, 4, 64)
    assert out.head_logits.shape == (2, 9, 4, 256)
    torch.testing.assert_close(exit_log_weights(out.margins), out.exit_log_weights)
    torch.testing.assert_close(model.unembed(out.head_hidden), out.head_logits)
    torch.testing.assert_close(mixture_log_probs(out.head_logits, out.exit_log_weights), out.logits)
    assert model(prompt).head_logits is None
    without = model(prompt, compute_logits=False)
    assert without.logits is None
    torch.testing.assert_close(without.head_hidden, out.head_hidden)


@torch.no_grad()
def test_tiny_models_have_routers_that_choose(tmp_path: Path) -> None:
    out = make_nvium(tmp_path)(tokens(4, 32, seed=5), output_head_logits=True)
    hazards = out.margins.sigmoid().flatten(0, 1)
    assert (hazards.quantile(0.1, dim=0) < 0.25).all()
    assert (hazards.quantile(0.9, dim=0) > 0.6).all()
    assert (out.exit_log_weights.exp().mean((0, 1)) > 0.05).all()
    heads = out.head_logits.softmax(-1)
    assert (heads[..., :-1, :] - heads[..., -1:, :]).abs().sum(-1).mean() > 0.5


@pytest.mark.parametrize("kind", DENSE_KINDS)
@torch.no_grad()
def test_hazard_zero_and_identity_adapters_are_the_dense_model(tmp_path: Path, kind: str) -> None:
    dense = make_dense(tmp_path, kind)
    model = NviumForCausalLM(NviumConfig(text_config=dense.config, exit_layers=[1, 3])).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("exits.", "final_adapter.")) for name in missing)
    for exit in model.exits:
        exit.router.head.weight.zero_()
        exit.router.head.bias.copy_(torch.tensor([0.0, -1e4]))
    prompt = tokens(2, 12)
    torch.testing.assert_close(
        model(prompt).logits,
        torch.log_softmax(dense(prompt).logits.float(), dim=-1),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_cached_steps_equal_one_pass(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    prompt = tokens(2, 12)
    whole = model(prompt)
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        out = model(prompt[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-4, rtol=1e-4)


def test_generate_with_and_without_cache(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD}
    prompt = tokens(2, 6)
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    assert cached.shape[1] > 6


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(tmp_path: Path, side: str) -> None:
    model = make_nvium(tmp_path)
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    padding = torch.full((1, 4), PAD)
    mask = torch.ones(2, 9, dtype=torch.long)
    if side == "left":
        batch, kept = torch.cat([torch.cat([padding, short], 1), long]), slice(4, None)
        mask[0, :4] = 0
    else:
        batch, kept = torch.cat([torch.cat([short, padding], 1), long]), slice(None, 5)
        mask[0, 5:] = 0
    padded = model(batch, attention_mask=mask)
    assert padded.logits.isfinite().all()
    torch.testing.assert_close(padded.logits[:1, kept], model(short).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.logits[1:], model(long).logits, atol=1e-4, rtol=1e-4)


def test_generate_from_a_left_padded_batch(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    batch = torch.cat([torch.cat([torch.full((1, 4), PAD), short], 1), long])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    alone = [model.generate(prompt, **settings) for prompt in (short, long)]
    assert torch.equal(together[0, 9:], alone[0][0, 5:])
    assert torch.equal(together[1, 9:], alone[1][0, 9:])


@torch.no_grad()
def test_half_precision_keeps_the_mixture_in_float32(tmp_path: Path) -> None:
    model = make_nvium(tmp_path, dtype=torch.bfloat16)
    out = model(tokens(2, 8))
    assert out.head_hidden.dtype == torch.bfloat16
    assert {out.logits.dtype, out.margins.dtype, out.exit_log_weights.dtype} == {torch.float32}
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(2, 8))


@torch.no_grad()
def test_logits_to_keep(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    prompt = tokens(2, 8)
    whole = model(prompt).logits
    torch.testing.assert_close(model(prompt, logits_to_keep=3).logits, whole[:, -3:])
    wanted = torch.tensor([1, 4])
    torch.testing.assert_close(model(prompt, logits_to_keep=wanted).logits, whole[:, wanted])


def test_loss_is_the_mean_over_scored_labels(tmp_path: Path) -> None:
    model = make_nvium(tmp_path)
    prompt = tokens(2, 8)
    labels = prompt.clone()
    labels[0, :5] = -100
    out = model(prompt, labels=labels)
    terms = [
        -out.logits[row, t, labels[row, t + 1]]
        for row in range(2)
        for t in range(7)
        if labels[row, t + 1] != -100
    ]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    divided = model(prompt, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(divided, torch.stack(terms).sum() / 5)


@pytest.mark.parametrize("arguments", [{"logits_to_keep": 2}, {"compute_logits": False}])
def test_labels_need_every_position(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = make_nvium(tmp_path)
    with pytest.raises(ValueError, match="labels need the logits of every position"):
        model(tokens(1, 4), labels=tokens(1, 4), **arguments)


def test_every_parameter_learns_with_and_without_checkpointing(tmp_path: Path) -> None:
    model = make_nvium(tmp_path, exit_head="own").train()
    prompt = tokens(2, 8)
    model(prompt, labels=prompt).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(prompt, labels=prompt).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], atol=1e-6, rtol=1e-4)


def test_a_fresh_model_starts_as_the_identity() -> None:
    config = NviumConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        exit_layers=[1],
    )
    model = NviumForCausalLM(config)
    adapters = [model.exits[0].adapter, model.final_adapter]
    for adapter in adapters:
        assert adapter.fc2.weight.abs().max() == 0
        assert adapter.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_saved_models_load_by_auto_class(tmp_path: Path, variant: dict[str, Any]) -> None:
    register_with_transformers()
    model = make_nvium(tmp_path, **variant)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NviumForCausalLM
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert torch.equal(model(tokens(1, 6)).logits, loaded(tokens(1, 6)).logits)
