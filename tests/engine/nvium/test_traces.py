# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced traces: whatever arrives, is preempted, aborted or shares a prefix, the logits of
every emitted token are the reference model's at the exit it was scripted to leave at.
"""

import os
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, patch_thresholds, play_against_reference
from trace_strategies import TEXTS, VOCABULARY, hazard, nvium_traces

from tiny_models import make_nvium
from vllm_nvium.model_executor.nvium.completion import IN_FLIGHT, CatchUpError
from vllm_nvium.model_executor.rows import Batch


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("nvium")
    reference = make_nvium(path, exit_layers=[1, 2, 3], seed=1)
    # 10 blocks of 32: one long sequence or a few short ones fit, so preemption is common.
    engine = TraceEngine(str(path), num_gpu_blocks_override=10)
    return reference, engine


@settings(
    max_examples=int(os.environ.get("NVIUM_TRACES", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=nvium_traces(),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
    resets=st.sampled_from([(), (), (15,), (40, 41)]),
    chunk=st.sampled_from([0, 0, 1, 7]),
    bounded=st.booleans(),
)
def test_logits_are_the_references(served, trace, hazards, resets, chunk, bounded):
    config = served[1].scheduler.scheduler_config
    config.long_prefill_token_threshold = chunk
    try:
        with nullcontext() if bounded else served[1].without_bounds():
            play(served, trace, hazards, resets)
    finally:
        config.long_prefill_token_threshold = 0


def play(served, trace: list[Arrival], hazards: list[float], resets: tuple[int, ...] = ()) -> None:
    play_against_reference(*served, trace, hazards, resets)


def forced(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


HAZARDS = [[0.5, 0.5, 0.5], [0.9, 0.3, 0.1], [0.95, 0.95, 0.95], [0.0, 0.9, 0.5]]


@pytest.fixture(params=["bounded", "unbounded"])
def bounds(request, served):
    with nullcontext() if request.param == "bounded" else served[1].without_bounds():
        yield


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("hazards", HAZARDS)
def test_more_requests_than_fit(served, hazards):
    engine, generator = served[1], random.Random(0)
    preemptions, passes = engine.preemptions, engine.catch_up_passes
    for _ in range(2):
        trace = [
            Arrival(
                step=2 * i,
                prompt=TEXTS[i % 2][: generator.randint(20, 60)] + [10 + i],
                params=forced(generator.randint(0, 9), generator.randint(50, 70)),
            )
            for i in range(6)
        ]
        play(served, trace, hazards)
    assert engine.preemptions - preemptions >= 4
    assert engine.catch_up_passes - passes >= 40


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("hazards", HAZARDS)
def test_prefix_hits_on_positions_that_wait(served, hazards):
    """Others go on, at once and one after the other, from what a request left behind: while it
    still runs, when it has finished, and when what they share was completed by one of them."""
    engine, generator = served[1], random.Random(1)
    hits = engine.unfinished_hits
    for round_ in range(4):
        # Two tokens decoded after a block is full are enough for others to hit it.
        trace = [Arrival(0, TEXTS[0][: 20 + round_] + [100 + round_], forced(round_, 80))]
        for step in (55, 55, 56, 70, 85, 85, 95):
            prompt = [generator.randrange(3, VOCABULARY)]
            params = forced(generator.randint(0, 9), generator.randint(2, 12))
            trace.append(Arrival(step, prompt, params, continues=0))
        play(served, trace, hazards)
    assert engine.unfinished_hits > hits


GREEDY = {"temperature": 1.0, "top_k": 1, "ignore_eos": True}


def whole(emitted: dict, trace: list[Arrival], number: int) -> list[int]:
    return trace[number].prompt + emitted[str(number)].tokens


@pytest.fixture(scope="module", params=[32, 64])
def roomy(request, served):
    """An engine in which no block has to make room for another."""
    path = served[1].engine.vllm_config.model_config.model
    # A pass of 48 rows at most, so that what waits in two blocks takes several.
    engine = TraceEngine(path, num_gpu_blocks_override=40, block_size=request.param)
    with engine.without_bounds():
        yield served[0], engine


def played(roomy, trace: list[Arrival], hazards: list[float]) -> dict:
    play(roomy, trace, hazards)
    return roomy[1].emitted


@pytest.mark.parametrize("beside", [0, 1])
def test_scoring_an_answer_leaves_complete_blocks_behind_waiting_ones(roomy, beside):
    """Generate; score the text, which reads no prefix cache; go on from it."""
    engine = roomy[1]
    size, rising = engine.runner.nvium_catch_up.block_size, engine.rising_marks
    one = [
        Arrival(
            0, [11 + beside, 12, 13, 14, 15], SamplingParams(max_tokens=size + 8, seed=1, **GREEDY)
        )
    ]
    text = whole(played(roomy, one, [1.0, 0.0, 0.0]), one, 0) + [20 + i for i in range(size - 2)]
    scored = SamplingParams(max_tokens=1, seed=1, prompt_logprobs=0, **GREEDY)
    played(roomy, [Arrival(0, list(text), scored)], [0.0, 0.0, 0.0])
    after = [Arrival(3, [*text, 77], SamplingParams(max_tokens=6, seed=1, **GREEDY))]
    after += [Arrival(0, [60] * 20, SamplingParams(max_tokens=20, seed=1, **GREEDY))] * beside
    played(roomy, after, [0.0, 0.0, 0.0])
    assert engine.rising_marks > rising


def test_two_equal_requests_at_once(roomy):
    """One ends just behind a block's end, so that the oldest copy of each block is its."""
    engine = roomy[1]
    size, rising = engine.runner.nvium_catch_up.block_size, engine.rising_marks
    prompt = [31, 12, 13, 14, 15]
    both = [
        Arrival(0, list(prompt), SamplingParams(max_tokens=count, seed=0, **GREEDY))
        for count in (size - 3, 2 * size + 16)
    ]
    # A prompt makes a full pass, which completes what of these still runs.
    both.append(Arrival(size + 20, [50, 51, 52], SamplingParams(max_tokens=9, seed=3, **GREEDY)))
    text = whole(played(roomy, both, [1.0, 0.0, 0.0]), both, 1)
    played(
        roomy,
        [Arrival(0, [*text[: 2 * size], 77], SamplingParams(max_tokens=6, seed=1, **GREEDY))],
        [0.0, 0.0, 0.0],
    )
    assert engine.rising_marks > rising


def test_a_prompt_that_is_whole_blocks_of_an_answer(roomy):
    """vLLM computes the last block of such a prompt anew, and has it twice from then on."""
    engine = roomy[1]
    size, rising = engine.runner.nvium_catch_up.block_size, engine.rising_marks
    first = [
        Arrival(0, [41, 12, 13, 14, 15], SamplingParams(max_tokens=size + 8, seed=0, **GREEDY))
    ]
    text = whole(played(roomy, first, [1.0, 0.0, 0.0]), first, 0)
    prompt = Arrival(
        0,
        text[:size],
        SamplingParams(temperature=1.0, seed=5, max_tokens=size + 8, ignore_eos=True),
    )
    text = whole(played(roomy, [prompt], [0.0, 0.0, 0.0]), [prompt], 0)
    after = Arrival(0, [*text[: 2 * size], 77], SamplingParams(max_tokens=6, seed=1, **GREEDY))
    played(roomy, [after], [0.0, 0.0, 0.0])
    assert engine.rising_marks > rising


def test_more_waits_than_fits_into_a_pass(roomy):
    engine = roomy[1]
    catch_up, passes = engine.runner.nvium_catch_up, []
    enter = catch_up.enter_rows
    splits = catch_up.split_passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catch_up, "enter_rows", lambda rows: (passes.append(rows), enter(rows)))
        params = SamplingParams(max_tokens=50, seed=1, **GREEDY)
        trace = [Arrival(i, [90 + i, 3, 4], params) for i in range(3)]
        play(roomy, [*trace, Arrival(40, [7, 8], params)], [1.0, 0.0, 0.0])
    assert catch_up.split_passes > splits
    assert max(len(rows.slots) for rows in passes) <= 48


@pytest.fixture
def bounded(served):
    """An engine in which no block has to make room for another, whose passes have 48 rows."""
    path = served[1].engine.vllm_config.model_config.model
    return served[0], TraceEngine(path, num_gpu_blocks_override=150)


def test_a_step_of_many_catches_up_no_more_than_a_pass(bounded):
    engine = bounded[1]
    params = SamplingParams(max_tokens=112, seed=1, **GREEDY)
    trace = [Arrival(0, [70 + i, *TEXTS[i % 2][:23]], params) for i in range(6)]
    play(bounded, trace, [1.0, 0.0, 0.0])
    assert max(engine.caught_up) == 48
    # The prompts take four steps. Then 8 steps leave 6 x 8 positions, one goes on, and so on.
    assert engine.depths[4:31] == [1, 1, 1, 1, 1, 1, 1, 1, 4] * 3


def test_nothing_that_is_open_is_for_others_to_find(bounded):
    """Each alone leaves 40 positions open in two blocks, behind 73 that are complete."""
    engine = bounded[1]
    params = SamplingParams(max_tokens=90, seed=1, **GREEDY)
    answers = []
    for i in range(6):
        trace = [Arrival(0, [90 + i, *TEXTS[i % 2][:23]], params)]
        play(bounded, trace, [1.0, 0.0, 0.0])
        answers.append(whole(engine.emitted, trace, 0))
        assert engine.caught_up.count(48) == 1 and sum(engine.caught_up) == 48
    params = SamplingParams(max_tokens=3, seed=1, **GREEDY)
    play(bounded, [Arrival(0, [*answer, 5], params) for answer in answers], [0.0, 0.0, 0.0])
    assert {output.num_cached_tokens for output in engine.outputs.values()} == {64}
    assert max(engine.caught_up) == 0


def test_what_is_complete_again_is_for_others_to_find(bounded):
    """All tokens leave early, and beside the last one comes the prompt of another request."""
    engine = bounded[1]
    trace = [Arrival(0, [95, *TEXTS[0][:39]], SamplingParams(max_tokens=58, seed=1, **GREEDY))]
    other = Arrival(57, [9, 8, 7], SamplingParams(max_tokens=2, seed=1, **GREEDY))
    play(bounded, [*trace, other], [1.0, 0.0, 0.0])
    assert engine.caught_up[57] > 0
    params = SamplingParams(max_tokens=3, seed=1, **GREEDY)
    play(bounded, [Arrival(0, [*whole(engine.emitted, trace, 0), 5], params)], [0.0, 0.0, 0.0])
    assert engine.outputs["0"].num_cached_tokens == 96


def scored_piece_by_piece(engine_and_reference) -> int:
    """Positions that the first step of two texts finds open. Texts that are scored read no prefix
    cache: of each block there are several copies, and the oldest, which vLLM finds, was left open.
    """
    engine = engine_and_reference[1]
    early, params = [1.0, 0.0, 0.0], SamplingParams(max_tokens=180, seed=1, **GREEDY)
    trace = [Arrival(0, [97 + i, 3, 4], params) for i in range(2)]
    play(engine_and_reference, trace, early)
    texts = [whole(engine.emitted, trace, i) for i in range(2)]
    engine.engine.reset_prefix_cache()
    scored = SamplingParams(max_tokens=9, seed=1, prompt_logprobs=0, **GREEDY)
    for text in texts:
        for blocks in range(1, 6):
            play(engine_and_reference, [Arrival(0, text[: 32 * blocks - 8], scored)], early)
    params = SamplingParams(max_tokens=3, seed=1, **GREEDY)
    play(engine_and_reference, [Arrival(0, [*text, 5], params) for text in texts], [0.0, 0.0, 0.0])
    return engine.caught_up[0]


def test_copies_of_blocks_do_not_add_up_what_is_open(bounded):
    assert scored_piece_by_piece(bounded) == 0
    with bounded[1].without_bounds():
        assert scored_piece_by_piece(bounded) > 48


@pytest.mark.parametrize("step", range(1, 7))
def test_an_abort_while_a_step_runs_leaves_nothing_open_behind(bounded, step):
    """As of a client that goes away, or of a stop string: what the step did is not yet known. The
    prompt takes two steps, and the third fills a block with the first position that is left open.
    """
    engine = bounded[1]
    core = engine.engine.engine_core.engine_core
    process, steps = core._process_aborts_queue, []

    def process_and_abort():
        process()
        steps.append(None)
        if len(steps) == step:
            core.abort_requests(list(engine.scheduler.requests))

    params = SamplingParams(max_tokens=70, seed=1, **GREEDY)
    engine.engine.add_request("9", {"prompt_token_ids": [55, *TEXTS[0][:62]]}, params)
    with pytest.MonkeyPatch.context() as patch:
        patch_thresholds(patch, [1.0, 0.0, 0.0])
        patch.setattr(core, "_process_aborts_queue", process_and_abort)
        while engine.scheduler.requests:
            engine.engine.step()
    engine.engine.abort_request(["9"])
    assert len(steps) == step and (engine.depths[-1] == 1) == (step > 2)
    assert engine.open_in_prefix_cache() == 0


def test_a_preempted_request_leaves_nothing_open_behind(served):
    """It comes back to blocks of its own that are complete, and to none that are not."""
    engine = served[1]
    preemptions = engine.preemptions
    params = SamplingParams(max_tokens=60, seed=1, **GREEDY)
    trace = [Arrival(i, [60 + i, *TEXTS[i % 2][:70]], params) for i in range(4)]
    found = []
    preempt = engine.scheduler._preempt_request

    def count(*args, **kwargs):
        result = preempt(*args, **kwargs)
        found.append(engine.open_in_prefix_cache(unused=True))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler, "_preempt_request", count)
        play(served, trace, [1.0, 0.0, 0.0])
    assert engine.preemptions > preemptions and found == [0] * len(found)


def test_marks_that_cannot_be_are_an_error_before_anything_is_written(roomy):
    engine = roomy[1]
    catch_up = engine.runner.nvium_catch_up
    cache = catch_up.side_cache
    size = catch_up.block_size
    batch = Batch(
        query_start=np.array([0, 1], dtype=np.int32),
        first=np.array([2]),
        last=np.array([2]),
        complete=np.array([0]),
        block_table=np.array([[39]], dtype=np.int32),
        block_table_device=torch.tensor([[39]], dtype=torch.int32),
        slots_device=torch.tensor([39 * size + 2]),
    )
    before = cache.marks.copy(), cache.states.clone()
    slots = np.arange(39 * size, 39 * size + 2)
    for wrong in (0, 5, IN_FLIGHT):
        cache.marks[slots] = wrong
        rows = catch_up.start(batch, torch.tensor([2]))
        with pytest.raises(CatchUpError, match=f"position 0 .* mark is {wrong}"):
            catch_up.run(batch, rows, torch.zeros(1, 64), 1, lambda state, positions: state)
        assert torch.equal(cache.states, before[1])
    batch.slots_device = torch.tensor([-1])
    with pytest.raises(CatchUpError, match="slots -1"):
        catch_up.start(batch, torch.tensor([2]))
    cache.marks[:] = before[0]


def test_blocks_of_a_victim_that_never_ran_are_not_hit(served):
    """Under the priority policy vLLM may preempt a request whose rows it has just planned, after it
    entered their blocks into the prefix cache."""
    path = served[1].engine.vllm_config.model_config.model
    engine = TraceEngine(
        path, num_gpu_blocks_override=6, scheduling_policy="priority", max_model_len=96
    )
    engine.scheduler.scheduler_config.long_prefill_token_threshold = 7
    # In step 9 the victim computes positions 63 to 69, which fill its second block, and takes the
    # last of six; then the one that came in step 5 needs its second. One more keeps chunks short.
    params = SamplingParams(max_tokens=3, seed=0, **GREEDY)
    busy = SamplingParams(max_tokens=20, seed=0, **GREEDY)
    trace = [
        Arrival(0, TEXTS[0][:80], params, abort_after=10, priority=1),
        Arrival(0, [200, 201], busy),
        Arrival(5, TEXTS[1][:40], params),
        Arrival(30, [*TEXTS[0][:64], 9], params),
    ]
    preemptions = engine.preemptions
    play((served[0], engine), trace, [0.0, 0.0, 0.0])
    assert engine.preemptions > preemptions
    assert engine.outputs["3"].num_cached_tokens == 32
