# SPDX-License-Identifier: Apache-2.0
"""What an answer of an N-vium model tells of its own tokens: the exit of each is the one that it
was scripted to leave at, whatever happens to the request on its way."""

import random
from pathlib import Path
from typing import Any

import pytest
from trace_engine import Arrival, TraceEngine, patch_thresholds, scripted_exit
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tiny_models import make_nvium
from vllm_nvium.engine.request_metrics import KEY, NOTES, AnswerFormat, Told, received, send
from vllm_nvium.nvium.request_metrics import FORMAT, summary

HAZARDS = [0.4, 0.4]
# Segments end behind these layers; the model has as many as the last says.
LAYERS = [1, 2, 4]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TraceEngine:
    folder = tmp_path_factory.mktemp("nvium") / "model"
    make_nvium(folder, seed=1, exit_layers=LAYERS[:-1])
    return TraceEngine(str(folder), num_gpu_blocks_override=12)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_thresholds(monkeypatch, HAZARDS)


def asking(level: str | None, **params: Any) -> SamplingParams:
    given = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    extra = {} if level is None else {"nvium_request_metrics": level}
    return SamplingParams(**(given | params), extra_args=extra)


def due(
    arrival: Arrival,
    output: CompletionOutput,
    seed: int | None = None,
    hazards: list[float] = HAZARDS,
) -> list[int]:
    """The exits of its tokens, as they were scripted."""
    first = len(arrival.prompt) - 1
    seed = arrival.params.seed if seed is None else seed
    return [scripted_exit(seed, first + i, hazards) for i in range(len(output.token_ids))]


def test_exits_are_those_of_the_tokens(engine: TraceEngine) -> None:
    """Through preemption, chunked prompts and batches in which others do not ask."""
    draw = random.Random(3)
    trace = [
        Arrival(
            step=draw.randrange(30),
            prompt=[draw.randrange(3, 250) for _ in range(draw.randint(1, 90))],
            params=asking(
                draw.choice([None, "none", "summary", "detailed", "detailed"]),
                seed=number,
                max_tokens=draw.randint(1, 40),
            ),
        )
        for number in range(24)
    ]
    preemptions = engine.preemptions
    engine.run(trace)
    assert engine.preemptions > preemptions
    levels = set()
    for number, arrival in enumerate(trace):
        output = engine.outputs[str(number)].outputs[0]
        level = (arrival.params.extra_args or {}).get("nvium_request_metrics")
        exits = due(arrival, output)
        levels.add(level)
        told = exits if level == "detailed" else None
        assert getattr(output, "nvium_token_exits", None) == told
        sums = getattr(output, "nvium_metrics", None)
        if level in (None, "none"):
            assert sums is None
            continue
        assert sums["exit_tokens"] == [exits.count(k) for k in range(3)]
        assert sums["mean_exit_layers"] == pytest.approx(sum(LAYERS[e] for e in exits) / len(exits))
        # A step is as deep as its deepest request.
        assert sums["mean_exit_layers"] <= sums["mean_run_layers"] <= sums["num_layers"] == 4
    assert len(levels) == 4
    # vLLM's own field, in which notes travel, is empty again.
    assert all(output.kv_transfer_params is None for output in engine.outputs.values())


def test_a_conversation_that_goes_on(engine: TraceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first tokens are a prompt now, in blocks that another request left unfinished."""
    early = [0.9, 0.9]
    patch_thresholds(monkeypatch, early)
    draw = random.Random(1)
    first = Arrival(0, draw.sample(range(3, 250), 40), asking(None, max_tokens=60))
    second = Arrival(70, [7, 8], asking("detailed", seed=9), continues=0, take=98)
    hits = engine.unfinished_hits
    with engine.without_bounds():
        engine.run([first, second])
    output = engine.outputs["1"]
    assert output.num_cached_tokens and engine.unfinished_hits > hits
    exits = due(second, output.outputs[0], hazards=early)
    assert output.outputs[0].nvium_token_exits == exits


def test_layers_are_those_that_ran(engine: TraceEngine) -> None:
    arrival = Arrival(0, [5, 6, 7], asking("summary", max_tokens=20))
    engine.run([arrival])
    ran = [LAYERS[depth - 1] for depth in engine.depths]
    sums = engine.outputs["0"].outputs[0].nvium_metrics
    assert sums["mean_run_layers"] == pytest.approx(sum(ran) / len(ran)) and len(ran) == 20


@pytest.mark.parametrize("interval", [1, 4])
def test_streamed_parts_have_their_own_exits(engine: TraceEngine, interval: int) -> None:
    """Each part of a stream has as many exits as tokens, and together they are all."""
    params = asking("detailed", output_kind=RequestOutputKind.DELTA, stream_interval=interval)
    arrival = Arrival(0, [9, 8, 7], params)
    parts: list[RequestOutput] = []
    step = engine.engine.step

    def watched() -> list[RequestOutput]:
        outputs = step()
        parts.extend(outputs)
        return outputs

    engine.engine.step = watched
    try:
        engine.run([arrival])
    finally:
        engine.engine.step = step
    found = [part.outputs[0] for part in parts]
    assert len(found) > 2 and all(len(p.nvium_token_exits) == len(p.token_ids) for p in found)
    whole = found[0]
    for part in found[1:]:
        whole.nvium_token_exits += part.nvium_token_exits
        whole.token_ids = [*whole.token_ids, *part.token_ids]
    assert whole.nvium_token_exits == due(arrival, whole)
    assert [hasattr(part, "nvium_metrics") for part in found] == [False] * (len(found) - 1) + [True]


def test_every_answer_of_several_has_its_own(engine: TraceEngine) -> None:
    params = asking("detailed", n=3, output_kind=RequestOutputKind.FINAL_ONLY)
    arrival = Arrival(0, [11, 12], params)
    engine.run([arrival])
    answers = engine.outputs["0"].outputs
    # vLLM gives them the seeds behind the request's.
    found = [answer.nvium_token_exits for answer in answers]
    assert found == [due(arrival, answer, 3 + answer.index) for answer in answers]
    assert len({tuple(exits) for exits in found}) == 3
    for answer, exits in zip(answers, found, strict=True):
        assert answer.nvium_metrics["exit_tokens"] == [exits.count(k) for k in range(3)]


def test_stops_cut_both(engine: TraceEngine) -> None:
    engine.run([Arrival(0, [5, 6, 7], asking(None, max_tokens=30))])
    plain = engine.outputs["0"].outputs[0]
    for stop in (
        {"stop": [plain.text.split()[9]], "include_stop_str_in_output": True},
        {"stop": [plain.text.split()[9]]},
        {"stop_token_ids": [plain.token_ids[9]]},
    ):
        arrival = Arrival(0, [5, 6, 7], asking("detailed", max_tokens=30, **stop))
        engine.run([arrival])
        output = engine.outputs["0"].outputs[0]
        assert output.finish_reason == "stop" and 0 < len(output.token_ids) <= 10
        assert output.nvium_token_exits == due(arrival, output)
        assert sum(output.nvium_metrics["exit_tokens"]) == len(output.token_ids)


def test_an_aborted_request_was_told_so_far(engine: TraceEngine) -> None:
    arrival = Arrival(0, [5, 6, 7], asking("detailed", max_tokens=100), abort_after=9)
    engine.run([arrival])
    output = engine.outputs["0"].outputs[0]
    assert 0 < len(output.token_ids) < 100 and output.nvium_token_exits == due(arrival, output)


def test_who_does_not_ask_pays_nothing(engine: TraceEngine) -> None:
    """No note is made, and no report has a place for one."""
    observer, reports = engine.runner.nvium_observer, []
    report = observer.report

    def watch() -> dict[str, Any]:
        assert not observer.anybody and not observer._notes
        reports.append(report())
        return reports[-1]

    observer.report = watch
    try:
        engine.run([Arrival(0, [5, 6, 7], asking(None)), Arrival(1, [5, 6], asking("none"))])
    finally:
        observer.report = report
    assert reports and not any(NOTES in one for one in reports)


def test_what_a_server_tells_of_all(tmp_path: Path) -> None:
    """The option of an engine holds for requests that say nothing, null too."""
    make_nvium(tmp_path / "model", seed=1, exit_layers=LAYERS[:-1])
    engine = TraceEngine(
        str(tmp_path / "model"), additional_config={"nvium_request_metrics": "detailed"}
    )
    levels = (None, {"nvium_request_metrics": None}, {"nvium_request_metrics": "none"})
    trace = [Arrival(0, [5, 6], asking(None, seed=i)) for i in range(3)]
    for arrival, extra_args in zip(trace, levels, strict=True):
        arrival.params.extra_args = extra_args
    engine.run(trace)
    for i in (0, 1):
        output = engine.outputs[str(i)].outputs[0]
        assert output.nvium_token_exits == due(trace[i], output)
    assert not hasattr(engine.outputs["2"].outputs[0], "nvium_token_exits")


# ------------------------------------------------------------------------------ without an engine


def output_of(tokens: list[int], exits: list[int] | None, **more: Any) -> RequestOutput:
    one = CompletionOutput(0, "x" * len(tokens), tokens, None, None, **more)
    if exits is not None:
        one.nvium_token_exits = exits  # type: ignore[attr-defined]
    return RequestOutput("0", None, [1], None, [one], finished=False)


def test_what_a_slow_client_missed_is_joined() -> None:
    first = output_of([4, 5], [2, 0])
    first.add(output_of([6], [1]), aggregate=True)
    last = output_of([7], [2], finish_reason="stop")
    last.outputs[0].nvium_metrics = {"exit_tokens": [1, 1, 2]}  # type: ignore[attr-defined]
    first.add(last, aggregate=True)
    one: Any = first.outputs[0]
    assert one.token_ids == [4, 5, 6, 7] and one.nvium_token_exits == [2, 0, 1, 2]
    assert one.nvium_metrics == {"exit_tokens": [1, 1, 2]}
    # Whole outputs take each other's place.
    first.add(output_of([1, 2, 3, 4, 5], [0] * 5), aggregate=False)
    assert first.outputs[0].nvium_token_exits == [0] * 5  # type: ignore[attr-defined]
    plain = output_of([4], None)
    plain.add(output_of([5], None), aggregate=True)
    assert not hasattr(plain.outputs[0], "nvium_token_exits")


def note(numbers: list[int], level: str = "detailed") -> dict[str, Any]:
    return {"method": "nvium", "level": level, "scale": LAYERS, "numbers": numbers, "work": 4}


def test_notes_survive_vllms_wire() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    asked, other = EngineCoreOutput("a", [5]), EngineCoreOutput("b", [6])
    nothing_new = EngineCoreOutput("c", [])
    sent = EngineCoreOutputs(outputs=[asked, other, nothing_new])
    send({0: sent}, {"a": note([2]), "c": note([1]), "gone": note([0])})
    got = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent)).outputs
    assert [received(one.kv_transfer_params) for one in got] == [note([2]), None, None]
    assert got[0].kv_transfer_params == {KEY: note([2])}


def test_values_stand_beside_their_tokens() -> None:
    """Also where a step's last tokens were cut off, and where nobody asked at first."""
    told = Told()
    told.add(note([2]), start=0, count=1)
    told.add(note([0, 1, 2]), start=1, count=2)
    assert told.of(0, 3) == [2, 0, 1] and told.of(1, 3) == [0, 1] and told.of(3, 3) == []
    late = Told()
    late.add(note([1]), start=2, count=1)
    assert late.of(0, 3) == [None, None, 1] and late.of(2, 5) == [1, None, None]
    assert summary(late)["exit_tokens"] == [0, 1, 0]


def test_sums_of_nothing() -> None:
    assert summary(Told(scale=LAYERS)) == {
        "exit_tokens": [0, 0, 0],
        "mean_exit_layers": None,
        "mean_run_layers": None,
        "num_layers": 4,
    }
    assert isinstance(FORMAT, AnswerFormat) and FORMAT.sums_attribute == "nvium_metrics"
