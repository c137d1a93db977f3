# SPDX-License-Identifier: Apache-2.0
"""The numbers of N-vium, held against what the engine was seen to do, and their way to /metrics."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from trace_engine import Arrival, TraceEngine
from vllm import SamplingParams
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from tiny_models import make_nvium
from vllm_nvium.engine.stats import KEY, put, take
from vllm_nvium.nvium.stats import NviumCounts, make_stat_logger, no_counts, summary


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TraceEngine:
    folder = tmp_path_factory.mktemp("nvium") / "model"
    make_nvium(folder, seed=1, exit_layers=[1, 2])
    return TraceEngine(str(folder), num_gpu_blocks_override=12, disable_log_stats=False)


def crowd() -> list[Arrival]:
    draw = random.Random(3)
    return [
        Arrival(
            step=draw.randrange(20),
            prompt=[draw.randrange(3, 250) for _ in range(draw.randint(1, 90))],
            params=SamplingParams(
                temperature=1.0,
                seed=number,
                max_tokens=draw.randint(1, 40),
                ignore_eos=True,
                extra_args={"nvium_max_deferred": draw.choice([2, 30, 1000])},
            ),
        )
        for number in range(12)
    ]


def test_counts_are_what_happened(engine: TraceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = engine.runner.nvium_observer
    before = observer.reporter.counts.empty()
    before.add(observer.reporter.counts)
    # Rows of the steps; rows of other steps, by segment; rows in each layer, added up.
    rows = [0, 0, 0]
    model = engine.runner.model
    run = model.forward

    def count_layer(_: object, inputs: tuple) -> None:
        rows[2] += len(inputs[0])

    watched = [
        layer.register_forward_pre_hook(count_layer) for layer in model.language_model.model.layers
    ]

    def count_rows(*args, **kwargs):
        output = run(*args, **kwargs)
        if (step := kwargs.get("nvium_step")) is not None:
            rows[0] += step.batch.num_rows
            rows[1] += sum(count - step.batch.num_rows for count in step.rows_run)
        return output

    monkeypatch.setattr(model, "forward", count_rows)
    trace = crowd()
    emitted = engine.run(trace)
    for hook in watched:
        hook.remove()
    counts = observer.reporter.counts
    counts_now = counts.empty()
    counts_now.add(counts)
    counts_now.add(before, sign=-1)

    # A preempted request computes its newest token anew, at the same exit, and gets it once.
    exits: Counter[int] = Counter()
    for number, arrival in enumerate(trace):
        seen = emitted[str(number)]
        first = len(arrival.prompt) - 1
        exits.update(seen.exits[first + i] for i in range(len(seen.tokens)))
    assert counts_now.exit_tokens == [exits[k] for k in range(3)]
    depths = Counter(engine.depths)
    assert counts_now.step_depths == [depths[k] for k in (1, 2, 3)]
    assert counts_now.forced_steps > 0 and counts_now.caught_up_rows == rows[1] > 0
    assert counts_now.dense_row_layers == rows[0] * model.config.num_hidden_layers
    assert counts_now.row_layers == rows[2] > 0
    # What was left behind is caught up, or never needed: no row runs through a layer twice.
    assert counts_now.row_layers <= counts_now.dense_row_layers


def test_a_step_is_reported_once(engine: TraceEngine) -> None:
    reports = []
    make_stats = engine.scheduler.make_stats

    def watch(*args, **kwargs):
        stats = make_stats(*args, **kwargs)
        reports.append(take(stats))
        return stats

    engine.scheduler.make_stats = watch
    try:
        emitted = engine.run(crowd()[:3])
    finally:
        engine.scheduler.make_stats = make_stats
    found = [report for report in reports if report is not None]
    tokens = sum(sum(report["counts"]["exit_tokens"]) for report in found)
    assert tokens == sum(len(seen.tokens) for seen in emitted.values())
    assert all(report["now"]["deferred"] >= 0 for report in found)


def test_the_table_reaches_prometheus_and_the_log() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            served_model_name="tiny", hf_config=SimpleNamespace(exit_layers=[1, 2])
        )
    )
    unregister_vllm_metrics()  # as vLLM does where it makes loggers
    logger = make_stat_logger(config, [0], logs=True)  # type: ignore[arg-type]
    counts = {
        "exit_tokens": [3, 1, 4],
        "step_depths": [2, 0, 3],
        "forced_steps": 1,
        "caught_up_rows": 5,
        "caught_up_passes": 2,
        "row_layers": 60,
        "dense_row_layers": 80,
    }
    stats = SimpleNamespace(kv_connector_stats=None)
    put(stats, {"counts": counts, "now": {"deferred": 7}})  # type: ignore[arg-type]
    assert KEY in stats.kv_connector_stats
    logger.record(stats, None)  # type: ignore[arg-type]
    assert stats.kv_connector_stats is None  # vLLM's loggers would ask a connector about it

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(
            f"vllm:nvium_{name}", {"model_name": "tiny", "engine": "0"} | labels
        )

    assert value("exit_tokens_total", exit="2") == 4
    assert value("step_depth_count") == 5 and value("step_depth_sum") == 2 * 1 + 3 * 3
    assert value("step_depth_bucket", le="1.0") == 2
    assert value("row_layers_total") == 60 and value("deferred_positions") == 7
    line = summary(NviumCounts(**counts), {"deferred": 7})
    assert "37.5% / 12.5% / 50.0%" in line and "75.0% of a dense model's" in line
    assert summary(no_counts(3), {}) == ""
