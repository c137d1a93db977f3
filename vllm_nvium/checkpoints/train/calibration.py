# SPDX-License-Identifier: Apache-2.0
"""The last step of a retrofit: one number, added to every router's margin, with which the mixture
is as good as the dense parent on each text that it was not trained on, and one that does the same
for what greedy decoding picks. The controller steers to within what a few thousand tokens can tell;
this uses more of them, and costs two passes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_nvium.checkpoints.train.validation import Losses, Observed, depths_of, observe
from vllm_nvium.console import say, table
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

# Log-odds; beyond these a router is as good as closed or wide open.
LARGEST_SHIFT = 8.0
STEP = 0.05
TRIED = torch.linspace(-LARGEST_SHIFT, LARGEST_SHIFT, round(2 * LARGEST_SHIFT / STEP) + 1).tolist()


@dataclass(frozen=True)
class Calibration:
    """What `find_shift` chose.

    Attributes:
        shift: added to every margin.
        losses: of the mixture with it, by text.
        depth: mean share of layers, over texts.
        reached: whether every loss is at most what was asked for; if not, the largest excess is
            the least possible.
    """

    shift: float
    losses: dict[str, float]
    depth: float
    reached: bool


def calibrate(
    model: NviumForCausalLM,
    texts: dict[str, Any],
    parent: Losses,
    tolerance: float,
    batch_size: int,
) -> dict[str, Any]:
    """Calibrates a model in place, and says how.

    Args:
        texts: name -> dataset of `input_ids` and `labels`, `[T]` each.
        parent: losses of the dense parent on them.
        tolerance: how much worse than the parent the model may be, nats per token.

    Returns:
        what the record of the run keeps of it.
    """
    model.eval()
    observed = {name: observe(model, text, batch_size) for name, text in texts.items()}
    largest = {name: loss + tolerance for name, loss in parent.by_text.items()}
    found = find_shift(observed, largest, depths_of(model))
    shift_margins(model, found.shift)
    shifted = {name: text.shifted(found.shift) for name, text in observed.items()}
    greedy_margin = model.config.greedy_margin = find_greedy_margin(shifted, largest)
    greedy = {name: text.greedy_loss(greedy_margin) for name, text in shifted.items()}
    _report(found, greedy_margin, greedy, parent)
    return asdict(found) | {"greedy_margin": greedy_margin, "greedy_losses": greedy}


def _report(
    found: Calibration, greedy_margin: float, greedy: dict[str, float], parent: Losses
) -> None:
    say(f"Calibrated: margins shifted by {found.shift:+.2f}, {found.depth:.1%} of the layers run.")
    say(f"At temperature 0 tokens leave where the margin exceeds {greedy_margin:.2f}.")
    rows = [
        (name, f"{loss:.4f}", f"{greedy[name]:.4f}", f"{parent.by_text[name]:.4f}")
        for name, loss in found.losses.items()
    ]
    table([("text", "loss", "greedy", "parent's"), *rows], numbers=True)
    if not found.reached:
        say("No shift makes the mixture as good as the parent on every text.")


def find_shift(
    texts: dict[str, Observed], largest: dict[str, float], depths: torch.Tensor
) -> Calibration:
    """The largest shift with which no text's loss exceeds what is allowed for it.

    Every shift up makes more tokens leave early.

    Args:
        texts: what was observed on each.
        largest: nats per token, by text.
        depths: `[N]`, share of the layers in front of each head.
    """

    def excess(shift: float) -> float:
        return max(text.loss(shift) - largest[name] for name, text in texts.items())

    tried = {shift: excess(shift) for shift in TRIED}
    good = [shift for shift, found in tried.items() if found <= 0.0]
    shift = max(good) if good else min(tried, key=lambda shift: tried[shift])
    return Calibration(
        shift=shift,
        losses={name: text.loss(shift) for name, text in texts.items()},
        depth=sum(text.depth(shift, depths) for text in texts.values()) / len(texts),
        reached=bool(good),
    )


def find_greedy_margin(texts: dict[str, Observed], largest: dict[str, float]) -> float:
    """The smallest margin from which on no text's greedy loss exceeds what is allowed for it.

    A hazard that pays in a mixture, where the deeper heads hold the rest, may be more than the exit
    is worth alone; greedy decoding asks more of it. Where no margin will do, nobody leaves.

    Args:
        texts: what was observed on each.
        largest: nats per token, by text.
    """
    nobody = max(float(text.margins.max()) for text in texts.values())
    margin = max(nobody, LARGEST_SHIFT)
    for tried in reversed(TRIED):
        if any(text.greedy_loss(tried) > largest[name] for name, text in texts.items()):
            break
        margin = tried
    return margin


@torch.no_grad()
def shift_margins(model: NviumForCausalLM, shift: float) -> None:
    """Adds `shift` to every margin `e - c`."""
    for exit_ in model.exits:
        exit_.router.head.bias[1] += shift
