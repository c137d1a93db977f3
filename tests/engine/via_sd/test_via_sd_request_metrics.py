# SPDX-License-Identifier: Apache-2.0
"""What an answer under VIA-SD tells of its own tokens: the tiers are those that an observer in the
engine's process is told, cut where the text is cut."""

from typing import Any

import pytest
from trace_engine import Arrival, _public
from via_sd_engine import NGRAM, ViaSDEngine
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tiny_models import make_dense
from vllm_nvium.engine.request_metrics import NOTES, Told
from vllm_nvium.via_sd.request_metrics import TOKEN_TIERS, summary

PROMPTS = [[*range(4, 14)] * 3, [9, 8, 7], [20, 21] * 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense")
    make_dense(path, seed=1, vocab_size=64, bigrams=0.7, whisper=0.2)
    return str(path)


class Watched:
    """An engine, and what its observer was told of each request: a list for each step."""

    def __init__(self, model: str, **options: Any) -> None:
        overrides = options.pop("overrides", {})
        given = {"mask": "2", "window": 12, "rounds": 2} | options
        self.engine = ViaSDEngine(model, NGRAM, given, **overrides)
        self.told: dict[str, list[list[str]]] = {}

    def run(self, trace: list[Arrival]) -> None:
        self.told.clear()
        session = self.engine.runner.session
        session.on_tokens = self._note
        try:
            self.engine.run(trace)
        finally:
            session.on_tokens = None

    def _note(self, request_id: str, whose: Any) -> None:
        told = self.told.setdefault(_public(request_id), [])
        told.append([TOKEN_TIERS[tier] for tier in whose])

    def check(self, name: str, index: int = 0, whole: bool = True) -> Any:
        """The output of a request that asked for everything."""
        output = self.engine.outputs[name].outputs[index]
        flat = [tier for step in self.told[name] for tier in step]
        count = len(output.token_ids)
        assert output.via_sd_token_tiers == flat[:count] and len(flat) >= count
        sums, tiers = output.via_sd_metrics, output.via_sd_token_tiers
        assert [sums[f"{t}_tokens"] for t in TOKEN_TIERS] == [tiers.count(t) for t in TOKEN_TIERS]
        if whole:
            assert sums["full_passes"] == len(self.told[name])
        assert sums["full_passes_per_token"] == pytest.approx(sums["full_passes"] / count)
        return output


def asking(level: str | None, **params: Any) -> SamplingParams:
    extra: dict[str, Any] = params.pop("extra", {})
    extra |= {} if level is None else {"via_sd_request_metrics": level}
    given = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    return SamplingParams(**(given | params), extra_args=extra)


@pytest.fixture(scope="module")
def lossless(model: str) -> Watched:
    return Watched(model, allow_paper_mode=True)


def test_tiers_are_those_of_the_tokens(lossless: Watched) -> None:
    levels = ["detailed", None, "summary", "detailed", "detailed"]
    trace = [
        Arrival(2 * i, PROMPTS[i % 3], asking(level, max_tokens=40 - i))
        for i, level in enumerate(levels)
    ]
    lossless.run(trace)
    seen = set()
    for i, level in enumerate(levels):
        output = lossless.engine.outputs[str(i)].outputs[0]
        if level == "detailed":
            seen.update(lossless.check(str(i)).via_sd_token_tiers)
        else:
            assert not hasattr(output, "via_sd_token_tiers")
            assert hasattr(output, "via_sd_metrics") == (level == "summary")
    assert seen == set(TOKEN_TIERS)
    # Rounds of slim checks behind the windows of the first.
    handed = [w.rounds for w in lossless.engine.handed if w.request == "0"]
    rounds = lossless.engine.outputs["0"].outputs[0].via_sd_metrics["slim_passes"]
    assert 0 < rounds <= sum(handed)


def test_a_lone_request_took_part_in_all_slim_passes(lossless: Watched) -> None:
    before = lossless.engine.runner.session.counts.slim_passes
    lossless.run([Arrival(0, PROMPTS[0], asking("detailed"))])
    passes = lossless.engine.runner.session.counts.slim_passes - before
    # The last window may not have been verified.
    found = lossless.check("0").via_sd_metrics["slim_passes"]
    assert passes - 2 <= found <= passes


@pytest.mark.parametrize("keep", [True, False])
def test_a_stop_in_a_window_cuts_both(lossless: Watched, keep: bool) -> None:
    lossless.run([Arrival(0, PROMPTS[0], asking("detailed"))])
    plain = lossless.check("0")
    words = plain.text.split()
    # Words that stand for the first time in the middle of what one pass brought.
    ends, place = [], 0
    for step in lossless.told["0"]:
        ends += [i for i in range(place, place + len(step) - 1) if words[i] not in words[:i]]
        place += len(step)
    assert ends
    for i in ends[-3:]:
        for stop in (
            {"stop": [f"{words[i]} "], "include_stop_str_in_output": keep},
            {"stop_token_ids": [plain.token_ids[i]]},
        ):
            lossless.run([Arrival(0, PROMPTS[0], asking("detailed", **stop))])
            output = lossless.check("0", whole=False)
            assert output.finish_reason == "stop" and i < len(output.token_ids) <= i + 2
            assert output.via_sd_token_tiers == plain.via_sd_token_tiers[: len(output.token_ids)]


def test_streamed_parts_have_their_own_tiers(lossless: Watched) -> None:
    parts: list[Any] = []
    step = lossless.engine.engine.step

    def watched() -> Any:
        outputs = step()
        parts.extend(outputs)
        return outputs

    lossless.engine.engine.step = watched
    try:
        params = asking("detailed", output_kind=RequestOutputKind.DELTA)
        lossless.run([Arrival(0, PROMPTS[0], params)])
    finally:
        lossless.engine.engine.step = step
    found = [part.outputs[0] for part in parts]
    assert len(found) > 2 and any(len(part.token_ids) > 1 for part in found)
    assert all(len(part.via_sd_token_tiers) == len(part.token_ids) for part in found)
    tiers = [tier for part in found for tier in part.via_sd_token_tiers]
    flat = [tier for told in lossless.told["0"] for tier in told]
    assert tiers == flat[:40] and len(tiers) == 40
    assert found[-1].via_sd_metrics["full_tokens"] == tiers.count("full")


@pytest.mark.parametrize(
    "extra",
    [{"via_sd": "off"}, {"via_sd_mode": "paper", "via_sd_accept": 0.2, "via_sd_escalate": 0.1}],
    ids=["off", "paper"],
)
def test_other_rules(lossless: Watched, extra: dict[str, Any]) -> None:
    lossless.run([Arrival(0, PROMPTS[0], asking("detailed", extra=extra))])
    sums = lossless.check("0").via_sd_metrics
    if "via_sd" in extra:
        assert sums["slim_tokens"] == sums["slim_passes"] == 0
    else:
        assert sums["slim_passes"] > 0


def test_every_answer_of_several_has_its_own(lossless: Watched) -> None:
    params = asking(
        "detailed", temperature=1.0, seed=5, n=2, output_kind=RequestOutputKind.FINAL_ONLY
    )
    lossless.run([Arrival(0, PROMPTS[0], params)])
    for output in lossless.engine.outputs["0"].outputs:
        # vLLM's id of an answer begins with its number.
        [name] = [name for name in lossless.told if name.startswith(f"{output.index}_")]
        flat = [tier for step in lossless.told[name] for tier in step]
        assert output.via_sd_token_tiers == flat[: len(output.token_ids)]


def test_preempted_requests(model: str) -> None:
    # What five such requests need does not fit.
    watched = Watched(model, overrides={"num_gpu_blocks_override": 12})
    trace = [
        Arrival(i, PROMPTS[i % 3] * 2, asking("detailed", max_tokens=70), priority=0)
        for i in range(6)
    ]
    watched.run(trace)
    assert watched.engine.preemptions > 0
    for i in range(6):
        assert len(watched.check(str(i)).token_ids) == 70


def test_who_does_not_ask_pays_nothing(lossless: Watched) -> None:
    session, reports = lossless.engine.runner.session, []
    report, whose = session.report, session._whose
    session.report = lambda: reports.append(report()) or reports[-1]
    session._whose = lambda *_: pytest.fail("nobody wants to know")
    try:
        lossless.engine.run([Arrival(0, PROMPTS[0], asking(None))])
    finally:
        session.report, session._whose = report, whose
    assert reports and not any(NOTES in one for one in reports)


def test_sums_of_nothing() -> None:
    assert summary(Told()) == {
        "drafter_tokens": 0,
        "slim_tokens": 0,
        "full_tokens": 0,
        "full_passes": 0,
        "full_passes_per_token": None,
        "slim_passes": 0,
    }
