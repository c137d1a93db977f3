# SPDX-License-Identifier: Apache-2.0
"""The formulas of `ops/mixture.py` against the products and sums they stand for, and at the edges:
hazards of exactly 0 and 1, heads that were never computed, masked tokens.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nvium.model_executor.ops.mixture import (
    RunningMixture,
    exit_log_weights,
    expected_depth,
    mixture_log_probs,
    taking_part,
)


def products(hazards: list[float]) -> list[float]:
    weights, reached = [], 1.0
    for hazard in hazards:
        weights.append(reached * hazard)
        reached *= 1 - hazard
    return [*weights, reached]


@given(st.lists(st.floats(-8, 8), max_size=5))
def test_weights_are_the_products_of_hazards(margins: list[float]) -> None:
    weights = exit_log_weights(torch.tensor(margins, dtype=torch.float64)).exp()
    expected = products([1 / (1 + math.exp(-margin)) for margin in margins])
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.sampled_from([-math.inf, -1e4, -200.0, 0.0, 200.0, 1e4, math.inf]), max_size=6))
def test_extreme_margins_give_no_nan_and_sum_to_one(margins: list[float]) -> None:
    log_weights = exit_log_weights(torch.tensor(margins))
    assert not log_weights.isnan().any()
    assert log_weights.exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("never", [-1e4, -math.inf])
def test_hazard_zero_leaves_all_to_the_final_head(never: float) -> None:
    weights = exit_log_weights(torch.full((2, 3), never)).exp()
    assert torch.equal(weights, torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2))


@pytest.mark.parametrize("always", [1e4, math.inf])
def test_hazard_one_leaves_nothing_behind_it(always: float) -> None:
    log_weights = exit_log_weights(torch.tensor([-math.inf, always, 0.3]))
    assert torch.equal(log_weights.exp(), torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_infinite_margins_are_exact() -> None:
    log_weights = exit_log_weights(torch.tensor([math.inf, -math.inf]))
    assert log_weights.tolist() == [0.0, -math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    margins = torch.tensor([0.5, -1.25], dtype=dtype)  # exact in all of them
    assert exit_log_weights(margins).dtype == torch.float32
    assert torch.equal(exit_log_weights(margins), exit_log_weights(margins.float()))
    logits = torch.randn(3, 7).to(dtype)
    assert mixture_log_probs(logits, exit_log_weights(margins)).dtype == torch.float32


def test_mixture_is_the_weighted_sum_of_the_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4, 11, dtype=torch.float64, generator=generator)
    log_weights = exit_log_weights(torch.randn(5, 3, dtype=torch.float64, generator=generator))
    expected = torch.zeros(5, 11, dtype=torch.float64)
    for row in range(5):
        for head in range(4):
            expected[row] += log_weights[row, head].exp() * torch.softmax(logits[row, head], dim=0)
    got = mixture_log_probs(logits, log_weights)
    torch.testing.assert_close(got.exp(), expected)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_all_weight_on_one_head_is_that_head_bit_for_bit() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    log_weights = exit_log_weights(torch.full((3,), -1e4))
    assert torch.equal(
        mixture_log_probs(logits, log_weights), torch.log_softmax(logits[-1], dim=-1)
    )


def test_a_head_of_weight_zero_may_hold_nan() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    logits[0] = torch.nan
    log_weights = torch.tensor([-torch.inf, math.log(0.25), math.log(0.75)])
    got = mixture_log_probs(logits, log_weights)
    expected = 0.25 * torch.softmax(logits[1], 0) + 0.75 * torch.softmax(logits[2], 0)
    torch.testing.assert_close(got.exp(), expected)


def test_masked_tokens_stay_impossible() -> None:
    logits = torch.zeros(2, 4)
    logits[:, 1] = -torch.inf
    got = mixture_log_probs(logits, exit_log_weights(torch.tensor([0.0])))
    torch.testing.assert_close(got.exp(), torch.tensor([1 / 3, 0.0, 1 / 3, 1 / 3]))


def test_gradients_are_finite_with_weights_of_zero() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    margins = torch.tensor([-1e4, 0.5], requires_grad=True)
    mixture_log_probs(logits, exit_log_weights(margins))[3].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert margins.grad is not None and margins.grad.isfinite().all()


def test_expected_depth_is_the_mean_share_of_layers() -> None:
    log_weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]).log()
    got = expected_depth(log_weights, [6, 12], 24)
    torch.testing.assert_close(got, torch.tensor([0.5 * 0.25 + 0.25 * 0.5 + 0.25, 1.0]))


def test_expected_depth_refuses_another_number_of_exits() -> None:
    with pytest.raises(ValueError, match="3 columns, and 1 exits need 2"):
        expected_depth(torch.zeros(3), [6], 24)


def running(head_logits: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """`[T, V]` of `[T, N, V]` and `[T, N]`, one head at a time."""
    mixture = RunningMixture(log_weights, head_logits.shape[-1])
    for head, takes_part in enumerate(taking_part(log_weights).T):
        rows = takes_part.nonzero().squeeze(1)
        mixture.add(head, rows, head_logits[rows, head])
    return mixture.logits()


def test_one_head_at_a_time_gives_the_same_law() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(6, 4, 50, generator=generator)
    log_weights = exit_log_weights(torch.randn(6, 3, generator=generator))
    got = torch.log_softmax(running(logits, log_weights), dim=-1)
    torch.testing.assert_close(got, mixture_log_probs(logits, log_weights))


@pytest.mark.parametrize("margins", [[-1e4] * 3, [-torch.inf] * 3, [-1e4, 1e4, 0.0]])
def test_logits_of_a_head_that_has_all_the_weight_are_its_own(margins: list[float]) -> None:
    """So a repetition penalty, which divides logits, does what it does to a dense model."""
    logits = 20 + 5 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(4))
    log_weights = exit_log_weights(torch.tensor([margins, margins]))
    head = int(log_weights[0].argmax())
    assert torch.equal(running(logits, log_weights), logits[:, head])
    assert torch.equal(taking_part(log_weights), log_weights == 0.0)
    mixture = RunningMixture(log_weights, 50)
    mixture.put(torch.tensor([1]), logits[1:, head])
    assert torch.equal(mixture.logits()[1], logits[1, head])


def test_what_is_not_a_number_reaches_the_logits() -> None:
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(5))
    log_weights = exit_log_weights(torch.tensor([[0.0], [torch.nan], [0.0]]))
    logits[2, 1, 4] = torch.nan
    got = running(logits, log_weights)
    assert got[0].isfinite().all() and got[1:].isnan().all()
