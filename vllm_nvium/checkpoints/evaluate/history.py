# SPDX-License-Identifier: Apache-2.0
"""The validations of a training run, read back from its `history.jsonl`."""

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_nvium.errors import UserError

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class HistoryPoint:
    """One validation of a training run.

    Attributes:
        step: optimizer steps done.
        val_loss: the mixture's validation loss, nats per token.
        mean_depth: expected share of the layers run, in (0, 1].
        parent_loss: the dense model's loss that it was compared with, if any.
    """

    step: int
    val_loss: float
    mean_depth: float
    parent_loss: float | None = None


def read_history(folder: Path) -> list[HistoryPoint]:
    """The validations in a run folder's `history.jsonl`, by step.

    A last line that was cut short by a crash is left out, and so are lines without a depth. Of
    several lines of one step (a resumed run repeats some) the last one counts.

    Raises:
        UserError: there is no such file, or nothing in it can be drawn.
    """
    file = folder.expanduser() / HISTORY
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
            point = _point(line)
        except (ValueError, TypeError, KeyError) as error:
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


def _point(line: str) -> HistoryPoint | None:
    """`None` where there is no depth, as in the run of a dense twin."""
    values = json.loads(line)
    step, loss, depth = values["step"], values["val_loss"], values["mean_depth"]
    if loss is None or depth is None:
        return None
    parent = values.get("parent_loss")
    return HistoryPoint(
        int(step), float(loss), float(depth), None if parent is None else float(parent)
    )
