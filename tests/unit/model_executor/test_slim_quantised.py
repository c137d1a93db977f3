# SPDX-License-Identifier: Apache-2.0
"""Which low-precision copies a slim verifier gets: what is timed, what each kind promises, and what
stands in a model afterwards."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from vllm_nvium.model_executor.layers.low_precision_linear import Int8Linear
from vllm_nvium.model_executor.via_sd import slim_quantised, slim_timing
from vllm_nvium.model_executor.via_sd.slim import with_copies
from vllm_nvium.model_executor.via_sd.slim_quantised import Copies, threads_on_all_cores
from vllm_nvium.model_executor.via_sd.slim_timing import (
    FEWEST_REPETITIONS,
    SURVIVAL,
    TIMED_OUTPUTS,
    TIMED_ROWS,
    VERIFIED_ROWS,
    Timing,
    Windows,
    not_falling,
    promise,
    time_by_rows,
    time_candidates,
)


def test_times_between_and_beyond_those_measured() -> None:
    timing = Timing(None, {1: 1.0, 2: 1.5, 8: 3.0})
    assert [timing.at(rows) for rows in (1, 1.5, 5, 8, 12)] == [1.0, 1.25, 2.25, 3.0, 4.0]


def test_a_size_that_was_disturbed_costs_no_kind_its_place() -> None:
    assert not_falling({1: 36.0, 2: 26.0, 4: 30.0, 8: 29.0}) == {1: 26.0, 2: 26.0, 4: 29.0, 8: 29.0}
    rising = {1: 1.0, 2: 2.0, 4: 3.0, 8: 9.0}
    assert not_falling(rising) == rising


SMALL, LARGE = (2, 3), (4, 3)


class Machine:
    """A clock, and products that take a second for each row, or what `longer` says of its rows, and
    a hundred times as long in the machine's first `slow` calls."""

    def __init__(self, slow: int = 0, longer: dict[int, float] | None = None) -> None:
        self.now, self.calls, self.slow, self.longer = 0.0, 0, slow, longer or {}

    def multiply(self, x: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        seconds = share * self.longer.get(len(x), float(len(x)))
        self.now += seconds * (100 if self.calls < self.slow else 1)
        self.calls += 1
        return x

    def timed(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float = float("inf")
    ) -> dict[str, dict[int, float]]:
        """Of the target, and of a kind that takes half of its time, when so many may be spent."""
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(slim_timing, "time", clock)
        monkeypatch.setattr(slim_timing, "TIMED_SECONDS", seconds)
        ones = {SMALL: torch.ones(1, 3), LARGE: torch.ones(1, 3)}
        half = partial(self.multiply, share=0.5)
        products = {
            "target": dict.fromkeys(ones, self.multiply),
            "half": dict.fromkeys(ones, half),
        }
        sizes = {"target": VERIFIED_ROWS, "half": TIMED_ROWS}
        return time_by_rows(products, sizes, ones, {SMALL: 1.0, LARGE: 2.0})


# Calls of a turn: for each of two weights, the target's five sizes and four of the other kind.
TURN = 2 * (len(VERIFIED_ROWS) + len(TIMED_ROWS))


# Two turns and a bit: one size after another would have all of the first size's among them, and one
# kind after another most of the target's.
@pytest.mark.parametrize("slow", [0, 2 * TURN + 10])
def test_a_machine_that_is_slow_at_first_is_so_for_no_size_and_no_kind(
    slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Machine(slow).timed(monkeypatch)
    assert times["target"] == pytest.approx({rows: 3.0 * rows for rows in VERIFIED_ROWS})
    assert times["half"] == pytest.approx({rows: 1.5 * rows for rows in TIMED_ROWS})


@pytest.mark.parametrize("turns", [4, 5])
def test_a_machine_that_is_slow_for_longer_is_so_for_every_kind(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Machine(turns * TURN).timed(monkeypatch)
    assert times["target"][1] > 3.0
    for rows in TIMED_ROWS:
        assert times["half"][rows] == pytest.approx(times["target"][rows] / 2)


def test_what_is_timed_does_not_fall_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Machine(longer={1: 5.0}).timed(monkeypatch)
    assert times["target"] == pytest.approx({1: 6.0, 2: 6.0, 4: 12.0, 8: 24.0, 32: 96.0})


def test_large_weights_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    times = machine.timed(monkeypatch, seconds=1.0)
    assert machine.calls == (1 + FEWEST_REPETITIONS) * TURN
    assert times["target"] == pytest.approx({rows: 3.0 * rows for rows in VERIFIED_ROWS})


@pytest.mark.parametrize("slim,survival", [(0.3, 0.95), (0.5, 0.99), (0.9, 0.5)])
@pytest.mark.parametrize("per_row", [0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_promise_is_that_of_the_best_window(
    slim: float, survival: float, per_row: float, batch: int
) -> None:
    """By adding up what every token of every window is worth."""
    full = Timing(None, {rows: 2 * (1 + per_row * (rows - 1)) for rows in (1, 2, 4, 8)})
    cheaper = Timing(None, dict.fromkeys((1, 2, 4, 8), 2 * slim))
    plain = 1 + per_row * (batch - 1)  # of a pass of one row
    rates = []
    for n in range(17):
        kept = sum(survival**k for k in range(1, n + 1))
        verified = 1 + per_row * (batch * (n + 1) - 1)
        rates.append((1 + kept) * plain / (n * slim + verified))
    assert promise(full, cheaper, survival, range(17), batch) == pytest.approx(max(rates))
    assert promise(full, cheaper, survival, range(1, 17), batch) == pytest.approx(max(rates[1:]))
    assert promise(full, cheaper, survival, [0], batch) == pytest.approx(1.0)


class Cheap(Int8Linear):
    """Cheap for one row, dear for eight."""


class Level(Int8Linear):
    """Takes as long for eight rows as for one."""


def copies_of(
    full: dict[int, float],
    times: dict[type[Int8Linear], dict[int, float]],
    most_requests: int = 256,
    most_rows: int = 4096,
    lengths: tuple[int, int] = (0, 16),
) -> Copies:
    """Of a model whose products take these times."""
    windows = Windows(*lengths, most_requests, most_rows)
    timings = [Timing(layer, seconds) for layer, seconds in times.items()]
    model = nn.Module()
    model.lm_head = nn.Linear(2, 2)
    with patch.object(slim_quantised, "time_candidates", lambda *_: (Timing(None, full), timings)):
        return Copies(model, [], [*times], windows)


@pytest.mark.parametrize("most_requests,chosen", [(1, Cheap), (8, Level), (256, Level)])
def test_a_kind_that_is_cheap_for_one_request_only_is_taken_for_one_only(
    most_requests: int, chosen: type[Int8Linear]
) -> None:
    times = {
        Cheap: {1: 3.5, 2: 6.0, 4: 10.0, 8: 20.0},
        Level: {1: 4.0, 2: 4.0, 4: 4.0, 8: 4.0},
    }
    found = copies_of({1: 10.0, 2: 10.5, 4: 11.5, 8: 13.5, 32: 20.0}, times, most_requests)
    assert found.layer is chosen
    assert found.batches == [size for size in (1, 2, 4, 8) if size <= most_requests]
    found.take("int8")
    assert found.layer is chosen


def test_no_window_is_promised_that_a_pass_has_no_room_for() -> None:
    """With `--max-num-batched-tokens 16` two requests may have windows of seven tokens each."""
    full = dict.fromkeys(VERIFIED_ROWS, 10.0)
    kind = {Level: dict.fromkeys(TIMED_ROWS, 0.001)}
    found = copies_of(full, kind, most_rows=16)
    lengths = [15, 7, 3, 1]
    wanted = [sum(SURVIVAL["int8"] ** k for k in range(n + 1)) for n in lengths]
    assert found.promises_by_batch[0] == pytest.approx(wanted, rel=0.01)


def test_with_a_number_of_rounds_windows_have_as_many_tokens() -> None:
    """The kind that would be best in longer ones is not taken, and plain decoding is no way out."""
    full = {rows: 100.0 + rows for rows in VERIFIED_ROWS}
    times = {
        Cheap: {1: 24.0, 2: 26.0, 4: 30.0, 8: 37.0},
        Level: {1: 23.0, 2: 31.0, 4: 46.0, 8: 77.0},
    }
    found = copies_of(full, times, lengths=(2, 2))
    tokens = 1 + SURVIVAL["int8"] + SURVIVAL["int8"] ** 2
    promised = [tokens * (100 + b) / (2 * times[Cheap][b] + 100 + 3 * b) for b in TIMED_ROWS]
    assert found.promises_by_batch[0] == pytest.approx(promised)
    dear = {Level: dict.fromkeys(TIMED_ROWS, 500.0)}
    assert copies_of(full, dear, lengths=(2, 2)).promises[0] < 1.0
    # Without room for a window there is none.
    assert copies_of(full, times, most_rows=2, lengths=(2, 2)).promises_by_batch[0][1] == 1.0


def test_where_windows_pay_for_no_kind_the_cheaper_one_is_taken() -> None:
    """All promise what plain decoding does, then."""
    full = {rows: 10.0 * rows for rows in VERIFIED_ROWS}
    times = {
        Cheap: {1: 9.0, 2: 19.0, 4: 39.0, 8: 79.0},
        Level: {1: 5.0, 2: 5.0, 4: 5.0, 8: 5.0},
    }
    found = copies_of(full, times)
    assert found.promises == [1.0, 1.0]
    assert found.layer is Level


def test_no_kind_is_taken_that_is_cheaper_at_no_number_of_rows() -> None:
    full = {rows: 10.0 + rows for rows in VERIFIED_ROWS}
    dear = {rows: 11.0 + rows for rows in TIMED_ROWS}
    assert copies_of(full, {Cheap: dear, Level: dear}).layer is None


def test_the_log_has_every_time_and_promise() -> None:
    full = {rows: 0.01 * rows for rows in VERIFIED_ROWS}
    lines = copies_of(full, {Level: dict.fromkeys(TIMED_ROWS, 0.002)}).table().splitlines()
    assert lines[0].split()[:6] == ["rows", *map(str, VERIFIED_ROWS)]
    assert lines[1].split() == ["target", "10.00", "20.00", "40.00", "80.00", "320.00"]
    kind, *numbers = lines[2].rsplit(maxsplit=8)
    assert kind.split() == ["int8,", "torch", "W8A16"]
    assert numbers[:4] == ["2.00"] * 4 and all(float(gain) >= 1.0 for gain in numbers[4:])


def test_what_is_timed_stands_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of each shape, a part of a large one; the target at the rows of windows too."""
    seen: dict[str, Any] = {}

    def time_and_note(products: Any, sizes: Any, ones: Any, scale: Any) -> Any:
        seen.update(sizes=sizes, scale=scale, shapes={kind: [*of] for kind, of in products.items()})
        return {kind: dict.fromkeys(sizes[kind], 1.0) for kind in products}

    def part(module: Any, outputs: int) -> torch.Tensor:
        return module.weight[:outputs]

    monkeypatch.setattr(slim_timing, "time_by_rows", time_and_note)
    monkeypatch.setattr(slim_timing, "product_of_vllm", lambda *_: None)
    monkeypatch.setattr(slim_timing, "weight_of", part)
    monkeypatch.setattr(slim_timing, "input_of", lambda module: module.weight[:1])
    small, large = (
        SimpleNamespace(weight=torch.zeros(rows, 32)) for rows in (64, 3 * TIMED_OUTPUTS)
    )
    full, [timing] = time_candidates([small, small], large, [Int8Linear])
    assert full.layer is None and [*full.seconds] == [1, 2, 4, 8, 32]
    assert timing.layer is Int8Linear and [*timing.seconds] == [1, 2, 4, 8]
    assert seen["scale"] == {(64, 32): 2, (3 * TIMED_OUTPUTS, 32): 3}
    assert seen["shapes"][None] == seen["shapes"][Int8Linear] == [*seen["scale"]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)


def test_copies_stand_in_for_what_they_copy_and_the_rest_is_shared() -> None:
    model = nn.Module()
    model.first, model.second, model.empty = Block(), Block(), None
    instead = nn.Linear(2, 2)
    found = with_copies(model, {model.first.linear: instead})
    assert found is not model and found.first.linear is instead
    assert found.first.norm is model.first.norm and found.second is model.second
    assert model.first.linear is not instead, "the model itself is as it was"
    assert with_copies(model, {instead: model.first}) is model, "nothing to replace"
    only = with_copies(model, {model.first.linear: instead}, below=("second",))
    assert only is model, "it was not to look there"
    torch.testing.assert_close(found.second.linear.weight, model.second.linear.weight)


def test_threads_for_copies_have_the_cores_of_the_process() -> None:
    """Also where the thread that starts them is bound to one."""

    def bound() -> ThreadPoolExecutor:
        os.sched_setaffinity(0, {min(cores)})
        return threads_on_all_cores()

    cores = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as one:
        threads = one.submit(bound).result()
    with threads:
        assert threads.submit(os.sched_getaffinity, 0).result() == cores
