# SPDX-License-Identifier: Apache-2.0
"""The weight `beta` of the compute penalty, steered so that the mixture costs no quality: it rises
while the mixture is better than the dense model and falls while it is worse (arXiv:2605.13190, the
controller of the largest run).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_nvium.checkpoints.train.folder import check_twin
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.train.retrofit import Start


@dataclass
class BetaController:
    """`gap = CE_dense - CE_mix`, in nats per token; `update` is called every few per cent of steps.

        |gap| < 0.005   beta stays
        gap > 0         beta += min(8 gap, 100),  at most 10
        gap < 0         beta += max(4 gap, -100), at least 0

    Attributes:
        beta: the present weight.
        tolerance: added to the gap: a mixture that may be this much worse counts as equal.
    """

    beta: float
    tolerance: float = 0.0
    hold: float = 0.005
    rise: float = 8.0
    fall: float = 4.0
    largest_change: float = 100.0
    largest: float = 10.0

    def update(self, dense_loss: float, mixture_loss: float) -> float:
        """Takes both losses at the same step and returns the new `beta`."""
        gap = dense_loss - mixture_loss + self.tolerance
        if gap >= self.hold:
            change = min(self.rise * gap, self.largest_change)
        elif gap <= -self.hold:
            change = max(self.fall * gap, -self.largest_change)
        else:
            change = 0.0
        self.beta = min(max(self.beta + change, 0.0), self.largest)
        return self.beta


class DenseCurve:
    """Validation loss of a dense twin over training, as its run's `history.jsonl` holds it.

    Raises:
        UserError: the file is missing or holds no losses.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"--controller is {str(path)!r}, which cannot be read as the history.jsonl of a "
                f"dense run ({error})."
            ) from error
        self.losses = {int(line["step"]): float(line["val_loss"]) for line in lines if _fits(line)}
        if not self.losses:
            raise UserError(
                f"--controller is {str(path)!r}, and no line of it holds step and val_loss as the "
                "history.jsonl of a dense run does."
            )

    def at(self, step: int) -> float:
        """Loss at `step`, linear between the steps that were measured, flat outside of them."""
        steps = sorted(self.losses)
        after = next((s for s in steps if s >= step), steps[-1])
        before = next((s for s in reversed(steps) if s <= step), steps[0])
        if before == after:
            return self.losses[before]
        share = min(max((step - before) / (after - before), 0.0), 1.0)
        return (1 - share) * self.losses[before] + share * self.losses[after]


@dataclass(frozen=True)
class Steering:
    """What a run's beta is steered by.

    Attributes:
        kind: the dense parent's losses, the curve of a dense twin, or nothing.
        curve: mean validation loss of the twin at a step.
    """

    kind: Literal["parent", "curve", "off"]
    curve: Callable[[int], float] | None = None


def steering_of(options: TrainOptions, start: "Start") -> Steering:
    """What `--controller` means for a start.

    Raises:
        UserError: there is no such parent or curve.
    """
    has_parent = start.has_parent or bool(options.dense)
    given = options.controller or ("parent" if has_parent else "off")
    if given == "off":
        return Steering("off")
    if start.is_dense:
        raise UserError(f"--controller is {given!r}, and a dense model has nothing to steer.")
    if given != "parent":
        history = Path(given).expanduser()
        check_twin(history, options)
        return Steering("curve", DenseCurve(history).at)
    if not has_parent:
        raise UserError(
            f"--controller is 'parent', and {options.model} is no dense model whose loss could be "
            "measured: give its parent with --dense, or 'off'."
        )
    return Steering("parent")


def _fits(line: Any) -> bool:
    return isinstance(line, Mapping) and "step" in line and line.get("val_loss") is not None
