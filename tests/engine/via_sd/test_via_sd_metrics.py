# SPDX-License-Identifier: Apache-2.0
"""The metrics of VIA-SD are the runner's own counts, in one process and across two, on /metrics and
in the log; an engine without --via-sd has none of them."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import running_server
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, get_metrics_snapshot

from vllm_nvium.engine.stats import Reporter, put, take
from vllm_nvium.via_sd import stats as metrics
from vllm_nvium.via_sd.stats import COUNTERS, TIERS, ViaSDCounts, summary

WINDOW = 8
DRAFTER = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
OPTIONS: dict[str, Any] = {
    "via_sd": True,
    "via_sd_mask": "2",
    "via_sd_rounds": 2,
    "via_sd_window": WINDOW,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 9, 17, 33, 5, 9, 17, 33], [40, 41, 40, 41, 40, 41], list(range(60, 120))]
PREFIX = "vllm:via_sd_"


def own_metrics() -> dict[str, Any]:
    """Those of VIA-SD by name, as `LLM.get_metrics()` gives them; tiers by name and tier."""
    found = {}
    for metric in get_metrics_snapshot():
        if metric.name.startswith(PREFIX):
            tier = metric.labels.get("tier")
            found[metric.name.removeprefix(PREFIX) + (f":{tier}" if tier else "")] = metric
    return found


def engine_of(path: Path, **options: Any) -> TraceEngine:
    return TraceEngine(
        str(path),
        speculative_config=DRAFTER,
        additional_config={**OPTIONS, **options},
        disable_log_stats=False,
        served_model_name="tiny",
    )


def play(engine: TraceEngine) -> None:
    # The third arrives while the others decode: steps that do both are there too.
    trace = [Arrival(step, prompt, GREEDY) for step, prompt in zip((0, 0, 5), PROMPTS, strict=True)]
    engine.run(trace)


@pytest.fixture(autouse=True)
def kernels_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM registers its CPU kernels for every engine, and from the second time on its search of
    all modules fails at an object of llvmlite, which the search for n-grams has loaded by then."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import dispatcher

    register = CpuPlatform.register_triton_kernel_overrides

    def register_once(cls: type) -> None:
        if not dispatcher._registry:
            register()

    monkeypatch.setattr(CpuPlatform, "register_triton_kernel_overrides", classmethod(register_once))


@pytest.mark.parametrize("mode", ["lossless", "paper"])
def test_metrics_and_log_are_the_runners_counts(
    dense_checkpoint: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(dense_checkpoint, via_sd_mode=mode)
    assert all(getattr(metric, "value", 0) == 0 for metric in own_metrics().values())
    # Only when it is asked to: the first search for n-grams is compiled for seconds.
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1000")
    play(engine)
    counts: ViaSDCounts = engine.runner.session.counts
    check_metrics(own_metrics(), asdict(counts), mode)
    # Enough happened for the equalities to mean something.
    assert counts.windows and counts.slim_accepted and counts.accepted < counts.window_tokens
    assert 0 < counts.full_passes <= counts.turns <= counts.tokens

    lines: list[str] = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *args: lines.append(text % args))
    engine.engine.do_log_stats()
    assert lines == [summary(counts, {"drafts": 3, "rounds": 2})]
    assert lines[0].startswith(f"VIA-SD metrics: Windows: {counts.windows}, ")
    assert ("Tiers:" in lines[0]) == (mode == "paper")
    # Nothing happened since.
    engine.engine.do_log_stats()
    assert len(lines) == 1


def check_metrics(found: dict[str, Any], counts: dict[str, Any], mode: str) -> None:
    for field, name, _ in COUNTERS:
        assert isinstance(found[name], Counter)
        assert found[name].value == counts[field], name
        assert found[name].labels == {"model_name": "tiny", "engine": "0"}
    lengths = found["window_length"]
    assert isinstance(lengths, Histogram)
    assert (lengths.count, lengths.sum) == (counts["windows"], counts["window_tokens"])
    assert lengths.buckets["4.0"] == sum(counts["lengths"][:5])
    assert list(lengths.buckets)[-2:] == [f"{WINDOW}.0", "+Inf"]
    assert isinstance(found["drafts"], Gauge)
    assert (found["drafts"].value, found["rounds"].value) == (3, 2)
    if mode == "paper":
        assert [found[f"tier_tokens:{tier}"].value for tier in TIERS] == counts["tiers"]
        assert sum(counts["tiers"]) == counts["window_tokens"]
    else:
        assert not any(name.startswith("tier_tokens") for name in found)


def test_tiers_are_there_where_a_request_may_ask_for_them(dense_checkpoint: Path) -> None:
    engine = engine_of(dense_checkpoint, via_sd_allow_paper_mode=True)
    paper = GREEDY.clone()
    paper.extra_args = {"via_sd_mode": "paper"}
    engine.run([Arrival(0, PROMPTS[0], paper)])
    found = own_metrics()
    assert [
        found[f"tier_tokens:{tier}"].value for tier in TIERS
    ] == engine.runner.session.counts.tiers
    assert sum(engine.runner.session.counts.tiers) > 0


def test_engine_without_via_sd_has_none(dense_checkpoint: Path) -> None:
    engine_of(dense_checkpoint)
    assert own_metrics()
    plain = TraceEngine(str(dense_checkpoint), speculative_config=DRAFTER, disable_log_stats=False)
    play(plain)
    assert own_metrics() == {}
    loggers = [type(logger).__module__ for logger in plain.engine.logger_manager.stat_loggers]
    assert loggers and not any(module.startswith("vllm_nvium") for module in loggers)
    assert type(plain.scheduler).__module__.startswith("vllm.")


def test_statistics_that_are_off_stay_off(dense_checkpoint: Path) -> None:
    engine = TraceEngine(
        str(dense_checkpoint), speculative_config=DRAFTER, additional_config=OPTIONS
    )
    play(engine)
    assert engine.engine.logger_manager is None
    assert engine.runner.session.counts.windows


def test_vllm_describes_windows_per_request(dense_checkpoint: Path) -> None:
    """vLLM's own figures of a request: a window is what it calls the drafts of one step."""
    engine = TraceEngine(
        str(dense_checkpoint),
        speculative_config=DRAFTER,
        additional_config=OPTIONS,
        per_request_spec_decode_metrics="detailed",
    )
    engine.run([Arrival(0, PROMPTS[1], GREEDY)])
    found = engine.outputs["0"].outputs[0].spec_decode_metrics.to_dict()
    counts = engine.runner.session.counts
    assert found["num_spec_tokens"] == WINDOW
    assert max(found["per_step_drafted"]) <= WINDOW
    # The drafts before a request's last token need no window.
    assert 0 <= found["num_spec_steps"] - counts.windows <= 1
    assert found["num_draft_tokens"] >= counts.window_tokens > 0
    assert found["num_accepted_draft_tokens"] >= counts.accepted > 0


def test_a_report_survives_vllms_wire() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    reporter = Reporter(ViaSDCounts.zero(WINDOW))
    reporter.counts.observe_window(5, 4)
    reporter.counts.tiers[1] += 3
    sent = EngineCoreOutputs(scheduler_stats=SchedulerStats())
    put(sent.scheduler_stats, reporter.report(drafts=3, rounds=2))
    got = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    report = take(got.scheduler_stats)
    assert report is not None and ViaSDCounts(**report["counts"]) == reporter.counts
    assert report["now"] == {"drafts": 3, "rounds": 2}
    # Each report tells what is new, and vLLM's loggers find nothing behind it.
    assert ViaSDCounts(**reporter.report(drafts=3, rounds=2)["counts"]) == ViaSDCounts.zero(WINDOW)
    assert take(got.scheduler_stats) is None and got.scheduler_stats.kv_connector_stats is None
    assert take(None) is None
    put(None, report)


TWO_PROCESSES = """
import json, sys
from dataclasses import asdict
from vllm import LLM, SamplingParams

def counts_of(worker):
    return asdict(worker.model_runner.session.counts)

if __name__ == "__main__":
    path, drafter, options, prompts, answer = map(json.loads, sys.argv[1:])
    llm = LLM(
        path, dtype="float32", enforce_eager=True, max_model_len=256, speculative_config=drafter,
        additional_config=options, disable_log_stats=False, served_model_name="tiny",
    )
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    found = {
        metric.name + metric.labels.get("tier", ""): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:via_sd_") and hasattr(metric, "value")
    }
    with open(answer, "w") as file:
        json.dump([llm.collective_rpc(counts_of)[0], found], file)
"""


def test_counts_cross_the_processes_of_llm(dense_checkpoint: Path, tmp_path: Path) -> None:
    script, answer = tmp_path / "script.py", tmp_path / "answer.json"
    script.write_text(TWO_PROCESSES)
    options = {**OPTIONS, "via_sd_mode": "paper"}
    given = (str(dense_checkpoint), DRAFTER, options, PROMPTS, str(answer))
    arguments = map(json.dumps, given)
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # Lets the test send a function to the worker.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    counts, found = json.loads(answer.read_text())
    assert counts["windows"] > 0
    assert {name: found[PREFIX + name] for _, name, _ in COUNTERS} == {
        name: counts[field] for field, name, _ in COUNTERS
    }
    assert (found[PREFIX + "drafts"], found[PREFIX + "rounds"]) == (3, 2)
    assert [found[f"{PREFIX}tier_tokens{tier}"] for tier in TIERS] == counts["tiers"]
    assert sum(counts["tiers"]) == counts["window_tokens"]


@pytest.fixture(scope="module")
def server(
    dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Base URL and log of a lossless server, which logs every second."""
    log = tmp_path_factory.mktemp("serve") / "log"
    arguments = ["--max-model-len", "256", "--speculative-config", json.dumps(DRAFTER)]
    arguments += ["--via-sd", "--via-sd-mask", "2", "--via-sd-rounds", "2"]
    arguments += ["--via-sd-window", str(WINDOW), "--per-request-spec-decode-metrics", "summary"]
    interval = {"VLLM_LOG_STATS_INTERVAL": "1"}
    with running_server(dense_checkpoint, log, *arguments, **interval) as url:
        yield url.removesuffix("/v1"), log


def scraped(url: str) -> dict[str, float]:
    """Samples of /metrics by name and labels other than vLLM's own two."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, _, value = line.rpartition(" ")
            name = re.sub(r'(engine="0"|model_name="tiny"),?', "", name)
            found[name.replace(",}", "}").removesuffix("{}")] = float(value)
    return found


def test_a_server_shows_them(server: tuple[str, Path]) -> None:
    url, log = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    steps = 0
    # One after the other, so that no pass serves two.
    for prompt in PROMPTS:
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=40,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        steps += answer.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"]
    found = scraped(url)
    own = {name.removeprefix(PREFIX): n for name, n in found.items() if name.startswith(PREFIX)}
    # What vLLM counts itself, in the same process or in the other.
    from_decoding = found["vllm:generation_tokens_total"] - len(PROMPTS)
    # The last step of a request may give more than it asked for.
    assert 0 <= own["decode_tokens_total"] - from_decoding <= 3 * len(PROMPTS)
    assert own["full_passes_total"] == own["full_pass_requests_total"]
    assert found["vllm:spec_decode_num_drafts_total"] == steps
    assert 0 <= steps - own["windows_total"] <= len(PROMPTS)
    assert 0 < own["window_tokens_total"] <= found["vllm:spec_decode_num_draft_tokens_total"]
    assert 0 < own["accepted_tokens_total"] <= found["vllm:spec_decode_num_accepted_tokens_total"]
    assert own["window_tokens_total"] == own["window_length_sum"]
    assert not any(name.startswith("tier_tokens") for name in own)
    assert own["window_length_count"] == own["windows_total"]

    deadline = time.monotonic() + 60
    while "VIA-SD metrics: " not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    line = log.read_text().split("VIA-SD metrics: ")[1].splitlines()[0]
    assert line.startswith("Windows: ") and "Tiers: " not in line


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"via_sd_mode": "paper"}, ["via_sd_mode", "--via-sd-allow-paper-mode"]),
        ({"via_sd_accept": 0.7}, ["via_sd_accept", "lossless", "via_sd_mode"]),
        ({"via_sd_window": 3}, ["via_sd_window", "via_sd_accept"]),
    ],
    ids=["paper", "threshold", "unknown"],
)
def test_what_a_lossless_server_refuses_is_a_400(
    server: tuple[str, Path], xargs: dict[str, Any], words: list[str], stream: bool
) -> None:
    """And it goes on serving, with windows."""
    url, _ = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    body = {"vllm_xargs": xargs}
    windows = scraped(url)[f"{PREFIX}windows_total"]
    messages: Any = [{"role": "user", "content": "w5 w9 w17"}]
    for call in (
        lambda: client.completions.create(
            model="tiny", prompt=PROMPTS[0], stream=stream, extra_body=body
        ),
        lambda: client.chat.completions.create(
            model="tiny", messages=messages, stream=stream, extra_body=body
        ),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call()
        assert error.value.status_code == 400
        assert all(word in str(error.value.body) for word in words), error.value.body
    client.completions.create(
        model="tiny",
        prompt=PROMPTS[0],
        max_tokens=40,
        temperature=0.0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"via_sd_mode": "lossless"}},
    )
    deadline = time.monotonic() + 30
    while scraped(url)[f"{PREFIX}windows_total"] == windows:  # counted behind the answer
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_server_example(server: tuple[str, Path]) -> None:
    example = Path(__file__).parents[3] / "examples" / "via_sd_serve.py"
    result = subprocess.run(
        [sys.executable, str(example), "--base-url", f"{server[0]}/v1", "--prompt", "w5 w9 w5 w9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines()[:3])
    assert len(said["With the tier"]) > 2 and said["With the tier"] == said["Without it"]
    refusal = said["A lossless server refuses the paper's rule"]
    assert refusal.startswith("400: ") and "--via-sd-allow-paper-mode" in refusal
    assert "vllm:via_sd_windows_total" in result.stdout


def test_a_server_answers_a_beam_search_with_options_by_400(server: tuple[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)
    beams = {"use_beam_search": True, "vllm_xargs": {"via_sd": "off"}}
    with pytest.raises(openai.BadRequestError, match="'via_sd' is 'off', but use_beam_search"):
        client.completions.create(model="tiny", prompt="w3 w4", max_tokens=3, n=2, extra_body=beams)


def test_what_nothing_is_divided_by() -> None:
    counts, plan = ViaSDCounts.zero(4), {"drafts": 3, "rounds": 0}
    assert summary(counts, plan) == ""
    counts.tokens = 1
    line = summary(counts, plan)
    assert "Mean window length: - tokens" in line and "Slim acceptance: -" in line
    assert "nan" not in line and "Tiers" not in line
