# SPDX-License-Identifier: Apache-2.0
"""The training loss against a plain float64 computation, and its terms and the controller against
numbers worked out by hand."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import make_nvium
from vllm_nvium.checkpoints.train.controller import BetaController, dense_curve
from vllm_nvium.checkpoints.train.loss import (
    head_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
    warm_up_penalty,
)
from vllm_nvium.checkpoints.train.retrofit import warm_up_margins
from vllm_nvium.checkpoints.train.trainer import nvium_loss
from vllm_nvium.checkpoints.train.validation import worst_text
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    chunk=st.integers(1, 10),
    trains_unembedding=st.booleans(),
    trains_hidden=st.booleans(),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_head_log_probs_and_gradients(
    rows: int,
    chunk: int,
    trains_unembedding: bool,
    trains_hidden: bool,
    cap: float | None,
    seed: int,
) -> None:
    """Value and gradients, in chunks, equal log_softmax; rows with -100 count for nothing."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, unembedding, weights = random(rows, 5), random(11, 5), random(rows)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.2] = -100
    scored = targets != -100

    grads = []
    for plain in (True, False):
        u = hidden.clone().requires_grad_(trains_hidden)
        w = unembedding.clone().requires_grad_(trains_unembedding)
        if plain:
            z = u @ w.T
            log_q = torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), dim=-1)
            found = log_q.gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * scored
        else:
            found = head_target_log_probs(u, w, targets, chunk, cap)
        total = (found * weights).sum()
        if total.requires_grad:
            total.backward()
        grads.append((found.detach(), u.grad, w.grad))
    for ours, oracle in zip(grads[1], grads[0], strict=True):
        if oracle is None or ours is None:
            # No row at all was scored, or nothing is trained.
            assert ours is None or not ours.any()
            continue
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-9)


def plain_loss(
    model: NviumForCausalLM, tokens: torch.Tensor, term: str, beta: float
) -> torch.Tensor:
    """The paper's loss, written down without any regard to memory."""
    output = model(tokens, output_head_logits=True, use_cache=False)
    assert output.head_logits is not None and output.margins is not None
    hazards = torch.sigmoid(output.margins[:, :-1])  # [B, T-1, N-1]
    log_q = torch.log_softmax(output.head_logits[:, :-1], dim=-1)  # [B, T-1, N, V]
    target = tokens[:, 1:, None, None].expand(-1, -1, log_q.shape[2], 1)
    heads = log_q.gather(3, target).squeeze(3)  # [B, T-1, N]
    weights, reached = [], torch.ones_like(hazards[..., 0])
    for k in range(hazards.shape[-1]):
        weights.append(reached * hazards[..., k])
        reached = reached * (1 - hazards[..., k])
    pi = torch.stack([*weights, reached], dim=-1)
    loss = -(pi * heads.exp()).sum(-1).log().mean()
    config = model.config
    if term == "warm-up":
        exits = hazards.shape[-1]
        for k in range(exits):
            # N = exits + 1 heads, exits counted from 1: 1 / (N - k + 1).
            loss = loss + ((hazards[..., k] - 1 / (exits + 1 - k)) ** 2).mean()
    else:
        depths = torch.tensor(
            [layer / config.num_hidden_layers for layer in config.exit_layers] + [1.0],
            dtype=pi.dtype,
        )
        loss = loss + beta * (pi * depths).sum(-1).mean()
    if term == "heads":
        loss = loss - heads.mean()
    return loss


@pytest.mark.parametrize("term", ["warm-up", "penalty", "heads"])
@pytest.mark.parametrize("exit_head", ["final", "embeddings", "own"])
def test_loss_and_gradients_equal_float64(term: str, exit_head: str, tmp_path: Path) -> None:
    model = make_nvium(tmp_path / "m", exit_head=exit_head, tied=exit_head == "final")
    model = model.double()
    tokens = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(5))
    results = []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            loss = plain_loss(model, tokens, term, 0.7)
        else:
            output = model(tokens, compute_logits=False, use_cache=False)
            loss, _ = nvium_loss(
                model, output, next_tokens(tokens), term == "warm-up", term == "heads", 0.7
            )
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()
                             if p.grad is not None})
        )  # fmt: skip
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-9)
    assert results[1][1].keys() == results[0][1].keys()
    assert any(name.startswith("exits.0.router") for name in results[0][1])
    for name, oracle in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], oracle, rtol=1e-6, atol=1e-9, msg=name)


def test_no_tensor_of_all_tokens_by_the_vocabulary(tmp_path: Path) -> None:
    """No tensor of logits, forwards or backwards, has more rows than a chunk."""
    model = make_nvium(tmp_path / "m")
    tokens = torch.randint(3, 256, (4, 50), generator=torch.Generator().manual_seed(1))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (256,):
                largest = max(largest, result.numel() // 256)
            return result

    output = model(tokens, compute_logits=False, use_cache=False)
    with Watch():
        mixture, _ = mixture_target_log_probs(model, output, next_tokens(tokens), chunk=100)
        mixture.sum().backward()
    assert largest == 100


def test_warm_up_targets_by_hand() -> None:
    """Four heads: targets 1/4, 1/3, 1/2; hazards of one half miss them by 1/4, 1/6 and 0."""
    margins = torch.zeros(2, 3, 3, dtype=torch.float64)
    assert float(warm_up_penalty(margins)) == pytest.approx(1 / 16 + 1 / 36)
    ideal = torch.tensor(warm_up_margins(3), dtype=torch.float64)
    assert torch.sigmoid(ideal).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2])
    assert float(warm_up_penalty(ideal.expand(2, 3, 3))) == pytest.approx(0.0, abs=1e-15)


def test_compute_penalty_by_hand(tmp_path: Path) -> None:
    """Hazards 1/2, 1/4, 0 at layers 1, 2, 3 of 4: weights .5, .125, 0, .375; depth .5625."""
    model = make_nvium(tmp_path / "m", hazards=[0.5, 0.25, 0.0])
    tokens = torch.randint(3, 256, (1, 8), generator=torch.Generator().manual_seed(1))
    output = model(tokens, compute_logits=False, use_cache=False)
    without, terms = nvium_loss(model, output, next_tokens(tokens), False, False, 0.0)
    with_penalty, _ = nvium_loss(model, output, next_tokens(tokens), False, False, 2.0)
    assert terms["mean_depth"] == pytest.approx(0.5 * 0.25 + 0.125 * 0.5 + 0.375, abs=1e-6)
    assert float((with_penalty - without).detach()) == pytest.approx(2 * 0.5625, abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "dense", "mixture", "expected"),
    [
        (0.15, 3.0, 3.004, 0.15),  # |gap| < .005: hold
        (0.15, 3.0, 2.9, 0.15 + 8 * 0.1),
        (0.5, 3.0, 3.1, 0.5 - 4 * 0.1),
        (0.15, 3.0, 3.2, 0.0),  # never below 0
        (9.9, 3.0, 2.0, 10.0),  # never above 10
        (0.0, 30.0, 3.0, 10.0),  # a change of at most 100, then the bound
    ],
)
def test_controller_by_hand(beta: float, dense: float, mixture: float, expected: float) -> None:
    controller = BetaController(beta)
    assert controller.update(dense, mixture) == pytest.approx(expected)
    assert controller.beta == pytest.approx(expected)


def test_controller_tolerance() -> None:
    """A mixture that may be .02 worse and is .02 worse is where it should be."""
    assert BetaController(1.0, tolerance=0.02).update(3.0, 3.02) == 1.0
    assert BetaController(1.0, tolerance=0.02).update(3.0, 3.0) == pytest.approx(1.16)


def test_the_text_that_steers_is_the_worst() -> None:
    dense = {"prose": 3.0, "code": 2.0, "chat": 1.0}
    assert worst_text(dense, {"prose": 2.5, "code": 2.1, "chat": 0.9}) == (2.0, 2.1)


def test_dense_curve(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lines = [{"step": 10, "val_loss": 4.0}, {"step": 20, "val_loss": 3.0}, {"step": 30}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = dense_curve(path)
    assert [curve(step) for step in (1, 10, 15, 20, 99)] == [4.0, 4.0, 3.5, 3.0, 3.0]


def test_dense_curve_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="history.jsonl of a training run"):
        dense_curve(tmp_path / "missing.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="no line of it holds"):
        dense_curve(empty)
