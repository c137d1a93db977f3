# SPDX-License-Identifier: Apache-2.0
"""What drafts may take of a step, and who has how much of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nvium.via_sd.options import ViaSDOptions
from vllm_nvium.via_sd.session import Session
from vllm_nvium.via_sd.step_budget import Admission, fair_shares, room_for_drafts

counts = st.lists(st.integers(0, 20), max_size=8)


@given(counts, st.integers(0, 100))
def test_shares_are_fair(wanted: list[int], total: int) -> None:
    shares = fair_shares(wanted, total)
    assert sum(shares) == min(total, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    # Whoever wanted more has at most one less than anybody.
    short = [share for share, want in zip(shares, wanted, strict=True) if share < want]
    assert not short or min(short) >= max(shares) - 1


def test_all_that_is_left_goes_to_drafts_where_no_prompt_waits() -> None:
    assert room_for_drafts(16, [1, 1, 1], 0, 1, True) == 13
    assert room_for_drafts(3, [1, 1, 1], 0, 1, True) == 0
    assert room_for_drafts(2, [1, 1, 1], 0, 1, True) == 0


def test_prompts_have_half_of_it_if_they_need_it() -> None:
    assert room_for_drafts(16, [1, 1], 100, 1, True) == 7
    assert room_for_drafts(16, [1, 1, 100], 0, 1, True) == 7
    assert room_for_drafts(16, [1, 1, 2], 1, 1, True) == 11
    # With less than two tokens no prompt would go on.
    assert room_for_drafts(4, [1, 1], 100, 2, True) == 0


def test_a_prompt_that_is_computed_at_once_has_what_it_needs() -> None:
    assert room_for_drafts(100, [1, 1], 90, 1, False) == 8
    assert room_for_drafts(100, [1, 1], 200, 1, False) == 0


@given(
    st.integers(1, 60),
    st.lists(st.one_of(st.just(1), st.integers(2, 40)), min_size=1, max_size=8),
    counts,
    st.integers(0, 60),
    st.booleans(),
)
def test_everybody_who_would_have_a_token_has_one(
    budget: int, needs: list[int], wanted: list[int], waiting: int, in_parts: bool
) -> None:
    """Served one after the other, as vLLM does."""
    padded = [*wanted, *[0] * len(needs)][: len(needs)]
    drafts = [want if need == 1 else 0 for need, want in zip(needs, padded, strict=True)]
    room = room_for_drafts(budget, needs, waiting, 1, in_parts)
    shares = fair_shares(drafts, room)
    left, left_without = budget, budget
    for need, share in zip(needs, shares, strict=True):
        has, has_without = min(left, need + share), min(left_without, need)
        left, left_without = left - has, left_without - has_without
        if need == 1:
            assert (has > 0) == (has_without > 0)
        # Nor are drafts cut by anybody else.
        assert share == 0 or has == need + share


def test_room_that_no_prompt_took_is_kept_again_later() -> None:
    admission = Admission()
    assert admission.is_open(3)
    admission.observe(3, has_begun=True)
    assert admission.is_open(3)
    admission.observe(3, has_begun=False)
    waits = [admission.is_open(3) for _ in range(Admission.EVERY)]
    assert waits == [False] * (Admission.EVERY - 1) + [True]
    admission.observe(3, has_begun=False)
    assert not admission.is_open(4) and admission.is_open(2), "a request has ended"


def test_the_planner_is_not_asked_where_no_draft_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first trials would be over before anything was tried."""
    from vllm import SamplingParams

    monkeypatch.setattr("vllm_nvium.via_sd.first_rank.number_of_ranks", lambda: 1)
    session = Session(ViaSDOptions(drafts=4), can_draft_again=True)
    names = ["a", "b"]
    for name in names:
        session.add(name, SamplingParams())
    view: Any = SimpleNamespace(
        request_ids=names, unfinished=[False, False], one_at_a_time=[False, False]
    )
    session.room = 1
    for _ in range(50):
        assert session.plan_drafts(view) == (names, 0)
    # Nothing is known yet, so that all kinds of plans are tried.
    counts = set()
    for room in [*[3] * 50, *[None] * 50]:
        session.room = room
        counts.add((room, session.plan_drafts(view)[1]))
        assert set(session.asked.values()) == {session.plan.num_draft_tokens}
    assert max(count for room, count in counts if room == 3) == 1
    assert session.planner.snapshot()["steps"]["tiered"] > 0
