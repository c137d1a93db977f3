# SPDX-License-Identifier: Apache-2.0
"""What a job says while it runs, and how often a row is begun before it is left out."""

import json

from vllm_nvium.batch.attempts import ALONE_FROM, MOST, Counts
from vllm_nvium.batch.progress import Progress


def test_lines_tell_speed_depth_and_the_time_left() -> None:
    now, told = [100.0], []
    progress = Progress(100, 20, told.append, clock=lambda: now[0])
    now[0] = 105.0
    progress.add(10, 1, 250, [""])
    assert not told
    now[0] = 120.0
    counts = [
        {
            "replica": "a",
            "layers": 10.0,
            "dense_layers": 40.0,
            "accepted": 1.0,
            "drafted": 2.0,
            "begun": 110.0,
        },
        {
            "replica": "a",
            "layers": 30.0,
            "dense_layers": 60.0,
            "accepted": 3.0,
            "drafted": 4.0,
            "begun": 110.0,
        },
        {"replica": "b", "layers": 10.0, "dense_layers": 40.0, "begun": 111.0},
    ]
    progress.add(30, 0, 750, map(json.dumps, counts))
    assert told == [
        "60 of 100 rows, 4.0 rows/s, 100 tokens/s, mean depth 40%, drafts accepted 75%, "
        "1 with an error, 0:00:10 left"
    ]
    progress.add(40, 0, 0, [])
    assert progress.done == 100 and "left" not in progress.line()


def test_a_row_that_ends_the_engine_runs_alone_and_is_then_left_out() -> None:
    counts = Counts()
    for started in range(ALONE_FROM):
        assert counts.begin([1, 2]) == [started, started]
    assert counts.begin([1, 2]) == [ALONE_FROM] * 2, "not begun before their turn"
    assert counts.begin([1], alone=True) == [ALONE_FROM]
    counts.finish([1])
    for started in range(ALONE_FROM, MOST):
        assert counts.begin([2], alone=True) == [started]
    assert counts.begin([1, 2]) == [0, MOST]
