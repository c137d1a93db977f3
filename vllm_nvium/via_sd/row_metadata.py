# SPDX-License-Identifier: Apache-2.0
"""vLLM's sampling metadata for the rows behind drafts: to the sampler each of them is a request of
its own, whose output includes the drafts before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.penalties import apply_all_penalties

# vLLM's own logits processors -> the attribute that tells whether a request of the batch asks for
# it. Each is made anew for the rows behind drafts; of another one nothing is known.
BUILTIN = {
    MinTokensLogitsProcessor: "min_toks",
    LogitBiasLogitsProcessor: "biases",
    MinPLogitsProcessor: "min_p_count",
}


# Token ids that a request may name and still have drafts: a row of them takes a millisecond.
MOST_ENTRIES = 2048
# Rows whose penalties vLLM works out at a time: it counts the vocabulary twice in eight bytes for
# each, and a start keeps no memory for that.
PENALISED_AT_ONCE = 64


@dataclass(frozen=True)
class Span:
    """The rows of one request, row j behind j of its drafts.

    Attributes:
        request: its row in the batch.
        drafts: [n] tokens; there are n + 1 rows.
        before: tokens between its output and the first row.
        generator: what its rows draw from, one after another; None for noise of no request.
    """

    request: int
    drafts: Sequence[int]
    before: Sequence[int] = ()
    generator: torch.Generator | None = None

    @property
    def num_rows(self) -> int:
        return len(self.drafts) + 1


class RowGenerators(dict[int, torch.Generator]):
    """Row -> the generator that it draws from, for vLLM's sampler.

    The sampler goes through the items and draws for one row after the other, so rows that share a
    generator get what plain decoding draws in as many steps.

    Attributes:
        states: row -> state of its generator before it drew.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self.states: dict[int, torch.Tensor] = {}
        for first, span in with_first_rows(spans):
            if span.generator is not None:
                self.update(dict.fromkeys(range(first, first + span.num_rows), span.generator))

    def items(self) -> Iterator[tuple[int, torch.Generator]]:  # type: ignore[override]
        for row, generator in super().items():
            self.states[row] = generator.get_state()
            yield row, generator

    def rewind(self, row: int) -> None:
        """As if this row and those behind it that share its generator had not drawn."""
        if row in self.states:
            self[row].set_state(self.states[row])


def with_first_rows(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the number of its first row."""
    first = 0
    for span in spans:
        yield first, span
        first += span.num_rows


def draws_one_at_a_time(batch: Any, params: Sequence[Any]) -> list[bool]:
    """[R], requests of the batch that are to have no drafts: what they ask of the sampler is known
    for the next token only.

    Args:
        params: vLLM's sampling parameters of each.
    """
    one_by_one = [each is not None and _is_for_one_row(each) for each in params]
    for processor in batch.logitsprocs.all:
        if type(processor) in BUILTIN:
            continue
        if isinstance(processor, AdapterLogitsProcessor):
            # It says to which requests it applies.
            one_by_one = [one or row in processor.req_info for row, one in enumerate(one_by_one)]
        else:
            one_by_one = [True] * len(one_by_one)
    return one_by_one


def _is_for_one_row(params: Any) -> bool:
    """Whether vLLM's sampling parameters look back on the text, or are so long that making them
    anew for every row would hold up the requests beside it."""
    if params.thinking_token_budget is not None:
        return True
    until = len(params.all_stop_token_ids) if params.min_tokens else 0
    return len(params.logit_bias or ()) + until > MOST_ENTRIES


def metadata_of_spans(
    batch: Any,
    requests: Any,
    spans: Sequence[Span],
    generators: RowGenerators,
    all_requests: bool,
) -> SamplingMetadata:
    """vLLM's sampling metadata as if every row of the spans were a request of its own, whose output
    includes the drafts before the row.

    Args:
        batch, requests: vLLM's input batch, and its states of requests by id.
        all_requests: the spans are those of all requests of the batch, in its order, and what is
            drawn is the answer; otherwise it is for a check, without log-probabilities, and all
            spans are of requests that may have drafts.
    """
    metadata: SamplingMetadata = batch.sampling_metadata
    of_row = [span.request for span in spans for _ in range(span.num_rows)]
    first_rows = [first for first, _ in with_first_rows(spans)] if all_requests else []
    index = torch.tensor(of_row, device=batch.device)

    def rows_of(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[index]

    def by_row(value: dict[int, Any] | None) -> dict[int, Any]:
        return {row: value[each] for row, each in enumerate(of_row) if value and each in value}

    outputs = _outputs_of_rows(batch, requests, spans)
    processors = _processors_of_rows(batch, requests, of_row, outputs, first_rows)
    penalised = _penalised(batch)
    if rows := [row for row, each in enumerate(of_row) if each in penalised]:
        # Where vLLM has them: behind all other processors that can change what is likeliest.
        processors.non_argmax_invariant.append(_PenaltiesOfRows(batch, of_row, outputs, rows))
    holder = metadata.thinking_budget_state_holder
    if holder is not None:
        tracks = all_requests and holder.has_tracked_requests()
        holder = _ThinkingOfFirstRows(holder, metadata, first_rows) if tracks else None
    return replace(
        metadata,
        temperature=rows_of(metadata.temperature),
        top_p=rows_of(metadata.top_p),
        top_k=rows_of(metadata.top_k),
        generators=generators,
        max_num_logprobs=metadata.max_num_logprobs if all_requests else None,
        no_penalties=True,
        prompt_token_ids=None,
        output_token_ids=outputs,
        allowed_token_ids_mask=rows_of(metadata.allowed_token_ids_mask),
        bad_words_token_ids=by_row(metadata.bad_words_token_ids),
        logitsprocs=processors,
        logprob_token_ids=by_row(metadata.logprob_token_ids) if all_requests else None,
        spec_token_ids=None,
        thinking_budget_state_holder=holder,
    )


def _params(batch: Any, requests: Any, row: int) -> Any:
    return requests[batch.req_ids[row]].sampling_params


def _penalised(batch: Any) -> set[int]:
    """Rows of the batch whose requests have a penalty."""
    names = batch.presence_penalties_reqs | batch.frequency_penalties_reqs
    return {batch.req_id_to_index[name] for name in names | batch.repetition_penalties_reqs}


def _outputs_of_rows(batch: Any, requests: Any, spans: Sequence[Span]) -> list[list[int]]:
    """[T], the output of its request that each row stands behind; empty where nobody reads it: a
    copy of a long text for every row would hold up the requests beside it."""
    read = _penalised(batch) | set(batch.sampling_metadata.bad_words_token_ids or ())
    # vLLM's processor counts it, and is made anew.
    read |= {each.request for each in spans if _params(batch, requests, each.request).min_tokens}
    return [
        [*batch.req_output_token_ids[span.request], *span.before, *span.drafts[:place]]
        if span.request in read
        else []
        for span in spans
        for place in range(span.num_rows)
    ]


def _processors_of_rows(
    batch: Any,
    requests: Any,
    of_row: Sequence[int],
    outputs: Sequence[list[int]],
    first_rows: Sequence[int],
) -> LogitsProcessors:
    """The batch's logits processors for rows; others than vLLM's own only where `first_rows` has
    the one row of each request that they apply to."""
    found, old = LogitsProcessors(), batch.logitsprocs
    for new_list, old_list in (
        (found.argmax_invariant, old.argmax_invariant),
        (found.non_argmax_invariant, old.non_argmax_invariant),
    ):
        for processor in old_list:
            if type(processor) not in BUILTIN:
                if first_rows:
                    new_list.append(_OfFirstRows(processor, first_rows))
            elif getattr(processor, BUILTIN[type(processor)]):
                new_list.append(_made_anew(type(processor), batch, requests, of_row, outputs))
    return found


def _made_anew(
    kind: type, batch: Any, requests: Any, of_row: Sequence[int], outputs: Sequence[list[int]]
) -> Any:
    """A processor of vLLM to which each row is a request with the output before it."""
    added = []
    for row, each in enumerate(of_row):
        added.append((row, _params(batch, requests, each), None, outputs[row]))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(added)))
    processor = kind(config, batch.device, False)
    processor.update_state(BatchUpdate(len(added), removed=(), added=added, moved=()))
    return processor


class _PenaltiesOfRows:
    """vLLM's penalties on the rows of requests that have one. On all rows they would cost those
    beside them a count of the vocabulary and a copy of the longest prompt for each row.

    Args:
        batch: vLLM's.
        of_row: [T], each row's request in the batch; outputs: [T], of each row.
        rows: [P], those with a penalty, at least one.
    """

    def __init__(
        self, batch: Any, of_row: Sequence[int], outputs: Sequence[list[int]], rows: Sequence[int]
    ) -> None:
        metadata, requests = batch.sampling_metadata, [of_row[row] for row in rows]
        longest = max(int(batch.num_prompt_tokens[each]) for each in requests)
        self.rows = torch.tensor(rows, device=batch.device)
        self.requests = torch.tensor(requests, device=batch.device)
        self.outputs = [outputs[row] for row in rows]
        # By request.
        self.prompts = metadata.prompt_token_ids[:, :longest]
        self.penalties = (
            metadata.presence_penalties,
            metadata.frequency_penalties,
            metadata.repetition_penalties,
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for first in range(0, len(self.outputs), PENALISED_AT_ONCE):
            part = slice(first, first + PENALISED_AT_ONCE)
            rows, requests = self.rows[part], self.requests[part]
            penalties = [values[requests] for values in self.penalties]
            logits[rows] = apply_all_penalties(
                logits[rows], self.prompts[requests], *penalties, self.outputs[part]
            )
        return logits


class _OfFirstRows:
    """A logits processor on the first row of each request; those that it applies to have no other.

    Args:
        processor: of vLLM's batch.
        first_rows: [R].
    """

    def __init__(self, processor: Any, first_rows: Sequence[int]) -> None:
        self.processor, self.first_rows = processor, first_rows

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor(self.first_rows, device=logits.device)
        logits[rows] = self.processor.apply(logits[rows])
        return logits


class _ThinkingOfFirstRows:
    """vLLM's state of thinking budgets on the first row of each request; those that have a budget
    have no other.

    Args:
        holder, metadata: of vLLM's batch.
        first_rows: [R].
    """

    def __init__(self, holder: Any, metadata: SamplingMetadata, first_rows: Sequence[int]) -> None:
        self.holder, self.metadata, self.first_rows = holder, metadata, first_rows

    def has_tracked_requests(self) -> bool:
        return True

    def update_state(self, *_: Any, **__: Any) -> None:
        self.holder.update_state(self.metadata.output_token_ids, None)

    def apply_to_logits(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        rows = torch.tensor(self.first_rows, device=logits.device)
        logits[rows] = self.holder.apply_to_logits(logits[rows], False, None)
        return logits
