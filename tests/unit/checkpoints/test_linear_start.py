# SPDX-License-Identifier: Apache-2.0
"""The least-squares start of a retrofit's exits, against what it must recover."""

from pathlib import Path

import pytest
import torch

from tiny_models import make_nvium
from vllm_nvium.checkpoints.train.linear_start import (
    fit_linear_maps,
    low_rank,
    set_linear,
    start_linear,
)
from vllm_nvium.model_executor.models.nvium_reference import NviumAdapter


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_adapter_becomes_the_linear_map() -> None:
    adapter = NviumAdapter(6, 9)
    up, down, x = random(6, 4), random(4, 6, seed=1), random(5, 6, seed=2)
    set_linear(adapter, up, down)
    torch.testing.assert_close(adapter(x), x + x @ down.T @ up.T, rtol=1e-5, atol=1e-5)


def test_low_rank_is_exact_at_full_rank_and_best_below_it() -> None:
    change, weights, states = random(6, 6), random(40, 6, seed=1), random(200, 6, seed=2)
    states[:, 0] *= 10
    metric, moments = weights.T @ weights, states.T @ states / 200
    up, down = low_rank(change, moments, metric, 6)
    torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-4)

    def error(product: torch.Tensor) -> float:
        return float(((states @ (change - product).T) @ weights.T).square().mean())

    up, down = low_rank(change, moments, metric, 2)
    best = error(up @ down)
    u, s, v = torch.linalg.svd(change)
    assert best < error((u[:, :2] * s[:2]) @ v[:2]), "plain truncation ignores what states occur"
    for seed in range(20):
        noise = 0.05 * random(6, 2, seed=seed)
        assert best <= error((up + noise) @ down)
        assert best <= error(up @ (down + noise.T))


def test_maps_are_the_least_squares_solution(tmp_path: Path) -> None:
    model = make_nvium(tmp_path / "m", exit_layers=[2])
    tokens = torch.randint(3, 256, (4, 100), generator=torch.Generator().manual_seed(3))
    maps, moments = fit_linear_maps(model, tokens.split(2), ridge=0.0)
    with torch.no_grad():
        residuals, final = model.residuals(input_ids=tokens)
        normed = model.exits[0].norm(residuals[0]).reshape(-1, 64)
    oracle = torch.linalg.lstsq(normed.double(), final.reshape(-1, 64).double()).solution.T
    torch.testing.assert_close(maps[0].double(), oracle, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moments[0], normed.T @ normed / 400, rtol=1e-4, atol=1e-4)


def test_start_brings_an_exit_near_the_final_head(tmp_path: Path) -> None:
    model = make_nvium(tmp_path / "m", exit_layers=[3], exit_adapter_size=128)
    tokens = torch.randint(3, 256, (8, 200), generator=torch.Generator().manual_seed(3))

    def distance() -> float:
        with torch.no_grad():
            residuals, final = model.residuals(input_ids=tokens)
            exit_ = model.exits[0]
            return float((exit_.adapter(exit_.norm(residuals[0])) - final).square().mean())

    before = distance()
    start_linear(model, tokens.split(4))
    maps, _ = fit_linear_maps(model, tokens.split(4))
    with torch.no_grad():
        residuals, final = model.residuals(input_ids=tokens)
        normed = model.exits[0].norm(residuals[0])
    assert distance() == pytest.approx(
        float((normed @ maps[0].T - final).square().mean()), rel=1e-2
    )
    assert distance() < 0.5 * before
