# SPDX-License-Identifier: Apache-2.0
"""The picture of an evaluation: which heads the tokens of every text leave at, and how loss and
depth went together over the training run that made the model. Drawn without a display.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm_nvium.checkpoints.evaluate.measure import Evaluation, ExitUse

HISTORY = "history.jsonl"
# Blue and orange that colour-blind readers tell apart (Okabe and Ito).
SAMPLED_COLOUR, GREEDY_COLOUR = "#0072B2", "#E69F00"
PANELS_PER_ROW = 3
LONGEST_TITLE = 36


@dataclass(frozen=True)
class HistoryPoint:
    """One validation of a training run.

    Attributes:
        step: optimizer steps done.
        val_loss: the mixture's validation loss, nats per token.
        mean_depth: expected share of the layers run, in (0, 1].
        parent_loss: the dense model's loss that it was compared with, if any.
        beta: weight of the compute penalty, if recorded.
    """

    step: int
    val_loss: float
    mean_depth: float
    parent_loss: float | None = None
    beta: float | None = None


def read_history(folder: Path) -> list[HistoryPoint]:
    """The validations in a run folder's `history.jsonl`, by step.

    A last line that was cut short by a crash is left out, and so are lines without a depth. Of
    several lines of one step (a resumed run repeats some) the last one counts.

    Raises:
        UserError: there is no such file, or nothing in it can be drawn.
    """
    file = folder / HISTORY
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--history is {str(folder)!r}, and the folder of a training run with a readable "
            f"{HISTORY} is needed."
        ) from error
    points: dict[int, HistoryPoint] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            point = _history_point(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {file} is no JSON object with step, val_loss and mean_depth as "
                "a training run writes it."
            ) from error
        if point is not None:
            points[point.step] = point
    if not points:
        raise UserError(
            f"--history is {str(folder)!r}, whose {HISTORY} has no line with val_loss and "
            "mean_depth; the run of an N-vium model with at least one validation is needed."
        )
    return [points[step] for step in sorted(points)]


def _history_point(line: Mapping[str, Any]) -> HistoryPoint | None:
    if line["val_loss"] is None or line["mean_depth"] is None:  # a dense twin has no depth
        return None
    return HistoryPoint(
        step=int(line["step"]),
        val_loss=float(line["val_loss"]),
        mean_depth=float(line["mean_depth"]),
        parent_loss=_number(line.get("parent_loss")),
        beta=_number(line.get("beta")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def draw(
    path: Path, texts: Mapping[str, "Evaluation"], history: Sequence[HistoryPoint] = ()
) -> None:
    """Write a PNG: bars of exit shares for every text, and the frontier when there is a history.

    Args:
        path: file to write, whatever its name ends in.
        texts: the evaluation of each text, by the name that stands above its bars.
    """
    panels = len(texts) + bool(history)
    columns = min(panels, PANELS_PER_ROW)
    heads = max(len(evaluation.depths) for evaluation in texts.values())
    figure = _new_figure(panels, columns, panel_width=max(4.6, 1.1 * heads))
    axes = [figure.add_subplot(math.ceil(panels / columns), columns, i + 1) for i in range(panels)]
    for ax, (name, evaluation) in zip(axes, texts.items(), strict=False):
        draw_shares(ax, name, evaluation)
    if history:
        draw_frontier(ax=axes[-1], history=history)
    # One legend for all panels, below them, where it can cover nothing.
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, format="png", dpi=150)


def _new_figure(panels: int, columns: int, panel_width: float) -> "Figure":
    # A figure made without pyplot is drawn by Agg and leaves the caller's backend alone.
    from matplotlib.figure import Figure

    rows = math.ceil(panels / columns)
    return Figure(figsize=(panel_width * columns, 4.2 * rows + 0.4), layout="constrained")


def draw_shares(ax: "Axes", name: str, evaluation: "Evaluation") -> None:
    """Bars of the exit shares of one text, both rules side by side."""
    rules: list[tuple[str, str, ExitUse]] = [
        ("exits drawn (temperature 1)", SAMPLED_COLOUR, evaluation.sampled),
        ("exits greedy (temperature 0)", GREEDY_COLOUR, evaluation.greedy),
    ]
    depths, width = evaluation.depths, 0.4
    for i, (label, colour, use) in enumerate(rules):
        places = [k + (i - 0.5) * width for k in range(len(depths))]
        percent = [100 * share for share in use.shares]
        bars = ax.bar(places, percent, width, color=colour, label=label)
        ax.bar_label(bars, [_short(value) for value in percent], fontsize=8, padding=1)
    names = [f"exit {k}" for k in range(1, len(depths))] + ["final"]
    ax.set_xticks(
        range(len(depths)),
        [
            f"{head}\n{layer_count(depth)}\n{depth / evaluation.num_layers:.0%}"
            for head, depth in zip(names, depths, strict=True)
        ],
        fontsize=9,
    )
    ax.set_xlabel("head (layers run before it, share of all layers)")
    ax.set_ylabel("share of tokens (%)")
    ax.margins(y=0.12)  # room for the numbers on the bars
    ax.set_title(
        f"{_title(name)}\nmean depth {evaluation.sampled.mean_depth:.1%} drawn, "
        f"{evaluation.greedy.mean_depth:.1%} greedy",
        fontsize=10,
    )
    ax.spines[["top", "right"]].set_visible(False)


def draw_frontier(ax: "Axes", history: Sequence[HistoryPoint]) -> None:
    """Validation loss over mean depth, one point per validation of the run."""
    depth = [100 * point.mean_depth for point in history]
    loss = [point.val_loss for point in history]
    steps = [point.step for point in history]
    ax.plot(depth, loss, color="0.8", linewidth=1, zorder=1)
    points = ax.scatter(depth, loss, c=steps, cmap="viridis", s=28, zorder=2)
    ax.figure.colorbar(points, ax=ax, label="training step")
    parent = [point.parent_loss for point in history if point.parent_loss is not None]
    if parent:
        ax.axhline(
            parent[-1], color="black", linestyle="--", linewidth=1, label="loss of the dense model"
        )
    ax.ticklabel_format(useOffset=False)
    ax.set_xlabel("mean depth (% of the layers)")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title("over training", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def layer_count(number: int) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} layer{'' if number == 1 else 's'}"


def _short(percent: float) -> str:
    return "100" if percent >= 99.95 else f"{percent:.1f}"


def _title(name: str) -> str:
    return name if len(name) <= LONGEST_TITLE else name[: LONGEST_TITLE - 3] + "..."
