# SPDX-License-Identifier: Apache-2.0
"""The numbers of VIA-SD: windows, what became of their tokens, and passes. The table below is all
that /metrics and the log line are made of; `engine/stats.py` carries them.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_nvium.engine.stats import Counts, MethodStatLogger, Metric, percent, ratio
from vllm_nvium.via_sd.options import options_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.via_sd")

TIERS = ("accept", "regenerate", "escalate")
# Upper bounds of the histogram's buckets, in tokens; the longest window there can be is one more.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(slots=True)
class ViaSDCounts(Counts):
    """Sums.

    Attributes:
        full_passes: steps of the full model that did nothing but decode; turns: requests in each of
            them, summed; tokens: that the requests got from them, before a stop cuts the last.
        slim_passes: of the slim verifier.
        windows: verified; window_tokens: in them; accepted: of those by the full model.
        slim_drafted, slim_accepted: drafts that the slim verifier saw, and kept.
        tiers: tokens of windows in the paper's mode by tier (accept, regenerate, escalate).
        lengths: windows by their number of tokens, from 0 to the most that a window may hold.
    """

    full_passes: int = 0
    turns: int = 0
    tokens: int = 0
    slim_passes: int = 0
    windows: int = 0
    window_tokens: int = 0
    accepted: int = 0
    slim_drafted: int = 0
    slim_accepted: int = 0
    tiers: list[int] = field(default_factory=lambda: [0] * len(TIERS))
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def zero(cls, window: int) -> "ViaSDCounts":
        """Nothing yet, where windows hold at most so many tokens."""
        return cls(lengths=[0] * (window + 1))

    def observe_window(self, length: int, accepted: int) -> None:
        """A window of so many tokens was verified."""
        self.windows += 1
        self.window_tokens += length
        self.accepted += accepted
        self.lengths[length] += 1


COUNTERS = (
    ("windows", "windows", "Windows that the full model verified."),
    ("window_tokens", "window_tokens", "Tokens of verified windows."),
    ("accepted", "accepted_tokens", "Tokens of windows that the full model accepted."),
    ("slim_drafted", "slim_draft_tokens", "Draft tokens that the slim verifier checked."),
    ("slim_accepted", "slim_accepted_tokens", "Draft tokens that the slim verifier accepted."),
    ("slim_passes", "slim_passes", "Passes of the slim verifier."),
    ("full_passes", "full_passes", "Passes of the full model in which requests only decoded."),
    ("turns", "full_pass_requests", "Requests in those passes, summed over the passes."),
    ("tokens", "decode_tokens", "Tokens that requests got from those passes."),
)
GAUGES = (
    ("drafts", "Most tokens that the drafter proposes at a time, at present."),
    ("rounds", "Most rounds of drafts and slim checks in a window, at present."),
)


def metrics(window: int, *, may_be_paper: bool) -> tuple[Metric, ...]:
    """Every metric of VIA-SD, one row each."""
    rows = [Metric("counter", entry, f"via_sd_{name}", text) for entry, name, text in COUNTERS]
    rows += [Metric("gauge", name, f"via_sd_{name}", text) for name, text in GAUGES]
    rows.append(
        Metric(
            "histogram",
            "lengths",
            "via_sd_window_length",
            "Tokens of each verified window.",
            values=tuple(map(float, range(window + 1))),
            buckets=tuple(float(b) for b in (*(n for n in LENGTHS if n < window), window)),
        )
    )
    if may_be_paper:
        text = "Tokens of windows under the paper's rule, by what the slim verifier made of them."
        tiers = Metric("counter", "tiers", "via_sd_tier_tokens", text, "tier", TIERS)
        rows.append(tiers)
    return tuple(rows)


def make_stat_logger(
    vllm_config: "VllmConfig", engine_indexes: list[int], logs: bool
) -> MethodStatLogger:
    """For an engine with VIA-SD."""
    options = options_of(vllm_config)
    assert options is not None
    may_be_paper = options.mode == "paper" or options.allow_paper_mode
    return MethodStatLogger(
        vllm_config,
        engine_indexes,
        metrics(options.window, may_be_paper=may_be_paper),
        ViaSDCounts.zero(options.window),
        summary,
        logger if logs else None,
    )


def summary(counts: ViaSDCounts, now: dict[str, float]) -> str:
    """The log line; empty where nothing was decoded."""
    if not counts.tokens:
        return ""
    parts = [
        f"Windows: {counts.windows}",
        f"Mean window length: {ratio(counts.window_tokens, counts.windows)} tokens",
        f"Slim acceptance: {percent(counts.slim_accepted, counts.slim_drafted)}",
        f"Full-model acceptance: {percent(counts.accepted, counts.window_tokens)}",
        f"Full passes per token: {ratio(counts.turns, counts.tokens)}",
        f"Plan: {now['drafts']} drafts, {now['rounds']} rounds",
    ]
    if total := sum(counts.tiers):
        shares = zip(TIERS, counts.tiers, strict=True)
        parts.append("Tiers: " + ", ".join(f"{percent(n, total)} {name}" for name, n in shares))
    return "VIA-SD metrics: " + ", ".join(parts)
