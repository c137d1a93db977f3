# SPDX-License-Identifier: Apache-2.0
"""One engine step of an N-vium model: segments, exits, and who goes on.

The loop in `run_cascade` reads like the paper: run a segment, let the newest token of every
request draw at the exit, and go on, with what waits there, while one of them has not left.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_nvium.model_executor.nvium.completion import CatchUp
from vllm_nvium.model_executor.nvium.policy import leaves
from vllm_nvium.model_executor.ops.head_rows import HeadRows
from vllm_nvium.model_executor.ops.mixture import exit_log_weights
from vllm_nvium.model_executor.ranks import of_first_rank
from vllm_nvium.model_executor.rows import Batch, Rows

if TYPE_CHECKING:
    from vllm_nvium.model_executor.layers.exit_head import Exit
    from vllm_nvium.model_executor.models.nvium import NviumForCausalLM

UNDECIDED = -1
# Rounding of a float32 sum of probabilities: a lead this small is not yet a lead.
LEAD_TOLERANCE = 1e-5


@dataclass(slots=True)
class Sampling:
    """How each request's newest token chooses its head; host arrays, one entry per request.

    Attributes:
        thresholds: [R, N-1] float64, leave at exit k iff `e_k - c_k > threshold`.
        may_stop: [R] bool, whether the step may end once this request has its head. False while it
            has prompt rows, at its deferral cap, or when its output needs every head.
        mixture: [R] bool, hand the sampler `log p_mix` instead of one head's logits.
        greedy: [R] bool, of those, the ones that only need the argmax of `p_mix`.
        all_rows: [R] bool, every row of the step needs `log p_mix` (prompt logprobs).
    """

    thresholds: np.ndarray
    may_stop: np.ndarray
    mixture: np.ndarray
    greedy: np.ndarray
    all_rows: np.ndarray
    wide: bool = False


@dataclass(slots=True)
class Step:
    """Everything one forward pass needs besides its tokens, handed to the model by a runner."""

    request_ids: list[str]
    batch: Batch
    sampling: Sampling
    catch_up: CatchUp
    # Filled in by the cascade, for bookkeeping, metrics and tests: the exit each request's newest
    # token left at (N-1 = final head; [R]), the segments that were run, the rows that each of them
    # ran on, and whether the step went on although every token had its head.
    exits: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    depth: int = 0
    rows_run: list[int] = field(default_factory=list)
    is_forced: bool = False


def run_cascade(
    model: "NviumForCausalLM", step: Step, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Runs one engine step.

    Args:
        input_ids, positions: [T] (or longer, when padded), vLLM's flat batch.

    Returns:
        [T, H] head inputs, or packed `HeadRows` [T, W] when some row needs the mixture. Only rows
        that vLLM will sample from, or asked prompt logprobs for, hold anything.
    """
    batch, catch_up = step.batch, step.catch_up
    rows = catch_up.start(batch, positions)
    may_stop = bool(step.sampling.may_stop.all())
    step.rows_run = [batch.num_rows]
    step.exits = np.full(batch.num_requests, UNDECIDED, dtype=np.int64)
    # Heads with unembeddings of their own cannot share the plain [T, H] output either.
    wide = step.sampling.wide or model.heads_differ
    heads: _NarrowHeads | _WideHeads = (
        _WideHeads(model, step) if wide else _NarrowHeads(model, step)
    )
    # A module that runs as a captured graph returns as many rows as that was captured for.
    state = model.segments[0](input_ids[: batch.num_rows], rows.positions)[: batch.num_rows]
    for k in range(len(model.exits)):
        undecided = heads.at_exit(k, rows, state)
        if not undecided:
            if may_stop and catch_up.has_room(rows):
                step.depth = k + 1
                catch_up.stop(rows, state, step.depth)
                return heads.output(state)
            step.is_forced = True
        rows, state = catch_up.run(batch, rows, state, k + 1, model.segments[k + 1])
        step.rows_run.append(catch_up.rows_run)
    step.depth = len(model.segments)
    catch_up.complete(rows)
    heads.at_end(rows, state)
    return heads.output(state)


def _take(state: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of a [T, H] tensor by ascending host indices; itself when that is all of them."""
    if len(index) == len(state):
        return state
    return state.index_select(0, torch.from_numpy(index).to(state.device))


def _head_inputs(exit_: "Exit", normed: torch.Tensor, margins: np.ndarray) -> torch.Tensor:
    """Inputs of the unembedding [n, H] of tokens that left with these margins [n]. Where a margin
    is not a number these are none, so that vLLM sees it and treats it as it does in any model."""
    inputs = exit_.head_input(normed)
    if (broken := np.isnan(margins)).any():
        inputs = inputs.masked_fill(torch.from_numpy(broken).to(inputs.device)[:, None], torch.nan)
    return inputs


class _NarrowHeads:
    """Every sampled row is spoken for by one head: the input of the unembedding is enough."""

    def __init__(self, model: "NviumForCausalLM", step: Step) -> None:
        self.model, self.step = model, step
        self.result: torch.Tensor | None = None
        self.undecided = step.batch.num_requests
        # Hazards that are the same for every token need no states: all draws are made at once.
        self.constant = model.constant_margins  # [N-1]
        self.leave: np.ndarray | None = None
        self.nobody_leaves = False
        if self.constant is not None:
            self.leave = leaves(self.constant, step.sampling.thresholds)  # [R, N-1]
            self.nobody_leaves = not self.leave.any()

    def _emit(self, requests: np.ndarray, head_inputs: torch.Tensor) -> None:
        """Puts [n, H] head inputs of the newest rows of `requests` into the step's output."""
        batch = self.step.batch
        if self.result is None:
            if len(requests) == batch.num_rows:  # one row each, all at once: no copy
                self.result = head_inputs
                return
            self.result = head_inputs.new_zeros(batch.num_rows, head_inputs.shape[1])
        newest = batch.query_start[1:][requests].astype(np.int64) - 1
        self.result[torch.from_numpy(newest).to(head_inputs.device)] = head_inputs

    def at_exit(self, k: int, rows: Rows, state: torch.Tensor) -> int:
        """Draws exit k for the newest token of every request that has no head yet.

        Returns:
            how many have none after that.
        """
        if self.nobody_leaves or self.undecided == 0:
            return self.undecided
        step, exit_ = self.step, self.model.exits[k]
        normed: torch.Tensor | None = None
        if self.constant is None or self.leave is None:
            normed = exit_.norm(_take(state, rows.newest()))
            margins = exit_.margins(normed).cpu().numpy()
            leave = leaves(margins, step.sampling.thresholds[:, k])
        else:
            margins = np.full(len(step.exits), self.constant[k])
            leave = self.leave[:, k]
        leaving = np.flatnonzero(leave & (step.exits == UNDECIDED))
        if len(leaving) == 0:
            return self.undecided
        if normed is None:
            normed = exit_.norm(_take(state, rows.newest()[leaving]))
        else:
            normed = _take(normed, leaving)
        step.exits[leaving] = k
        self._emit(leaving, _head_inputs(exit_, normed, margins[leaving]))
        self.undecided -= len(leaving)
        return self.undecided

    def at_end(self, rows: Rows, state: torch.Tensor) -> None:
        """The final head speaks for every request that left nowhere."""
        if self.undecided == 0:
            return
        if self.undecided == len(self.step.exits) == len(state):  # one row each, and nobody left
            self.step.exits.fill(len(self.model.exits))
            self.result = self.model.final_head(state)
            return
        staying = np.flatnonzero(self.step.exits == UNDECIDED)
        self.step.exits[staying] = len(self.model.exits)
        self._emit(staying, self.model.final_head(_take(state, rows.newest()[staying])))

    def output(self, state: torch.Tensor) -> torch.Tensor:
        if self.result is None:
            return state.new_zeros(self.step.batch.num_rows, state.shape[1])
        return self.result


class _WideHeads:
    """Some rows need several heads and the weights of the exits; see `HeadRows`.

    Slower than `_NarrowHeads` and only used in steps that hold such a row. Requests spoken for by
    one head travel in the same rows.
    """

    def __init__(self, model: "NviumForCausalLM", step: Step) -> None:
        self.model, self.step = model, step
        batch, sampling = step.batch, step.sampling
        self.num_exits = len(model.exits)
        # [M] every output row that gets the mixture, as (request, distance from its newest row).
        request = np.repeat(np.arange(batch.num_requests), np.diff(batch.query_start))
        from_newest = batch.query_start[1:][request] - 1 - np.arange(batch.num_rows)
        chosen = sampling.all_rows[request] | (sampling.mixture[request] & (from_newest == 0))
        self.output_rows = np.flatnonzero(chosen)
        self.request, self.from_newest = request[chosen], from_newest[chosen]
        self.margins = torch.empty(len(self.output_rows), self.num_exits, dtype=torch.float32)
        self.rows: HeadRows | None = None
        # Of greedy requests, see `_decide`: margins and weights `pi_k` of the newest rows at the
        # exits so far, the sum of the weights, and how many heads are in the sums of `pi_k q_k`.
        self.newest_margins = np.zeros((batch.num_requests, self.num_exits))
        self.weights = np.zeros((batch.num_requests, self.num_exits))
        self.mass = np.zeros(batch.num_requests)
        self.num_summed = np.zeros(batch.num_requests, dtype=np.int64)
        self.sums: torch.Tensor | None = None  # [greedy requests, V] float32
        self.place = np.cumsum(sampling.greedy) - 1  # [R], where the sums of a request are

    def _packed(self, state: torch.Tensor) -> HeadRows:
        if self.rows is None:
            num_rows = self.step.batch.num_rows
            self.rows = HeadRows(num_rows, self.num_exits + 1, state.shape[1], state)
            self.margins = self.margins.to(state.device)
        return self.rows

    def _rows_in_pass(self, rows: Rows) -> np.ndarray:
        """[M] int64: which rows of a pass the mixture rows are."""
        return rows.newest()[self.request] - self.from_newest

    def at_exit(self, k: int, rows: Rows, state: torch.Tensor) -> int:
        step, exit_, packed = self.step, self.model.exits[k], self._packed(state)
        sampling = step.sampling
        if len(self.output_rows):
            normed = exit_.norm(_take(state, self._rows_in_pass(rows)))
            index = torch.from_numpy(self.output_rows).to(state.device)
            packed.heads[index, k] = exit_.head_input(normed)
            self.margins[:, k] = exit_.margins(normed)

        normed = exit_.norm(_take(state, rows.newest()))
        margins = exit_.margins(normed).cpu().numpy()
        open_ = (step.exits == UNDECIDED) & ~sampling.mixture
        leaving = np.flatnonzero(open_ & leaves(margins, sampling.thresholds[:, k]))
        if len(leaving):
            step.exits[leaving] = k
            inputs = _head_inputs(exit_, _take(normed, leaving), margins[leaving])
            self._emit(packed, leaving, k, inputs)
        if sampling.greedy.any():
            self._weigh(k, margins)
            self._decide(k, packed)
        return int(np.count_nonzero(step.exits == UNDECIDED))

    def _emit(
        self, packed: HeadRows, requests: np.ndarray, head: int, inputs: torch.Tensor
    ) -> None:
        newest = self.step.batch.query_start[1:][requests].astype(np.int64) - 1
        index = torch.from_numpy(newest).to(inputs.device)
        packed.heads[index, head] = inputs
        packed.fields[index, 0] = head

    def _weigh(self, k: int, margins: np.ndarray) -> None:
        """Notes `pi_k` of greedy requests, whose newest rows have these margins [R] at exit k. A
        margin that is not a number adds nothing, here and at later exits: no head is left out."""
        self.newest_margins[:, k] = margins
        so_far = torch.from_numpy(self.newest_margins[:, : k + 1])
        weights = exit_log_weights(so_far)[:, k].exp().numpy()
        self.weights[:, k] = np.where(self.step.sampling.greedy & (weights > 0.0), weights, 0.0)
        self.mass += self.weights[:, k]

    def _decide(self, k: int, packed: HeadRows) -> None:
        """Greedy tokens of the mixture that no later head can change any more.

        With `acc(y) = sum_{j<=k} pi_j q_j(y)` and `rest = prod_{j<=k} (1 - p_j)`, later heads add
        at most `rest` to any token, so the argmax is settled once the lead of the top token exceeds
        `rest`. A lead is at most the mass so far, so nothing is evaluated while that is below half.
        """
        step, sampling = self.step, self.step.sampling
        is_candidate = sampling.greedy & sampling.may_stop & (step.exits == UNDECIDED)
        candidates = np.flatnonzero(is_candidate & (self.mass > 0.5))
        if len(candidates) == 0:
            return
        sums = _take(self._sum_up(k, candidates, packed), self.place[candidates])  # [C, V]
        top = sums.topk(2)
        leads = of_first_rank(top.values[:, 0] - top.values[:, 1]).cpu().numpy()
        settled = np.flatnonzero(leads > 1.0 - self.mass[candidates] + LEAD_TOLERANCE)
        if len(settled) == 0:
            return
        tokens = _take(top.indices, settled)[:, 0].int()
        newest = step.batch.query_start[1:][candidates[settled]].astype(np.int64) - 1
        packed.fields[torch.from_numpy(newest).to(tokens.device), 1] = tokens
        step.exits[candidates[settled]] = k

    def _sum_up(self, k: int, candidates: np.ndarray, packed: HeadRows) -> torch.Tensor:
        """Adds to the sums [greedy requests, V] of some requests [C] what their heads up to k add
        to them and have not yet: `pi_j q_j`, head by head, whoever's they are."""
        if self.sums is None:
            shape = (int(self.place[-1]) + 1, self.model.config.vocab_size)
            self.sums = torch.zeros(shape, dtype=torch.float32, device=packed.packed.device)
        of_heads = np.arange(k + 1) >= self.num_summed[candidates, None]
        of_heads &= self.weights[candidates, : k + 1] > 0.0
        self.num_summed[candidates] = k + 1
        heads, chosen = np.nonzero(of_heads.T)  # ascending by head
        rows = self.step.batch.query_start[1:][candidates].astype(np.int64) - 1  # [C]
        device = self.sums.device
        places = torch.from_numpy(self.place[candidates][chosen]).to(device)  # [P]
        weights = self.weights[candidates[chosen], heads].astype(np.float32)  # [P]
        weights_device = torch.from_numpy(weights).to(device)
        for pairs, logits in self.model.logits_in_parts(packed.heads, rows[chosen], heads, heads):
            terms = weights_device[pairs, None] * torch.softmax(logits.float(), dim=-1)
            self.sums.index_add_(0, places[pairs], terms)
        return self.sums

    def at_end(self, rows: Rows, state: torch.Tensor) -> None:
        step, packed = self.step, self._packed(state)
        final = self.num_exits
        if len(self.output_rows):
            index = torch.from_numpy(self.output_rows).to(state.device)
            inputs = self.model.final_head(_take(state, self._rows_in_pass(rows)))
            packed.heads[index, final] = inputs
            packed.log_weights[index] = exit_log_weights(self.margins)
        open_ = step.exits == UNDECIDED
        staying = np.flatnonzero(open_ & ~step.sampling.mixture)
        if len(staying):
            inputs = self.model.final_head(_take(state, rows.newest()[staying]))
            self._emit(packed, staying, final, inputs)
        step.exits[open_] = final

    def output(self, state: torch.Tensor) -> torch.Tensor:
        return self._packed(state).packed
