# SPDX-License-Identifier: Apache-2.0
"""The numbers of N-vium: what left where, how deep steps went, and what had to catch up. The table
below is all that /metrics and the log line are made of; `engine/stats.py` carries them.
"""

import itertools
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_nvium.engine.prefix_cache import COMPLETE
from vllm_nvium.engine.request_metrics import Level, TokenNotes
from vllm_nvium.engine.stats import (
    Counts,
    MethodStatLogger,
    Metric,
    Reporter,
    percent,
    ratio,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_nvium.model_executor.nvium.step import Step

logger = logging.getLogger("vllm.nvium")


@dataclass(slots=True)
class NviumCounts(Counts):
    """Sums.

    Attributes:
        exit_tokens: [N] tokens by the exit that they left at; the last is the final head. A token
            of the mixture counts for the exit that settled it.
        step_depths: [N] steps by the segments that they ran, from one.
        forced_steps: steps that went on although every token had its head, because a request, or
            all of the step together, had left too much behind, or the side cache was full.
        caught_up_rows, caught_up_passes: rows that earlier steps had left behind, summed over the
            segments that ran on them, and how many segments had such rows.
        row_layers: layers run, summed over rows; dense_row_layers: what a dense model runs for the
            same steps.
    """

    exit_tokens: list[int] = field(default_factory=list)
    step_depths: list[int] = field(default_factory=list)
    forced_steps: int = 0
    caught_up_rows: int = 0
    caught_up_passes: int = 0
    row_layers: int = 0
    dense_row_layers: int = 0


def no_counts(num_segments: int) -> NviumCounts:
    """Nothing yet."""
    return NviumCounts([0] * num_segments, [0] * num_segments)


class StepObserver(TokenNotes):
    """Sums up the steps of a model runner, and notes the exit that each new token left at, from 0;
    the last is the final head.

    Args:
        segment_layers: layers of each segment.
        asked: of the requests: which want to be told of their tokens.
        told: of the requests: what the scheduler has to hear of them.
    """

    def __init__(
        self,
        segment_layers: Sequence[int],
        asked: Mapping[str, Level],
        told: MutableMapping[str, int | None],
    ) -> None:
        self.layers = list(segment_layers)
        self.told = told
        super().__init__(asked, "nvium", scale=list(itertools.accumulate(self.layers)))
        self.reporter = Reporter(no_counts(len(segment_layers)))
        self.deferred = 0

    def observe(self, step: "Step", sampled: np.ndarray) -> None:
        """One step that has run.

        Args:
            sampled: [R] bool, requests that get a token from it.
        """
        # Plain numbers, because a step has few segments, and an array's every operation takes
        # microseconds.
        counts, batch, depth = self.reporter.counts, step.batch, step.depth
        for left_at, tokens in enumerate(np.bincount(step.exits[sampled]).tolist()):
            counts.exit_tokens[left_at] += tokens
        counts.step_depths[depth - 1] += 1
        counts.forced_steps += step.is_forced
        for rows, layers in zip(step.rows_run, self.layers[:depth], strict=True):
            caught_up = rows - batch.num_rows
            counts.caught_up_rows += caught_up
            counts.caught_up_passes += caught_up > 0
            counts.row_layers += rows * layers
        counts.dense_row_layers += batch.num_rows * sum(self.layers)
        # At full depth nothing of these requests is left behind.
        self.deferred = 0
        if depth < len(self.layers):
            self.deferred = int((batch.last + 1 - batch.complete).sum())
        if self.anybody:
            layers = sum(self.layers[:depth])
            exits = step.exits.tolist()
            for row in np.flatnonzero(sampled).tolist():
                self.note(step.request_ids[row], [exits[row]], layers)

    def report(self) -> dict[str, Any]:
        """For the output of the step."""
        report = self.with_notes(self.reporter.report(deferred=self.deferred))
        if self.told:
            report[COMPLETE] = dict(self.told)
            self.told.clear()
        return report


def metrics(num_segments: int) -> tuple[Metric, ...]:
    """Every metric of N-vium, one row each."""
    depths = tuple(float(depth) for depth in range(1, num_segments + 1))
    return (
        Metric(
            "counter",
            "exit_tokens",
            "nvium_exit_tokens",
            "Generated tokens by the exit that they left at, from 0; the last is the final head.",
            label="exit",
            label_values=tuple(map(str, range(num_segments))),
        ),
        Metric(
            "histogram",
            "step_depths",
            "nvium_step_depth",
            "Segments that each step ran.",
            values=depths,
            buckets=depths,
        ),
        Metric(
            "counter",
            "forced_steps",
            "nvium_forced_steps",
            "Steps that went on although every token had its head.",
        ),
        Metric(
            "counter",
            "caught_up_rows",
            "nvium_catch_up_rows",
            "Rows that earlier steps had left behind, summed over the segments that ran on them.",
        ),
        Metric(
            "counter",
            "caught_up_passes",
            "nvium_catch_up_passes",
            "Runs of a segment that had rows left behind by earlier steps.",
        ),
        Metric(
            "counter",
            "row_layers",
            "nvium_row_layers",
            "Layers run, summed over rows.",
        ),
        Metric(
            "counter",
            "dense_row_layers",
            "nvium_dense_row_layers",
            "Layers that a dense model runs for the same rows.",
        ),
        Metric(
            "gauge",
            "deferred",
            "nvium_deferred_positions",
            "Positions of the last step's requests that may not be complete.",
        ),
    )


def make_stat_logger(
    vllm_config: "VllmConfig", engine_indexes: list[int], logs: bool
) -> MethodStatLogger:
    """For an engine that runs an N-vium model."""
    num_segments = len(vllm_config.model_config.hf_config.exit_layers) + 1
    return MethodStatLogger(
        vllm_config,
        engine_indexes,
        metrics(num_segments),
        no_counts(num_segments),
        summary,
        logger if logs else None,
    )


def summary(counts: NviumCounts, now: dict[str, float]) -> str:
    """The log line; empty where nothing was generated."""
    tokens = sum(counts.exit_tokens)
    if not tokens:
        return ""
    shares = " / ".join(percent(count, tokens) for count in counts.exit_tokens)
    return (
        f"N-vium metrics: Tokens by exit: {shares}, "
        f"Layers run: {percent(counts.row_layers, counts.dense_row_layers)} of a dense model's, "
        f"Catch-up rows per token: {ratio(counts.caught_up_rows, tokens)}, "
        f"Forced steps: {percent(counts.forced_steps, sum(counts.step_depths))}, "
        f"Deferred positions: {now.get('deferred', 0):.0f}"
    )
