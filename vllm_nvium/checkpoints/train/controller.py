# SPDX-License-Identifier: Apache-2.0
"""The weight `beta` of the compute penalty, steered so that the mixture costs no quality: it rises
while the mixture is better than the dense model and falls while it is worse (arXiv:2605.13190, the
controller of the largest run).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vllm_nvium.checkpoints.evaluate.history import read_history
from vllm_nvium.checkpoints.train.folder import check_twin
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.train.retrofit import Start

HOLD, RISE, FALL, LARGEST = 0.005, 8.0, 4.0, 10.0

# Mean validation loss of a dense twin at a step.
Curve = Callable[[int], float]


@dataclass
class BetaController:
    """`gap = CE_dense - CE_mix`, in nats per token; `update` is called every few per cent of steps.

        |gap| < 0.005   beta stays
        gap > 0         beta += 8 gap, at most 10
        gap < 0         beta += 4 gap, at least 0

    (The paper also bounds a change to 100, which nothing reaches between 0 and 10.)

    Attributes:
        beta: the present weight.
        tolerance: added to the gap: a mixture that may be this much worse counts as equal.
    """

    beta: float
    tolerance: float = 0.0

    def update(self, dense_loss: float, mixture_loss: float) -> float:
        """Takes both losses at the same step and returns the new `beta`."""
        gap = dense_loss - mixture_loss + self.tolerance
        if abs(gap) >= HOLD:
            self.beta += (RISE if gap > 0 else FALL) * gap
        self.beta = min(max(self.beta, 0.0), LARGEST)
        return self.beta


def dense_curve(history: Path) -> Curve:
    """Validation loss of a dense twin over training, as its run's `history.jsonl` holds it: linear
    between the steps that were measured, flat outside of them.
    """
    lines = read_history(history, "--controller", "step", "val_loss")
    steps, losses = ([line[name] for line in lines] for name in ("step", "val_loss"))
    return lambda step: float(np.interp(step, steps, losses))


def steering_of(options: TrainOptions, start: "Start") -> Curve | Literal["parent", "off"]:
    """What `--controller` means for a start: the dense parent's losses, the curve of a dense twin,
    or nothing.

    Raises:
        UserError: there is no such parent or curve.
    """
    has_parent = start.has_parent or bool(options.dense)
    given = options.controller or ("parent" if has_parent else "off")
    if given == "off":
        return "off"
    if start.is_dense:
        raise UserError(f"--controller is {given!r}, and a dense model has nothing to steer.")
    if given != "parent":
        history = Path(given).expanduser()
        check_twin(history, options)
        return dense_curve(history)
    if not has_parent:
        raise UserError(
            f"--controller is 'parent', and {options.model} is no dense model whose loss could be "
            "measured: give its parent with --dense, or 'off'."
        )
    return "parent"
