# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for traces of requests; see `trace_engine.py`."""

import random

from hypothesis import strategies as st
from trace_engine import Arrival
from vllm import SamplingParams

VOCABULARY = 256
# Prompts are cut from two long texts, so that prefix-cache hits are common.
TEXTS = [[random.Random(t).randrange(3, VOCABULARY) for _ in range(120)] for t in range(2)]


@st.composite
def arrivals(draw: st.DrawFn, top_k: bool = True) -> Arrival:
    # Triton's interpreter cannot run Model Runner V2's kernel for top_k.
    text = draw(st.sampled_from(TEXTS))
    length = draw(st.integers(1, 110))
    tail = draw(st.lists(st.integers(3, VOCABULARY - 1), max_size=3))
    params = SamplingParams(
        temperature=1.0,
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.one_of(st.integers(1, 8), st.integers(30, 70))),
        ignore_eos=True,
        extra_args=draw(
            st.sampled_from([None, None, {"nvium_max_deferred": 0}, {"nvium_max_deferred": 3}])
        ),
        # Either leaves the prefix cache unread, so that blocks come to be there twice.
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        skip_reading_prefix_cache=draw(st.sampled_from([None, None, None, True])),
        # A greedy choice of the drawn head: equal requests get equal tokens, whatever their seeds.
        top_k=draw(st.sampled_from([0, 0, 1])) if top_k else 0,
    )
    return Arrival(
        step=draw(st.integers(0, 12)),
        prompt=text[:length] + tail,
        params=params,
        abort_after=draw(st.sampled_from([None, None, None, 1, 5, 20])),
    )


@st.composite
def traces(draw: st.DrawFn, max_size: int = 7) -> list[Arrival]:
    """Arrivals, some of which go on from what an earlier one has got."""
    # Sizes drawn evenly: lists of their own accord are mostly short, and nothing collides in them.
    size = draw(st.integers(1, max_size))
    trace = draw(st.lists(arrivals(), min_size=size, max_size=size))
    for number, arrival in enumerate(trace):
        earlier = [i for i in range(number) if trace[i].continues is None]
        if earlier and draw(st.booleans()):
            arrival.continues = draw(st.sampled_from(earlier))
            arrival.step = trace[arrival.continues].step + draw(st.integers(20, 80))
            arrival.prompt = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=3))
            # Whole blocks of an answer, which the cache then has as somebody's prompt too.
            arrival.take = draw(st.sampled_from([180, 180, 32, 64, 96]))
            if draw(st.booleans()):
                arrival.prompt = []
        elif number and draw(st.integers(0, 3)) == 0:  # the same request again, at once or later
            twin = trace[draw(st.integers(0, number - 1))]
            arrival.prompt, arrival.continues, arrival.take = (
                list(twin.prompt),
                twin.continues,
                twin.take,
            )
            arrival.step = max(arrival.step, twin.step)
    return trace


hazard = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])
