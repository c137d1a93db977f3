# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for traces of requests; see `trace_engine.py`."""

import random
from collections.abc import Sequence

from hypothesis import strategies as st
from trace_engine import Arrival
from vllm import SamplingParams

VOCABULARY = 256


def long_texts(vocabulary: int) -> list[list[int]]:
    """Two, that prompts are cut from, so that prefix-cache hits are common."""
    return [[random.Random(t).randrange(3, vocabulary) for _ in range(120)] for t in range(2)]


TEXTS = long_texts(VOCABULARY)


@st.composite
def nvium_params(draw: st.DrawFn, top_k: bool = True) -> SamplingParams:
    # Triton's interpreter cannot run Model Runner V2's kernel for top_k.
    return SamplingParams(
        temperature=1.0,
        seed=draw(st.integers(0, 3)),
        extra_args=draw(
            st.sampled_from([None, None, {"nvium_max_deferred": 0}, {"nvium_max_deferred": 3}])
        ),
        # A greedy choice of the drawn head: equal requests get equal tokens, whatever their seeds.
        top_k=draw(st.sampled_from([0, 0, 1])) if top_k else 0,
        ignore_eos=True,
    )


@st.composite
def arrivals(
    draw: st.DrawFn,
    params: st.SearchStrategy[SamplingParams],
    texts: Sequence[list[int]] = TEXTS,
    vocabulary: int = VOCABULARY,
) -> Arrival:
    """Requests whose prompts share beginnings, of many lengths.

    Args:
        params: without a length, and without what is said of the prefix cache.
    """
    text = draw(st.sampled_from(texts))
    length = draw(st.integers(1, 110))
    tail = draw(st.lists(st.integers(3, vocabulary - 1), max_size=3))
    chosen = draw(params)
    chosen.max_tokens = draw(st.one_of(st.integers(1, 8), st.integers(30, 70)))
    # Either leaves the prefix cache unread, so that blocks come to be there twice.
    chosen.prompt_logprobs = draw(st.sampled_from([None, None, None, 0]))
    chosen.skip_reading_prefix_cache = draw(st.sampled_from([None, None, None, True]))
    # vLLM decides it when parameters are made.
    if chosen.skip_reading_prefix_cache is None:
        chosen.skip_reading_prefix_cache = chosen.prompt_logprobs is not None
    return Arrival(
        step=draw(st.integers(0, 12)),
        prompt=text[:length] + tail,
        params=chosen,
        abort_after=draw(st.sampled_from([None, None, None, 1, 5, 20])),
    )


@st.composite
def traces(
    draw: st.DrawFn, of: st.SearchStrategy[Arrival], vocabulary: int = VOCABULARY, max_size: int = 7
) -> list[Arrival]:
    """Arrivals, some of which go on from what an earlier one has got."""
    # Sizes drawn evenly: lists of their own accord are mostly short, and nothing collides in them.
    size = draw(st.integers(1, max_size))
    trace = draw(st.lists(of, min_size=size, max_size=size))
    for number, arrival in enumerate(trace):
        earlier = [i for i in range(number) if trace[i].continues is None]
        if earlier and draw(st.booleans()):
            arrival.continues = draw(st.sampled_from(earlier))
            arrival.step = trace[arrival.continues].step + draw(st.integers(20, 80))
            arrival.prompt = draw(st.lists(st.integers(3, vocabulary - 1), min_size=1, max_size=3))
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


def nvium_traces() -> st.SearchStrategy[list[Arrival]]:
    return traces(arrivals(nvium_params()))
