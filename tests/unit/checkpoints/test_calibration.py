# SPDX-License-Identifier: Apache-2.0
"""The shift of all hazards that ends a retrofit."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tiny_models import make_nvium
from vllm_nvium.checkpoints.train.calibration import (
    LARGEST_SHIFT,
    find_greedy_margin,
    find_shift,
    shift_margins,
)
from vllm_nvium.checkpoints.train.validation import Observed, depths_of, observe

HALF = torch.tensor([0.5, 1.0])
WORSE = Observed(torch.tensor([[math.log(0.1), math.log(0.4)]]), torch.zeros(1, 1))
EQUAL = Observed(torch.tensor([[math.log(0.3), math.log(0.3)]]), torch.ones(1, 1))


def test_shift_by_hand() -> None:
    """One exit that gives .1 where the final head gives .4: the loss fixes the hazard."""
    # p_mix = 0.1 p + 0.4 (1 - p) = 0.25 at p = 1/2.
    found = find_shift({"a": WORSE}, {"a": -math.log(0.25) + 1e-6}, HALF)
    assert found.reached and found.shift == pytest.approx(0.0, abs=1e-6)
    assert found.depth == pytest.approx(0.75)
    # 0.1 p + 0.4 (1 - p) = 0.34 at p = 0.2, a margin of log(.2 / .8).
    found = find_shift({"a": WORSE}, {"a": -math.log(0.34)}, HALF)
    assert found.shift == pytest.approx(math.log(0.25), abs=0.05) and found.shift <= math.log(0.25)


def test_no_text_pays_for_another() -> None:
    """Alone, the text whose heads agree would open the routers wide."""
    allowed = {"equal": -math.log(0.2), "worse": -math.log(0.25) + 1e-6}
    assert find_shift({"equal": EQUAL}, allowed, HALF).shift == LARGEST_SHIFT
    found = find_shift({"equal": EQUAL, "worse": WORSE}, allowed, HALF)
    assert found.shift == pytest.approx(0.0, abs=1e-6)
    assert found.losses == pytest.approx({"equal": -math.log(0.3), "worse": -math.log(0.25)})


def test_a_loss_that_cannot_be_reached() -> None:
    found = find_shift({"a": WORSE}, {"a": 0.0}, HALF)
    assert not found.reached
    assert found.shift == -LARGEST_SHIFT, "the least loss: nobody leaves"


def test_the_model_has_the_loss_that_was_found(tmp_path: Path) -> None:
    model = make_nvium(tmp_path / "m")
    tokens = torch.randint(3, 256, (4, 40), generator=torch.Generator().manual_seed(3))
    blocks = Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")
    observed = observe(model, blocks, 3)
    assert observed.heads.shape == (4 * 39, 4) and observed.margins.shape == (4 * 39, 3)
    assert depths_of(model).tolist() == [0.25, 0.5, 0.75, 1.0]
    wanted = (observed.loss(0.0) + observed.loss(-2.0)) / 2
    found = find_shift({"a": observed}, {"a": wanted}, depths_of(model))
    shift_margins(model, found.shift)
    with torch.no_grad():
        after = float(model(tokens, labels=tokens, use_cache=False).loss)
    assert after == pytest.approx(found.losses["a"], abs=1e-4)
    assert after <= wanted + 1e-4


def test_greedy_margin_by_hand() -> None:
    """Greedy decoding leaves where the exit alone is good enough, and no lower."""
    heads = torch.tensor([[math.log(0.5), math.log(0.5)], [math.log(0.1), math.log(0.5)]])
    text = Observed(heads, torch.tensor([[2.0], [1.0]]))
    half = -math.log(0.5) + 1e-6
    margin = find_greedy_margin({"a": text}, {"a": half})
    assert margin == pytest.approx(1.0, abs=0.05) and margin >= 1.0 - 1e-5
    assert text.greedy_loss(margin) == pytest.approx(-math.log(0.5))
    mean = -(math.log(0.5) + math.log(0.1)) / 2
    assert find_greedy_margin({"a": text}, {"a": mean + 1e-6}) == -LARGEST_SHIFT
    # One text forbids what another would allow.
    both = {"a": text, "b": Observed(heads[1:], torch.tensor([[3.0]]))}
    assert find_greedy_margin(both, {"a": mean, "b": half}) == pytest.approx(3.0, abs=0.05)
    # Nobody leaves where nothing is good enough.
    impossible = find_greedy_margin({"a": text}, {"a": 0.0})
    assert text.greedy_loss(impossible) == pytest.approx(-math.log(0.5))


def test_a_shift_moves_what_greedy_decoding_picks() -> None:
    assert EQUAL.shifted(-1.5).margins.tolist() == [[-0.5]]
