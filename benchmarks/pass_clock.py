# SPDX-License-Identifier: Apache-2.0
"""Records the passes that plans make and their times. Plans can then be compared at the same mean
pass times, or at given ones, whatever the machine did during their runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_nvium.via_sd.planner.choose import Planner

# Number and seconds of passes, by kind, then by size.
Passes = dict[str, dict[int, list[float]]]


class PassClock(Planner):
    """A planner that records every pass that it observes.

    Attributes:
        given: seconds of a `full` pass, a `slim` pass and one `draft` token, which replace the
            measured ones; everything else takes no time then. None: the measured ones.
    """

    given: dict[str, float] | None = None

    def __init__(self, max_drafts: int, max_window: int) -> None:
        super().__init__(max_drafts, max_window)
        self._passes: list[tuple[str, int, float]] = []

    def taken(self) -> list[tuple[str, int, float]]:
        """Kind, size and seconds of the passes since the last call."""
        passes, self._passes = self._passes, []
        return passes

    def observe_full_pass(self, rows: int, seconds: float) -> None:
        super().observe_full_pass(rows, self._noted("full", rows, seconds))

    def observe_slim_pass(self, rows: int, seconds: float) -> None:
        super().observe_slim_pass(rows, self._noted("slim", rows, seconds))

    def observe_draft_call(self, requests: int, drafts: int, seconds: float) -> None:
        super().observe_draft_call(requests, drafts, self._noted("draft", drafts, seconds))

    def observe_overhead(self, requests: int, seconds: float) -> None:
        super().observe_overhead(requests, self._noted("overhead", requests, seconds))

    def _noted(self, kind: str, size: int, seconds: float) -> float:
        if self.given is not None:
            # A draft model makes one pass even if no draft is wanted.
            seconds = self.given.get(kind, 0.0) * (max(size, 1) if kind == "draft" else 1)
        self._passes.append((kind, size, seconds))
        return seconds


def summed(passes: Iterable[tuple[str, int, float]]) -> Passes:
    """Number and seconds of passes by kind and size."""
    return _added((kind, size, 1, seconds) for kind, size, seconds in passes)


def _added(passes: Iterable[tuple[str, int, float, float]]) -> Passes:
    """Of kind, size, number and seconds."""
    found: Passes = defaultdict(lambda: defaultdict(lambda: [0, 0.0]))
    for kind, size, count, seconds in passes:
        found[kind][size][0] += count
        found[kind][size][1] += seconds
    return {kind: dict(sizes) for kind, sizes in found.items()}


def _each(passes: Passes) -> Iterator[tuple[str, int, float, float]]:
    """Kind, size, number and seconds."""
    for kind, sizes in passes.items():
        for size, (count, seconds) in sizes.items():
            yield kind, size, count, seconds


def at_mean_times(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Seconds of every run, if each pass had taken the mean time of its kind and size in all runs.

        seconds = sum_(kind, size) count mean(kind, size)

    Args:
        runs: by plan, each with its `passes` as `summed` gives them.
    """
    every = [run for of_plan in runs.values() for run in of_plan]
    total = _added(entry for run in every for entry in _each(run["passes"]))

    def seconds_of(run: dict[str, Any]) -> float:
        return sum(
            count * total[kind][size][1] / total[kind][size][0]
            for kind, size, count, _ in _each(run["passes"])
        )

    return {name: [seconds_of(run) for run in of_plan] for name, of_plan in runs.items()}
