# SPDX-License-Identifier: Apache-2.0
"""The picture of an evaluation: which heads the tokens of every text leave at, and how loss and
depth went together over the training run that made the model. Drawn without a display.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vllm_nvium.checkpoints.evaluate.results import Evaluation

# Blue and orange that colour-blind readers tell apart (Okabe and Ito).
SAMPLED_COLOUR, GREEDY_COLOUR = "#0072B2", "#E69F00"
PANELS_PER_ROW = 3
LONGEST_TITLE = 36


def draw(
    path: Path,
    texts: "Mapping[str, Evaluation]",
    history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a PNG: bars of exit shares for every text, and the frontier when there is a history.

    Args:
        path: file to write, whatever its name ends in.
        texts: the evaluation of each text, by the name that stands above its bars.
        history: see `read_history`.
    """
    # A figure made without pyplot is drawn by Agg and leaves the caller's backend alone.
    from matplotlib.figure import Figure

    panels = len(texts) + bool(history)
    columns = min(panels, PANELS_PER_ROW)
    rows = math.ceil(panels / columns)
    heads = max(len(evaluation.depths()) for evaluation in texts.values())
    size = (max(4.6, 1.1 * heads) * columns, 4.2 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, place) for place in range(1, panels + 1)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    for ax, (name, evaluation) in zip(axes, texts.items(), strict=False):
        draw_shares(ax, name, evaluation, in_legend=ax is axes[0])
    if history:
        draw_frontier(axes[-1], history)
    # One legend for all panels, below them, where it can cover nothing.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def draw_shares(ax: "Axes", name: str, evaluation: "Evaluation", in_legend: bool) -> None:
    """Bars of the exit shares of one text, both rules side by side."""
    depths, width = evaluation.depths(), 0.4
    for side, label, colour, use in (
        (-0.5, "exits drawn (temperature 1)", SAMPLED_COLOUR, evaluation.sampled),
        (0.5, "exits greedy (temperature 0)", GREEDY_COLOUR, evaluation.greedy),
    ):
        places = [k + side * width for k in range(len(depths))]
        percent = [100 * share for share in use.shares]
        bars = ax.bar(places, percent, width, color=colour, label=label if in_legend else None)
        numbers = ["100" if value >= 99.95 else f"{value:.1f}" for value in percent]
        ax.bar_label(bars, numbers, fontsize=8, padding=1)
    names = [f"exit {k}" for k in range(1, len(depths))] + ["final"]
    ticks = [
        f"{head}\n{layer_count(depth)}\n{depth / evaluation.num_layers:.0%}"
        for head, depth in zip(names, depths, strict=True)
    ]
    ax.set_xticks(range(len(depths)), ticks, fontsize=9)
    ax.set_xlabel("head (layers run before it, share of all layers)")
    ax.set_ylabel("share of tokens (%)")
    ax.margins(y=0.12)  # room for the numbers on the bars
    ax.set_title(
        f"{shortened(name, LONGEST_TITLE)}\nmean depth {evaluation.sampled.mean_depth:.1%} drawn, "
        f"{evaluation.greedy.mean_depth:.1%} greedy",
        fontsize=10,
    )


def draw_frontier(ax: "Axes", history: Sequence[Mapping[str, Any]]) -> None:
    """Validation loss over mean depth, one point per validation of the run."""
    depth = [100 * line["mean_depth"] for line in history]
    loss = [line["val_loss"] for line in history]
    steps = [line["step"] for line in history]
    ax.plot(depth, loss, color="0.8", linewidth=1, zorder=1)
    points = ax.scatter(depth, loss, c=steps, cmap="viridis", s=28, zorder=2)
    ax.figure.colorbar(points, ax=ax, label="training step")
    if (parent := history[-1].get("parent_loss")) is not None:
        label = "loss of the dense model"
        ax.axhline(parent, color="black", linestyle="--", linewidth=1, label=label)
    ax.ticklabel_format(useOffset=False)
    ax.set_xlabel("mean depth (% of the layers)")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title("over training", fontsize=10)


def layer_count(number: int) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} layer{'' if number == 1 else 's'}"


def shortened(name: str, longest: int) -> str:
    """A name cut so that a heading stays readable."""
    return name if len(name) <= longest else name[: longest - 3] + "..."
