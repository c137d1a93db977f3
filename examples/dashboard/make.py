# SPDX-License-Identifier: Apache-2.0
"""Make the Grafana dashboard beside this file, for servers of both methods, with Grafana's own
library. Import the JSON in Grafana (Dashboards, New, Import) and choose the Prometheus that scrapes
`vllm serve`.

    pip install '.[dashboard]'
    python examples/dashboard/make.py
"""

from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FILE = Path(__file__).with_name("vllm-nvium.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# What a server's samples are chosen by; a rate is over what Grafana holds for a good time.
CHOSEN = 'model_name=~"$model"'
# A second has tokens, rows and passes: Grafana's own rates ("ops/s") name something else.
SHARE, PER_SECOND, PLAIN, SECONDS = "percentunit", "suffix:/s", "none", "s"
WIDTH, HEIGHT = 8, 7


def rate(name: str, by: str = "") -> str:
    """Of a counter, over all servers that are chosen; name without `vllm:`."""
    sum_ = f"sum by ({by})" if by else "sum"
    return f"{sum_} (rate(vllm:{name}{{{CHOSEN}}}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    return f"{rate(part)} / {rate(whole)}"


def quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', 'le')})"


def now(name: str, how: str = "sum") -> str:
    """Of a gauge."""
    return f"{how} (vllm:{name}{{{CHOSEN}}})"


def panel(
    title: str,
    text: str,
    unit: str,
    queries: Sequence[tuple[str, str]],
    stacked: bool = False,
    of_one: bool = False,
) -> timeseries.Panel:
    """Lines over time.

    Args:
        text: shown beside the title; unit: Grafana's name of one.
        queries: legend and PromQL.
        stacked: as shares of their sum.
        of_one: from 0 to 1 whatever the values are, and further only where they are.
    """
    made = timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE)
    made = made.span(WIDTH).height(HEIGHT).min(0).fill_opacity(40 if stacked else 5)
    if stacked:
        made = made.stacking(StackingConfig().mode(StackingMode.PERCENT))
    if of_one:
        made = made.axis_soft_max(1)
    for place, (legend, query) in enumerate(queries):
        target = prometheus.Dataquery().expr(query).legend_format(legend).datasource(SOURCE)
        made = made.with_target(target.ref_id("ABCDEF"[place]))
    return made


VLLM = (
    panel(
        "Tokens",
        "Tokens of answers, and requests, of all servers that are chosen.",
        PLAIN,
        [
            ("tokens per second", rate("generation_tokens_total")),
            ("requests that run", now("num_requests_running")),
            ("requests that wait", now("num_requests_waiting")),
        ],
    ),
    panel(
        "Time between tokens",
        "What a client waits for the next token.",
        SECONDS,
        [
            ("median", quantile(0.5, "inter_token_latency_seconds")),
            ("99 %", quantile(0.99, "inter_token_latency_seconds")),
        ],
    ),
    panel(
        "Time to the first token",
        "From a request's arrival.",
        SECONDS,
        [
            ("median", quantile(0.5, "time_to_first_token_seconds")),
            ("99 %", quantile(0.99, "time_to_first_token_seconds")),
        ],
    ),
)
NVIUM = (
    panel(
        "Tokens by exit",
        "Generated tokens by the exit that they left at, from 0; the last is the final head.",
        PER_SECOND,
        [("exit {{exit}}", rate("nvium_exit_tokens_total", "exit"))],
        stacked=True,
    ),
    panel(
        "Executed depth",
        "Segments that a step ran. A step is as deep as its deepest request.",
        PLAIN,
        [
            ("mean", ratio("nvium_step_depth_sum", "nvium_step_depth_count")),
            ("90 %", quantile(0.9, "nvium_step_depth")),
        ],
    ),
    panel(
        "Layers run",
        "Layers run over those that a dense model runs for the same rows: what the exits save.",
        SHARE,
        [("of a dense model's", ratio("nvium_row_layers_total", "nvium_dense_row_layers_total"))],
        of_one=True,
    ),
    panel(
        "Deferred positions",
        "Positions of the last step's requests that may not be complete at every depth.",
        PLAIN,
        [("positions", now("nvium_deferred_positions"))],
    ),
    panel(
        "Catch-up",
        "Rows that earlier steps had left behind, and passes of a segment that such rows joined.",
        PER_SECOND,
        [
            ("rows", rate("nvium_catch_up_rows_total")),
            ("passes", rate("nvium_catch_up_passes_total")),
        ],
    ),
    panel(
        "Forced catch-up",
        "Steps that went on although every token had its head: a request had left too much behind "
        "(--nvium-max-deferred), or the side cache was full.",
        SHARE,
        [("of all steps", ratio("nvium_forced_steps_total", "nvium_step_depth_count"))],
    ),
)
VIA_SD = (
    panel(
        "Full passes per token",
        "Passes of the full model that a request needs for a token; 1 in plain decoding.",
        PLAIN,
        [
            (
                "passes per token",
                ratio("via_sd_full_pass_requests_total", "via_sd_decode_tokens_total"),
            )
        ],
    ),
    panel(
        "Acceptance",
        "Of drafts by the slim verifier, and of windows by the full model. Empty while the plan "
        "has no rounds.",
        SHARE,
        [
            (
                "by the slim verifier",
                ratio("via_sd_slim_accepted_tokens_total", "via_sd_slim_draft_tokens_total"),
            ),
            (
                "by the full model",
                ratio("via_sd_accepted_tokens_total", "via_sd_window_tokens_total"),
            ),
        ],
        of_one=True,
    ),
    panel(
        "Passes",
        "Of the full model, where requests only decoded, and of the slim verifier.",
        PER_SECOND,
        [
            ("full model", rate("via_sd_full_passes_total")),
            ("slim verifier", rate("via_sd_slim_passes_total")),
            ("windows", rate("via_sd_windows_total")),
        ],
    ),
    panel(
        "Window length",
        "Tokens of a window that the full model verified. Plain drafts, without rounds, are none.",
        PLAIN,
        [
            ("mean", ratio("via_sd_window_length_sum", "via_sd_window_length_count")),
            ("90 %", quantile(0.9, "via_sd_window_length")),
        ],
    ),
    panel(
        "Plan",
        "Drafts at a time and rounds in a window; no rounds is plain speculative decoding.",
        PLAIN,
        [("drafts", now("via_sd_drafts", "max")), ("rounds", now("via_sd_rounds", "max"))],
    ),
    panel(
        "Tokens by tier",
        "Tokens of windows under the paper's rule, by what the slim verifier made of them. Empty "
        "where that rule cannot be used.",
        PER_SECOND,
        [("{{tier}}", rate("via_sd_tier_tokens_total", "tier"))],
        stacked=True,
    ),
)


def build() -> str:
    """The dashboard as JSON."""
    made = (
        dashboard.Dashboard("vLLM with N-vium and VIA-SD")
        .uid("vllm-nvium")
        .description("Where tokens leave an N-vium model, how often VIA-SD asks the full model.")
        .tags(["vllm", "nvium", "via-sd"])
        .time("now-1h", "now")
        .refresh("30s")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(vllm:num_requests_running, model_name)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
        )
    )
    for title, panels in (("vLLM", VLLM), ("N-vium", NVIUM), ("VIA-SD", VIA_SD)):
        made = made.with_row(dashboard.Row(title))
        for one in panels:
            made = made.with_panel(one)
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
