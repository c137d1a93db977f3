# SPDX-License-Identifier: Apache-2.0
"""The plain functions under the cascade: exit draws, ragged ranges, packed rows, and the table that
says which requests may leave early. Each is held against a formula or a naive loop.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_nvium.model_executor.nvium import policy
from vllm_nvium.model_executor.nvium.completion import CatchUp
from vllm_nvium.model_executor.ops import draws
from vllm_nvium.model_executor.ops.draws import margin_thresholds, request_seed, uniform_draws
from vllm_nvium.model_executor.ops.head_rows import (
    MIXTURE,
    NO_TOKEN,
    HeadRows,
    row_width,
    unpack,
)
from vllm_nvium.model_executor.ops.ragged import passes_of, ragged_ranges, range_starts, slots_of
from vllm_nvium.model_executor.rows import Batch, Rows
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.requests import NviumRequests, is_ancestral, is_plain_greedy

# ---------------------------------------------------------------------------------------- draws


def _seeds(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize("along", ["positions", "seeds", "exits"])
def test_draws_are_uniform(along: str) -> None:
    many = 20_000
    if along == "positions":
        draws = uniform_draws(np.full(many, 7, dtype=np.uint64), np.arange(many), 3)[:, 1]
    elif along == "seeds":  # small and neighbouring seeds are what people type
        draws = uniform_draws(np.arange(many, dtype=np.uint64), np.full(many, 5), 3)[:, 0]
    else:
        draws = uniform_draws(_seeds(7), np.array([0]), many)[0]
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    # Neighbours are independent: pairs fill the unit square evenly.
    pairs, _, _ = np.histogram2d(draws[:-1:2], draws[1::2], bins=8)
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_draws_of_different_seeds_positions_and_exits_are_unrelated() -> None:
    positions = np.arange(5_000)
    one = uniform_draws(np.full(5_000, 1, dtype=np.uint64), positions, 3)
    two = uniform_draws(np.full(5_000, 2, dtype=np.uint64), positions, 3)
    columns = np.concatenate([one, two, np.roll(one, 1, axis=0)], axis=1)
    correlation = np.corrcoef(columns.T) - np.eye(9)
    assert np.abs(correlation).max() < 0.06  # four standard deviations
    assert len(np.unique(np.concatenate([one, two]))) == 30_000


@given(
    seeds=hnp.arrays(np.uint64, 4),
    positions=hnp.arrays(np.int64, 4, elements=st.integers(0, 2**40)),
    num_exits=st.integers(0, 5),
)
def test_draws_are_pure_and_never_zero_or_one(
    seeds: np.ndarray, positions: np.ndarray, num_exits: int
) -> None:
    draws = uniform_draws(seeds, positions, num_exits)
    assert draws.shape == (4, num_exits)
    assert ((draws > 0.0) & (draws < 1.0)).all()
    # A row depends on nothing but itself.
    for row in range(4):
        alone = uniform_draws(seeds[row : row + 1], positions[row : row + 1], num_exits)
        assert np.array_equal(alone[0], draws[row])


def test_hazards_of_zero_and_one_are_exact() -> None:
    thresholds = margin_thresholds(np.arange(10_000, dtype=np.uint64), np.arange(10_000), 3)
    assert np.isfinite(thresholds).all()
    for never in (-np.inf, -1e4):
        assert not (never > thresholds).any()
    for always in (np.inf, 1e4):
        assert (always > thresholds).all()
    assert np.abs(thresholds).max() < 40  # far from the margins that stand for 0 and 1


@given(st.integers(0, 2**63), st.integers(0, 10_000), st.floats(-8, 8))
def test_a_margin_exceeds_its_threshold_iff_the_draw_is_below_the_hazard(
    seed: int, position: int, margin: float
) -> None:
    draw = uniform_draws(_seeds(seed), np.array([position]), 1)[0, 0]
    hazard = 1.0 / (1.0 + np.exp(-margin))
    if abs(draw - hazard) > 1e-12:
        threshold = margin_thresholds(_seeds(seed), np.array([position]), 1)[0, 0]
        assert (margin > threshold) == (draw < hazard)


def test_request_seeds() -> None:
    assert request_seed(5, "a", 0) == request_seed(5, "b", 1)  # a named seed is all that counts
    others = [
        request_seed(5, "a", 0),
        request_seed(6, "a", 0),
        request_seed(None, "a", 0),
        request_seed(None, "b", 0),
        request_seed(None, "a", 1),
    ]
    assert len(set(others)) == 5
    assert all(0 <= seed < 2**64 for seed in others)


# --------------------------------------------------------------------------------------- ragged

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=6)


@given(ranges)
def test_ragged_ranges(pairs: list[tuple[int, int]]) -> None:
    first = np.array([start for start, _ in pairs], dtype=np.int64)
    last = np.array([start + extra for start, extra in pairs], dtype=np.int64)
    sequence, positions, query_start = ragged_ranges(first, last)
    rows = [(s, p) for s in range(len(pairs)) for p in range(first[s], last[s] + 1)]
    assert list(zip(sequence, positions, strict=True)) == rows
    assert query_start.dtype == np.int32
    for s in range(len(pairs)):
        assert list(positions[query_start[s] : query_start[s + 1]]) == list(
            range(first[s], last[s] + 1)
        )


def test_a_range_may_be_empty() -> None:
    sequence, positions, query_start = ragged_ranges(np.array([3, 5, 2]), np.array([2, 6, 1]))
    assert sequence.tolist() == [1, 1]
    assert positions.tolist() == [5, 6]
    assert query_start.tolist() == [0, 0, 2, 2]


@given(ranges, st.sampled_from([1, 4, 16, 32]), st.randoms(use_true_random=False))
def test_slots(pairs: list[tuple[int, int]], block_size: int, random: Any) -> None:
    blocks = random.sample(range(1000), 60 * len(pairs))
    table = np.array(blocks, dtype=np.int32).reshape(len(pairs), 60)
    first = np.array([start for start, _ in pairs])
    last = np.array([start + extra for start, extra in pairs])
    sequence, positions, _ = ragged_ranges(first, last)
    slots = slots_of(table, sequence, positions, block_size)
    assert slots.dtype == np.int64
    assert slots.tolist() == [
        int(table[s, p // block_size]) * block_size + p % block_size
        for s, p in zip(sequence, positions, strict=True)
    ]


positions_of_sequences = st.lists(
    st.sets(st.integers(0, 12), max_size=9), min_size=1, max_size=4
).filter(any)


def rows_of(sequences: list[set[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = [(s, p) for s, own in enumerate(sequences) for p in sorted(own)]
    return np.array([s for s, _ in rows]), np.array([p for _, p in rows])


@given(positions_of_sequences)
def test_ranges_begin_where_a_row_does_not_follow_the_last(sequences: list[set[int]]) -> None:
    sequence, positions = rows_of(sequences)
    rows = set(zip(sequence.tolist(), positions.tolist(), strict=True))
    starts = range_starts(sequence, positions).tolist()
    assert starts == [
        i
        for i, (s, p) in enumerate(zip(sequence, positions, strict=True))
        if (s, p - 1) not in rows
    ]


@given(positions_of_sequences, st.integers(1, 6), st.integers(1, 4))
def test_passes_hold_each_row_once_behind_all_lower_positions(
    sequences: list[set[int]], max_rows: int, max_ranges: int
) -> None:
    sequence, positions = rows_of(sequences)
    passes = passes_of(sequence, positions, max_rows, max_ranges)
    assert sorted(np.concatenate(passes)) == list(range(len(positions)))
    for chosen in passes:
        assert len(chosen) <= max_rows
        assert len(range_starts(sequence[chosen], positions[chosen])) <= max_ranges
        assert (np.diff(chosen) > 0).all()
    highest = [positions[chosen].max() for chosen in passes]
    lowest = [positions[chosen].min() for chosen in passes]
    assert all(before <= after for before, after in zip(highest, lowest[1:], strict=False))


# ------------------------------------------------------------------------------------ head rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", [1, 3, 7, 63, 64])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_packed_rows_come_back_bit_by_bit(
    dtype: torch.dtype, hidden_size: int, num_heads: int
) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    rows = HeadRows(9, num_heads, hidden_size, torch.empty(0, dtype=dtype))
    assert rows.packed.shape == (9, row_width(num_heads, hidden_size, dtype))
    assert rows.packed.dtype == dtype
    _, log_weights, single, token = unpack(rows.packed, num_heads, hidden_size)
    assert (log_weights == -torch.inf).all()  # of an untouched row
    assert (single == MIXTURE).all() and (token == NO_TOKEN).all()

    heads = torch.randn(9, num_heads, hidden_size, generator=generator).to(dtype)
    weights = 20 * torch.randn(9, num_heads, generator=generator)
    # Bit patterns that are NaN, infinite or subnormal in every 16-bit float.
    fields = torch.tensor([[0x7FC1, 0x7F81], [-1, 0], [1, 2**31 - 1]]).repeat(3, 1).int()
    rows.heads.copy_(heads)
    rows.log_weights.copy_(weights)
    rows.fields.copy_(fields)
    index = torch.tensor([8, 0, 3, 3])
    for chosen, packed in [
        (slice(None), rows.packed),
        (index, rows.packed[index]),
        (index, rows.packed.index_select(0, index)),
        (slice(2, 7), rows.packed[2:7]),
        (slice(0, 9, 2), rows.packed[::2]),
    ]:
        got = unpack(packed, num_heads, hidden_size)
        for value, expected in zip(got, (heads, weights, fields[:, 0], fields[:, 1]), strict=True):
            assert torch.equal(value, expected[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_row_is_never_as_wide_as_a_plain_one(dtype: torch.dtype) -> None:
    for num_heads in range(1, 5):
        for hidden_size in range(1, 200):
            width = row_width(num_heads, hidden_size, dtype)
            assert width > hidden_size
            assert width * dtype.itemsize % 4 == 0


# ------------------------------------------------------------------- requests that may leave early

# Every field of SamplingParams that changes or reports the distribution of the next token.
NEEDS_DISTRIBUTION: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {3: 1.0},
    "allowed_token_ids": [3, 4],
    "bad_words": ["w3"],
    "min_tokens": 2,
    "structured_outputs": StructuredOutputsParams(regex="a*"),
    "logprobs": 0,
    "logprob_token_ids": [3],
    "thinking_token_budget": 0,
    "trace_decode_token_ids": [3],
    "watermarking": True,
}
# Those that change it at temperature 1 and leave the argmax alone.
CHANGES_SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
# Those that say when to stop, what to return and how: the law of a token is the same.
HARMLESS: dict[str, Any] = {
    "n": 2,
    "seed": 3,
    "stop": ["x"],
    "stop_token_ids": [4],
    "ignore_eos": True,
    "max_tokens": 7,
    "prompt_logprobs": 2,
    "prompt_logprob_token_ids": [[3]],
    "prompt_logprob_start": 0,
    "flat_logprobs": True,
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "output_kind": None,
    "stream_interval": 2,
    "skip_clone": True,
    "extra_args": {"nvium_sampling": "mixture"},
    "skip_reading_prefix_cache": True,
    "repetition_detection": None,
    "routed_experts_prompt_start": 0,
}


def _with(field: str, value: Any, temperature: float) -> SamplingParams:
    params = SamplingParams(temperature=temperature)
    setattr(params, field, value)  # past the checks that concern other fields
    return params


def test_plain_requests() -> None:
    assert is_ancestral(SamplingParams(temperature=1.0))
    assert is_ancestral(SamplingParams(temperature=1.0, top_k=-1))
    assert not is_plain_greedy(SamplingParams(temperature=1.0))
    assert is_plain_greedy(SamplingParams(temperature=0.0))
    assert not is_ancestral(SamplingParams(temperature=0.0))


@pytest.mark.parametrize("field", NEEDS_DISTRIBUTION)
def test_needs_the_distribution(field: str) -> None:
    assert not is_ancestral(_with(field, NEEDS_DISTRIBUTION[field], 1.0))
    assert not is_plain_greedy(_with(field, NEEDS_DISTRIBUTION[field], 0.0))


@pytest.mark.parametrize("field", CHANGES_SAMPLING)
def test_changes_sampling(field: str) -> None:
    assert not is_ancestral(_with(field, CHANGES_SAMPLING[field], 1.0))
    if field != "temperature":
        assert is_plain_greedy(_with(field, CHANGES_SAMPLING[field], 0.0))


@pytest.mark.parametrize("field", HARMLESS)
def test_harmless(field: str) -> None:
    assert is_ancestral(_with(field, HARMLESS[field], 1.0))
    assert is_plain_greedy(_with(field, HARMLESS[field], 0.0))


def test_every_field_of_sampling_params_is_in_a_table() -> None:
    # A field that a later vLLM adds has to be judged before anything leaves early under it.
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    known = {*NEEDS_DISTRIBUTION, *CHANGES_SAMPLING, *HARMLESS, "output_text_buffer_length"}
    assert fields == known


def _table(**options: Any) -> NviumRequests:
    return NviumRequests(dataclasses.replace(NviumOptions(), **options), 0, num_exits=3)


def _step(table: NviumRequests, ids: list[str], last: list[int], decoding: bool = True) -> Any:
    count = len(ids)
    return table.sampling(ids, np.array(last), np.full(count, decoding), np.full(count, False))


def test_a_request_may_stop_once_it_is_complete() -> None:
    table = _table()
    table.add("a", SamplingParams(temperature=1.0))
    assert not _step(table, ["a"], [9], decoding=False).may_stop.any()
    table.completed(np.array([9]))
    assert _step(table, ["a"], [10]).may_stop.all()


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_request_leaves_at_most_its_cap_behind(cap: int) -> None:
    table = _table(max_deferred=cap)
    table.add("a", SamplingParams(temperature=1.0))
    _step(table, ["a"], [9], decoding=False)
    table.completed(np.array([9]))
    for position in range(10, 20):
        assert _step(table, ["a"], [position]).may_stop[0] == (position - 9 <= cap)


def test_what_a_batch_leaves_behind_fits_into_a_pass() -> None:
    table = NviumRequests(NviumOptions(), 0, num_exits=3, max_rows=12)
    for request_id in "abc":
        table.add(request_id, SamplingParams(temperature=1.0))
    _step(table, ["a", "b", "c"], [9, 5, 6], decoding=False)
    table.completed(np.array([9, 5, 6]))
    # 2, 4 and 6 positions of two requests, then 9, 10, 12 and 13 of three.
    for last in ([10, 6], [11, 7], [12, 8]):
        assert _step(table, ["a", "b"], last).may_stop.all()
    for last in ([13, 9, 7], [14, 9, 7], [15, 9, 8]):
        assert _step(table, ["a", "b", "c"], last).may_stop.all()
    assert not _step(table, ["a", "b", "c"], [15, 10, 8]).may_stop.any()


def test_the_scheduler_hears_who_has_left_something_open() -> None:
    table = NviumRequests(NviumOptions(), 0, num_exits=3)

    def heard() -> dict[str, int | None]:
        found = dict(table.told)
        table.told.clear()
        return found

    for request_id in "abc":
        table.add(request_id, SamplingParams(temperature=1.0))
    _step(table, ["a", "b"], [9, 5], decoding=False)
    table.completed(np.array([9, 5]))
    assert heard() == {}
    _step(table, ["a", "b"], [10, 6])
    table.stopped()
    assert heard() == {"a": 10, "b": 6}
    _step(table, ["a", "b"], [11, 7])
    table.stopped()
    assert heard() == {}  # once is enough
    _step(table, ["a"], [12])
    table.completed(np.array([12]))
    assert heard() == {"a": None}
    _step(table, ["a", "b"], [13, 8])
    table.stopped()
    assert heard() == {"a": 13}
    table.preempted("a")  # its blocks are gone, and with them what the scheduler knew
    _step(table, ["a", "b"], [13, 9])
    table.completed(np.array([13, 9]))
    assert heard() == {"b": None}
    _step(table, ["b"], [10])
    table.stopped()
    table.add("b", SamplingParams(temperature=1.0))  # an id that goes on, or is used again
    assert heard() == {"b": None}


def test_a_preempted_request_is_complete_nowhere() -> None:
    table = _table()
    for request_id in "ab":
        table.add(request_id, SamplingParams(temperature=1.0))
    _step(table, ["a", "b"], [9, 5], decoding=False)
    table.completed(np.array([9, 5]))
    # All of them preempted and resumed at once, in the same order.
    table.preempted("a")
    table.preempted("b")
    assert not _step(table, ["a", "b"], [10, 6]).may_stop.any()
    assert table.complete.tolist() == [0, 0]


def test_an_id_may_be_used_again() -> None:
    table = _table()
    table.add("a", SamplingParams(temperature=1.0))
    _step(table, ["a"], [9], decoding=False)
    table.completed(np.array([9]))
    table.remove("a")
    table.add("a", SamplingParams(temperature=0.0))
    sampling = _step(table, ["a"], [3])
    assert not sampling.may_stop.any()
    assert (sampling.thresholds == 0.0).all()


@pytest.mark.parametrize(
    ("law", "params", "expected"),
    [
        # (mixture, greedy, may stop)
        ("routed", SamplingParams(temperature=0.7, logprobs=1), (False, False, True)),
        ("routed", SamplingParams(temperature=0.0), (False, False, True)),
        ("mixture", SamplingParams(temperature=1.0), (False, False, True)),
        ("mixture", SamplingParams(temperature=0.0), (True, True, True)),
        ("mixture", SamplingParams(temperature=0.7), (True, False, False)),
        ("mixture", SamplingParams(temperature=0.0, logprobs=1), (True, False, False)),
    ],
)
def test_who_needs_the_mixture(law: str, params: SamplingParams, expected: tuple) -> None:
    table = _table(sampling=law)
    table.add("a", params)
    _step(table, ["a"], [3], decoding=False)
    table.completed(np.array([3]))
    sampling = _step(table, ["a"], [4])
    assert (sampling.mixture[0], sampling.greedy[0], sampling.may_stop[0]) == expected


def test_custom_processors_make_every_request_of_the_mixture_go_to_full_depth() -> None:
    table = NviumRequests(NviumOptions(sampling="mixture"), 0, num_exits=3, always_full=True)
    for request_id, temperature in (("a", 1.0), ("b", 0.0)):
        table.add(request_id, SamplingParams(temperature=temperature))
    _step(table, ["a", "b"], [3, 3], decoding=False)
    table.completed(np.array([3, 3]))
    sampling = _step(table, ["a", "b"], [4, 4])
    assert sampling.mixture.all() and not sampling.greedy.any() and not sampling.may_stop.any()


def test_nothing_is_made_for_more_ranges_than_a_pass_may_have() -> None:
    """Before a pass is split, too: vLLM has planned memory for `max_ranges` block tables."""
    block_size, num_segments, num_blocks, max_ranges = 16, 4, 64, 4
    marks = np.full((num_blocks + 1) * block_size, num_segments, dtype=np.uint8)
    # A position waits in every second block, as after prefix hits on blocks of two origins.
    waiting = np.arange(1, num_blocks, 2) * block_size
    marks[waiting] = 1
    cache = SimpleNamespace(
        marks=marks,
        release=lambda slots: None,
        read_states=lambda slots: torch.zeros(len(slots), 4),
        replace_states=lambda slots, states: None,
    )
    made: list[int] = []
    ran: list[int] = []

    class Watched(CatchUp):
        def _rows(self, *args: Any) -> Rows:
            rows = super()._rows(*args)
            made.append(len(rows.block_table))
            return rows

    catch_up = Watched(
        cache,  # type: ignore[arg-type]
        num_segments,
        block_size,
        lambda rows: None,
        max_rows=1024,
        max_ranges=max_ranges,
    )
    last = num_blocks * block_size - 1
    table = np.arange(1, num_blocks + 1, dtype=np.int32)[None]
    batch = Batch(
        query_start=np.array([0, 1], dtype=np.int32),
        first=np.array([last]),
        last=np.array([last]),
        complete=np.array([0]),
        block_table=table,
        block_table_device=torch.from_numpy(table),
        slots_device=torch.tensor([num_blocks * block_size + block_size - 1]),
    )
    rows = catch_up.start(batch, torch.tensor([last]))

    def forward(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ran.extend(positions.tolist())
        return state

    catch_up.run(batch, rows, torch.zeros(1, 4), 1, forward)
    assert sorted(ran) == sorted([*(waiting - block_size), last])
    assert max(made) <= max_ranges and catch_up.split_passes == 1


def test_draws_lie_between_the_hazards_that_always_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, 2**64 - 1):
        monkeypatch.setattr(draws, "_mix", lambda z, bits=bits: np.full_like(z, bits))
        one = np.zeros(1, dtype=np.uint64)
        assert 0.0 < draws.uniform_draws(one, one, 1)[0, 0] < 1.0
        assert abs(draws.margin_thresholds(one, one, 1)[0, 0]) < 100.0


def test_a_token_leaves_at_the_first_exit_that_it_may_leave_at() -> None:
    margins = np.array([[-1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [np.nan, 9.0, 9.0], [0.1, -1.0, -1.0]])
    greedy = np.array([True, True, False, True])
    needed = policy.thresholds(
        np.zeros(4, np.uint64), np.arange(4), greedy, greedy_margin=0.0, num_exits=3
    )
    found = policy.first_exit(torch.from_numpy(policy.leaves(margins, needed)))
    assert found.tolist() == [1, 3, 0, 0]  # what is no number leaves at once
    assert (needed[greedy] == 0.0).all() and (needed[~greedy] != 0.0).all()
