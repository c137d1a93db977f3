# SPDX-License-Identifier: Apache-2.0
"""The numbers of a method, from the model runner to the process that answers clients: counters
beside vLLM's own on /metrics, and a line in its log. They travel in `kv_connector_stats`, the
free-form field of vLLM's scheduler statistics: both methods refuse KV connectors, so it is unused.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_nvium.engine.request_metrics import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

LABELS = ("model_name", "engine")


class Counts:
    """Base of a dataclass of sums, whose fields are integers or lists of them: since the engine was
    started, or of one step, or of the time between two log lines."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def empty(self) -> Self:
        """Nothing yet, with lists of the same lengths."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self)(
            **{key: [0] * len(v) if isinstance(v, list) else 0 for key, v in values.items()}
        )

    def add(self, other: Self, sign: int = 1) -> None:
        for name in self.__dataclass_fields__:
            more = getattr(other, name)
            if isinstance(more, list):
                mine = getattr(self, name)
                mine[:] = [a + sign * b for a, b in zip(mine, more, strict=True)]
            elif more:
                setattr(self, name, getattr(self, name) + sign * more)


C = TypeVar("C", bound=Counts)


class Reporter(Generic[C]):
    """What a model runner tells of its counts: each step the part that is new.

    Differences, because vLLM sends a step's statistics to one of its API processes only.
    """

    def __init__(self, counts: C) -> None:
        self.counts = counts
        self._reported = counts.empty()
        self._names = tuple(counts.__dataclass_fields__)

    def report(self, **now: float) -> dict[str, Any]:
        """Plain values.

        Args:
            now: numbers that are no sums.
        """
        new: dict[str, Any] = {}
        for name in self._names:
            mine, told = getattr(self.counts, name), getattr(self._reported, name)
            if isinstance(mine, list):
                new[name] = [a - b for a, b in zip(mine, told, strict=True)]
                mine = list(mine)
            else:
                new[name] = mine - told
            setattr(self._reported, name, mine)
        return {"counts": new, "now": now}


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


@dataclass(frozen=True)
class Metric:
    """One row of a method's table.

    Attributes:
        kind: a counter and a histogram read a field of the counts, a gauge one of the numbers that
            are no sums. A histogram's field says how often each value was seen.
        name: on /metrics, without `vllm:` and `_total`; text: its help.
        label: name of a label of its own; its values, one for each entry of the field.
        values: of a histogram's entries; buckets: their upper bounds.
    """

    kind: Literal["counter", "gauge", "histogram"]
    field: str
    name: str
    text: str
    label: str = ""
    label_values: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    buckets: tuple[float, ...] = ()

    def register(self) -> Any:
        """Makes it known to Prometheus."""
        name = f"vllm:{self.name}"
        labels = (*LABELS, self.label) if self.label else LABELS
        if self.kind == "counter":
            return Counter(name, self.text, labels)
        if self.kind == "gauge":
            return Gauge(name, self.text, labels, multiprocess_mode="mostrecent")
        return Histogram(name, self.text, labels, buckets=self.buckets)

    def bind(self, registered: Any, labels: Sequence[str]) -> list[Any]:
        """It, or one for each value of its own label, with vLLM's labels."""
        if not self.label:
            return [registered.labels(*labels)]
        return [registered.labels(*labels, value) for value in self.label_values]

    def observe(self, bound: Sequence[Any], counts: Counts, now: dict[str, float]) -> None:
        if self.kind == "gauge":
            bound[0].set(now[self.field])
            return
        found = getattr(counts, self.field)
        if self.kind == "histogram":
            for value, count in zip(self.values, found, strict=True):
                for _ in range(count):
                    bound[0].observe(value)
            return
        for metric, count in zip(bound, found if self.label else [found], strict=True):
            if count:
                metric.inc(count)


class MethodStatLogger(AggregateStatLoggerBase):
    """Made after vLLM's Prometheus logger, which removes every metric `vllm:*` that it finds, and
    asked before all others, because it takes the report away.

    Args:
        engine_indexes: engines whose statistics come to this process.
        metrics: the method's table.
        nothing: its counts, empty.
        summary: the log line, or an empty string where there is nothing to say.
        logger: where it goes; None if log lines are not wanted.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        engine_indexes: list[int],
        metrics: Sequence[Metric],
        nothing: Counts,
        summary: Callable[[Any, dict[str, float]], str],
        logger: logging.Logger | None,
    ) -> None:
        registered = [metric.register() for metric in metrics]
        model = str(vllm_config.model_config.served_model_name)
        self.metrics = metrics
        self.engines = {
            index: [
                metric.bind(own, [model, str(index)])
                for metric, own in zip(metrics, registered, strict=True)
            ]
            for index in engine_indexes
        }
        self._nothing, self._summary, self._logger = nothing, summary, logger
        self._since_log = nothing.empty()
        self._now: dict[str, float] = {}

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
        counts, self._now = type(self._nothing)(**report["counts"]), report["now"]
        self._since_log.add(counts)
        for metric, bound in zip(self.metrics, self.engines.get(engine_idx, ()), strict=False):
            metric.observe(bound, counts, self._now)

    def log(self) -> None:
        """One line on what happened since the last; none when there was nothing."""
        counts, self._since_log = self._since_log, self._nothing.empty()
        line = self._summary(counts, self._now)
        if self._logger is not None and line:
            self._logger.info("%s", line)

    def log_engine_initialized(self) -> None:
        pass


def ratio(part: int, whole: int) -> str:
    """For a log line."""
    return f"{part / whole:.2f}" if whole else "-"


def percent(part: int, whole: int) -> str:
    """For a log line."""
    return f"{100 * part / whole:.1f}%" if whole else "-"
