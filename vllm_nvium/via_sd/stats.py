# SPDX-License-Identifier: Apache-2.0
"""The numbers of VIA-SD, from the model runner to the process that answers clients: counters beside
vLLM's own on /metrics, and a line in its log. They travel in `kv_connector_stats`, the free-form
field of vLLM's scheduler statistics, which is unused because VIA-SD refuses KV connectors.
"""

import logging
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_nvium.via_sd.options import options_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

    from vllm_nvium.via_sd.planner import DraftPlan

logger = logging.getLogger("vllm.via_sd")

# The attribute of vLLM's ModelRunnerOutput, and the key in its scheduler statistics.
KEY = "via_sd"
TIERS = ("accept", "regenerate", "escalate")
LABELS = ("model_name", "engine")
# Upper bounds of the histogram's buckets, in tokens; the longest window there can be is one more.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(slots=True)
class Counts:
    """Sums: since the engine was started, or of one step, or of the time between two log lines.

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
    def zero(cls, window: int) -> "Counts":
        """Nothing yet, where windows hold at most so many tokens."""
        return cls(lengths=[0] * (window + 1))

    def add(self, other: "Counts", sign: int = 1) -> None:
        for name in NAMES:
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = [a + sign * b for a, b in zip(mine, more, strict=True)]
            else:
                setattr(self, name, mine + sign * more)

    def observe_window(self, length: int, accepted: int) -> None:
        """A window of so many tokens was verified."""
        self.windows += 1
        self.window_tokens += length
        self.accepted += accepted
        self.lengths[length] += 1


NAMES = tuple(entry.name for entry in fields(Counts))


class Reporter:
    """What the model runner tells of its counts: each step the part that is new.

    Differences, because vLLM sends a step's statistics to one of its API processes only.
    """

    def __init__(self, window: int) -> None:
        self.counts = Counts.zero(window)
        self._reported = Counts.zero(window)
        self._window = window

    def report(self, plan: "DraftPlan") -> dict[str, Any]:
        """Plain values, with the plan that windows follow at present."""
        new = Counts.zero(self._window)
        new.add(self.counts)
        new.add(self._reported, sign=-1)
        self._reported.add(new)
        return {"counts": asdict(new), "drafts": plan.num_draft_tokens, "rounds": plan.rounds}


def put(stats: "SchedulerStats | None", report: dict[str, Any] | None) -> None:
    """Sends a report along; without statistics (`--disable-log-stats`) there is nothing to do."""
    if stats is not None and report is not None:
        stats.kv_connector_stats = {KEY: report}


def take(stats: "SchedulerStats | None") -> dict[str, Any] | None:
    """The report, which is gone afterwards: vLLM's loggers would ask a KV connector to read it."""
    if stats is None or not stats.kv_connector_stats or KEY not in stats.kv_connector_stats:
        return None
    report = stats.kv_connector_stats[KEY]
    stats.kv_connector_stats = None
    return report


# --- Prometheus -----------------------------------------------------------------------------------

# Field of `Counts`, name without `_total`, help text.
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
PREFIX = "vllm:via_sd_"


class EngineMetrics:
    """The metrics of one engine, with vLLM's labels."""

    def __init__(self, metrics: dict[str, Any], labels: list[str]) -> None:
        tiers = metrics.get("tiers")
        self.tiers = [tiers.labels(*labels, name) for name in TIERS] if tiers else []
        self.own = {
            name: metric.labels(*labels) for name, metric in metrics.items() if name != "tiers"
        }

    def observe(self, counts: Counts, drafts: int, rounds: int) -> None:
        for name, _, _ in COUNTERS:
            self.own[name].inc(getattr(counts, name))
        for counter, count in zip(self.tiers, counts.tiers, strict=False):
            counter.inc(count)
        for length, count in enumerate(counts.lengths):
            for _ in range(count):
                self.own["lengths"].observe(length)
        self.own["drafts"].set(drafts)
        self.own["rounds"].set(rounds)


def make_metrics(window: int, *, may_be_paper: bool) -> dict[str, Any]:
    """Registers all metrics, by field of `Counts`."""
    metrics: dict[str, Any] = {
        entry: Counter(PREFIX + name, text, LABELS) for entry, name, text in COUNTERS
    }
    metrics["lengths"] = Histogram(
        PREFIX + "window_length",
        "Tokens of each verified window.",
        LABELS,
        buckets=[*(length for length in LENGTHS if length < window), window],
    )
    for name, text in (
        ("drafts", "Most tokens that the drafter proposes at a time, at present."),
        ("rounds", "Most rounds of drafts and slim checks in a window, at present."),
    ):
        metrics[name] = Gauge(PREFIX + name, text, LABELS, multiprocess_mode="mostrecent")
    if may_be_paper:
        text = "Tokens of windows under the paper's rule, by what the slim verifier made of them."
        metrics["tiers"] = Counter(PREFIX + "tier_tokens", text, (*LABELS, "tier"))
    return metrics


# --- The logger -----------------------------------------------------------------------------------


class ViaSDStatLogger(AggregateStatLoggerBase):
    """Made after vLLM's Prometheus logger, which removes every metric `vllm:*` that it finds, and
    asked before all others, because it takes the report away.

    Args:
        engine_indexes: engines whose statistics come to this process.
        logs: whether log lines are wanted.
    """

    def __init__(
        self, vllm_config: "VllmConfig", engine_indexes: list[int], *, logs: bool = True
    ) -> None:
        options = options_of(vllm_config)
        assert options is not None
        may_be_paper = options.mode == "paper" or options.allow_paper_mode
        metrics = make_metrics(options.window, may_be_paper=may_be_paper)
        model = vllm_config.model_config.served_model_name
        self.engines = {
            index: EngineMetrics(metrics, [model, str(index)]) for index in engine_indexes
        }
        self.logs = logs
        self._window = options.window
        self._since_log = Counts.zero(self._window)
        self._plan = (0, 0)

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        report = take(scheduler_stats)
        if report is None:
            return
        counts = Counts(**report["counts"])
        self._plan = report["drafts"], report["rounds"]
        self._since_log.add(counts)
        if engine_idx in self.engines:
            self.engines[engine_idx].observe(counts, *self._plan)

    def log(self) -> None:
        """One line on what happened since the last; none when nothing was decoded."""
        counts, self._since_log = self._since_log, Counts.zero(self._window)
        if self.logs and counts.tokens:
            logger.info("%s", summary(counts, *self._plan))

    def log_engine_initialized(self) -> None:
        pass


def summary(counts: Counts, drafts: int, rounds: int) -> str:
    parts = [
        f"Windows: {counts.windows}",
        f"Mean window length: {_ratio(counts.window_tokens, counts.windows)} tokens",
        f"Slim acceptance: {_percent(counts.slim_accepted, counts.slim_drafted)}",
        f"Full-model acceptance: {_percent(counts.accepted, counts.window_tokens)}",
        f"Full passes per token: {_ratio(counts.turns, counts.tokens)}",
        f"Plan: {drafts} drafts, {rounds} rounds",
    ]
    total = sum(counts.tiers)
    if total:
        shares = zip(TIERS, counts.tiers, strict=True)
        parts.append("Tiers: " + ", ".join(f"{_percent(n, total)} {name}" for name, n in shares))
    return "VIA-SD metrics: " + ", ".join(parts)


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
