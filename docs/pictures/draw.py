# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/architecture.md into this folder: `python docs/pictures/draw.py`.
Needs matplotlib, which the extra `train` brings; `--png FOLDER` also writes PNGs to look at."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
DONE, OWN, CAUGHT, OPEN = "#c9ced6", "#4c8dd9", "#f0a53a", "#ffffff"
KEPT, SLIM, REFUSED = "#7fc08a", "#b39ddb", "#f4c7c3"
EDGE, TEXT = "#4a4f57", "#1f2328"


def cell(ax: Axes, x: float, y: float, color: str, text: str = "", *, dashed: bool = False) -> None:
    ax.add_patch(
        Rectangle(
            (x + 0.04, y + 0.06),
            0.92,
            0.88,
            facecolor=color,
            edgecolor=EDGE,
            linewidth=0.8,
            linestyle=":" if dashed else "-",
        )
    )
    if text:
        ax.text(x + 0.5, y + 0.48, text, ha="center", va="center", fontsize=8.5, color=TEXT)


def say(ax: Axes, x: float, y: float, text: str, **style: object) -> None:
    ax.text(x, y, text, **{"va": "center", "fontsize": 8.5, "color": TEXT, **style})


# ---- N-vium: positions across, segments upwards

SEGMENTS = 4
PANEL = 7.2  # height of one panel


def nvium_panel(
    ax: Axes,
    bottom: float,
    title: str,
    before: list[int],
    runs: dict[int, list[int]],
    leaves: str,
    blocks: list[str] | None = None,
) -> None:
    """One step of one request.

    Args:
        bottom: where segment 0 stands in the picture.
        before: marks of the positions that were there; the step adds one position.
        runs: segment -> positions that it runs.
        leaves: what becomes of the newest token.
        blocks: whose blocks of four positions they are.
    """
    newest = len(before)
    say(ax, -3.1, bottom + SEGMENTS + 0.55, title, weight="bold", fontsize=9.5)
    marks = [*before, 0]
    for segment in range(SEGMENTS):
        y = bottom + segment
        say(ax, -0.2, y + 0.5, f"segment {segment}", ha="right")
        for position in range(newest + 1):
            if position in runs.get(segment, []):
                cell(ax, position, y, OWN if position == newest else CAUGHT)
                assert marks[position] == segment
                marks[position] = segment + 1
            elif position < newest and before[position] > segment:
                cell(ax, position, y, DONE)
            else:
                cell(ax, position, y, OPEN, dashed=True)
    say(ax, -0.2, bottom - 0.55, "mark after", ha="right")
    for position, mark in enumerate(marks):
        say(ax, position + 0.5, bottom - 0.55, str(mark), ha="center", weight="bold")
    say(ax, newest + 1.3, bottom + max(runs) + 0.5, leaves)
    if blocks:
        say(ax, -0.2, bottom - 1.55, "block of", ha="right")
        for number, owner in enumerate(blocks):
            first, last = 4 * number, min(4 * number + 4, newest + 1)
            ax.plot([first + 0.1, last - 0.1], [bottom - 1.05] * 2, color=EDGE, lw=1.2)
            say(ax, (first + last) / 2, bottom - 1.55, owner, ha="center")


def nvium() -> Figure:
    figure, ax = plt.subplots(figsize=(8.6, 12.2))
    ax.set_xlim(-3.3, 19.5)
    ax.set_ylim(-2.2, 4 * PANEL + 0.6)
    ax.set_aspect("equal")
    ax.axis("off")
    for x, color, text in (
        (-3.0, DONE, "run in an earlier step"),
        (4.3, OWN, "the newest token"),
        (10.0, CAUGHT, "caught up in this step"),
        (17.2, OPEN, "not run"),
    ):
        cell(ax, x, 4 * PANEL - 0.9, color, dashed=color == OPEN)
        say(ax, x + 1.2, 4 * PANEL - 0.4, text)
    nvium_panel(
        ax,
        3 * PANEL,
        "1. The newest token leaves at exit 1: one segment is run, its state waits",
        [4, 4, 4, 4, 1, 1],
        {0: [6]},
        "leaves at exit 1",
    )
    nvium_panel(
        ax,
        2 * PANEL,
        "2. The next token goes past exit 1: what waits for segment 1 joins the pass",
        [4, 4, 4, 4, 1, 1, 1],
        {0: [7], 1: [4, 5, 6, 7]},
        "leaves at exit 2",
    )
    nvium_panel(
        ax,
        PANEL,
        "3. The next goes to the end: each segment runs what waits for it, and no more",
        [4, 4, 4, 4, 2, 2, 2, 2],
        {0: [8], 1: [8], 2: [4, 5, 6, 7, 8], 3: [4, 5, 6, 7, 8]},
        "the final head speaks",
    )
    nvium_panel(
        ax,
        0,
        "4. Blocks of several requests: marks are in no order, a pass is made of ranges",
        [4, 4, 4, 4, 1, 1, 1, 1, 4, 4, 4, 4, 1],
        {0: [13], 1: [4, 5, 6, 7, 12, 13]},
        "leaves at exit 2",
        ["request A", "request B", "request A", "its own"],
    )
    return figure


# ---- VIA-SD: positions across, time downwards


def strip(ax: Axes, y: float, label: str, tokens: list[tuple[int, str, str]], note: str) -> None:
    say(ax, -0.3, y + 0.5, label, ha="right")
    for x, text, color in tokens:
        cell(ax, x, y, color, text)
    if note:
        say(ax, 12.4, y + 0.5, note)


def via_sd() -> Figure:
    figure, ax = plt.subplots(figsize=(12.2, 6.6))
    ax.set_xlim(-6.2, 25.0)
    ax.set_ylim(-12.6, 2.0)
    ax.set_aspect("equal")
    ax.axis("off")
    for x, color, text in (
        (-5.9, OWN, "the full model's token"),
        (0.9, OPEN, "a draft"),
        (4.4, KEPT, "a draft that was kept"),
        (10.6, REFUSED, "refused"),
        (14.0, SLIM, "the slim verifier's token"),
    ):
        cell(ax, x, 0.9, color)
        say(ax, x + 1.2, 1.4, text)

    strip(
        ax, -1.0, "full pass", [(0, "t", OWN)],
        "vLLM's step: the last window is verified, t is the newest token",
    )  # fmt: skip
    strip(
        ax, -2.4, "drafter",
        [(1, "d1", OPEN), (2, "d2", OPEN), (3, "d3", OPEN), (4, "d4", OPEN)],
        "vLLM's drafter answers; the planner has chosen how many",
    )  # fmt: skip
    strip(
        ax, -3.8, "slim pass",
        [(0, "t", OWN), (1, "d1", KEPT), (2, "d2", KEPT), (3, "d3", REFUSED), (4, "d4", REFUSED)],
        "rows [t, d1..d4] of the target without some layers",
    )  # fmt: skip
    strip(
        ax, -5.2, "tier rule", [(1, "d1", KEPT), (2, "d2", KEPT), (3, "s1", SLIM)],
        "a prefix of the drafts, and a token of the slim verifier",
    )  # fmt: skip
    strip(
        ax, -6.6, "drafter", [(4, "d5", OPEN), (5, "d6", OPEN), (6, "d7", OPEN), (7, "d8", OPEN)],
        "again from s1: a second round, if the planner expects a gain",
    )  # fmt: skip
    strip(
        ax, -8.0, "slim pass and rule",
        [(3, "s1", SLIM), (4, "d5", KEPT), (5, "d6", KEPT), (6, "d7", KEPT), (7, "d8", KEPT),
         (8, "s2", SLIM)],
        "all kept: s2 stands behind the last",
    )  # fmt: skip
    window = [
        (1, "d1"),
        (2, "d2"),
        (3, "s1"),
        (4, "d5"),
        (5, "d6"),
        (6, "d7"),
        (7, "d8"),
        (8, "s2"),
    ]
    strip(
        ax, -9.8, "window",
        [(x, text, SLIM if text[0] == "s" else KEPT) for x, text in window],
        "to vLLM these are the drafts of the next step",
    )  # fmt: skip
    strip(
        ax, -11.2, "next full pass",
        [(0, "t", OWN),
         *((x, text, KEPT if x < 7 else REFUSED) for x, text in window[:7]), (8, "s2", REFUSED)],
        "rows [t, window]; what it does not say itself goes, and it",
    )  # fmt: skip
    say(ax, 12.4, -11.5, "adds a token. Its K/V replace all that the slim passes wrote")
    ax.plot([-6.0, 24.6], [-8.45, -8.45], color=EDGE, lw=0.8, ls="--")
    ax.plot([-6.0, 24.6], [-1.2, -1.2], color=EDGE, lw=0.8, ls="--")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, help="folder for PNGs")
    args = parser.parse_args()
    # The same file every time, and letters that look the same everywhere.
    plt.rcParams.update({"svg.hashsalt": "vllm-nvium", "svg.fonttype": "path"})
    for name, figure in (("nvium_step", nvium()), ("via_sd_step", via_sd())):
        style = {"bbox_inches": "tight", "facecolor": "white", "pad_inches": 0.1}
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, **style)
        if args.png:
            figure.savefig(args.png / f"{name}.png", dpi=90, **style)


if __name__ == "__main__":
    main()
