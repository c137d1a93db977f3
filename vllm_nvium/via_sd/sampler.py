# SPDX-License-Identifier: Apache-2.0
"""What is drawn behind drafts, by vLLM's own sampler with the noise that plain decoding would draw
with: a draft stays iff it is the token that the full model draws in its place. The slim verifier
draws in the same way, so that both mostly agree (see `ops/tiers.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler

from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window

# vLLM's own logits processors -> the attribute that tells whether a request of the batch asks for
# it. Each is made anew for the rows behind drafts; of another one nothing is known.
BUILTIN = {
    MinTokensLogitsProcessor: "min_toks",
    LogitBiasLogitsProcessor: "biases",
    MinPLogitsProcessor: "min_p_count",
}


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


# --- the full model -------------------------------------------------------------------------------


def sample_spans(
    sampler: Sampler,
    logits: torch.Tensor,
    batch: Any,
    requests: Any,
    spans: Sequence[Span],
    kept: Sequence[bool],
) -> SamplerOutput:
    """Samples behind drafts: each request gets the drafts that are equal to what the full model
    draws, then its draw at the first that is not, or behind the last. Generators are left where
    plain decoding would leave them after these tokens.

    Args:
        logits: [T, V], rows of all spans; may be changed.
        batch, requests: vLLM's input batch, and its states of requests by id.
        spans: one for each request of the batch, in its order.
        kept: for each draft of all spans whether the paper's rule keeps it without asking.

    Returns:
        as of vLLM's rejection sampler: tokens [B, D + 1], padded, and log-probabilities [B * (D +
        1), ...], of which only those of tokens count.
    """
    generators = RowGenerators(spans)
    metadata = metadata_of_spans(batch, requests, spans, generators, all_requests=True)
    if any(kept):
        metadata.logitsprocs.non_argmax_invariant.append(_KeptUnasked(spans, kept, logits.device))
    output = sampler(logits, metadata)
    drawn = output.sampled_token_ids.flatten().tolist()
    most = max(len(span.drafts) for span in spans)
    tokens = torch.full((len(spans), most + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    for number, (first, span) in enumerate(with_first_rows(spans)):
        accepted = 0
        while accepted < len(span.drafts) and drawn[first + accepted] == span.drafts[accepted]:
            accepted += 1
        new = drawn[first : first + accepted + 1]
        tokens[number, : len(new)] = torch.tensor(new, dtype=torch.int32)
        if accepted < len(span.drafts):
            generators.rewind(first + accepted + 1)
    return SamplerOutput(
        sampled_token_ids=tokens.to(logits.device),
        logprobs_tensors=_padded(output.logprobs_tensors, spans, most),
    )


def _padded(
    found: LogprobsTensors | None, spans: Sequence[Span], most: int
) -> LogprobsTensors | None:
    """Log-probabilities of all rows, [T, ...], as [B * (most + 1), ...]."""
    if found is None:
        return None
    index = [
        first + min(place, len(span.drafts))
        for first, span in with_first_rows(spans)
        for place in range(most + 1)
    ]
    rows = torch.tensor(index, device=found.logprobs.device)
    return LogprobsTensors(
        found.logprob_token_ids[rows], found.logprobs[rows], found.selected_token_ranks[rows]
    )


# --- the slim verifier ----------------------------------------------------------------------------


def draw_slim(
    sampler: Sampler,
    logits: torch.Tensor,
    batch: Any,
    requests: Any,
    windows: Sequence[Window],
    drafts: Drafts,
) -> SlimDraws:
    """What the slim verifier draws behind each row of its pass, under all that the requests ask of
    the sampler. Generators stay where they are: the full model draws with the same noise.

    Args:
        logits: [T, V], rows [last token, drafts] of each window in turn; may be changed.
        batch, requests: vLLM's input batch, and its states of requests by id.
        windows: their `noise` is extended.
    """
    spans = [
        Span(
            window.request,
            tokens,
            window.tokens,
            # Under the paper's rule it draws with noise of its own, see `tiers.paper_law`.
            None if window.is_paper else batch.generators.get(window.request),
        )
        for window, tokens in zip(windows, drafts.tokens, strict=True)
    ]
    for window, span in zip(windows, spans, strict=True):
        if span.generator is not None:
            now = span.generator.get_state()
            window.noise.setdefault(0, now)
            span.generator.set_state(window.noise[len(window.tokens)])
    generators = RowGenerators(spans)
    metadata = metadata_of_spans(batch, requests, spans, generators, all_requests=False)
    logits = sampler.apply_logits_processors(logits.to(torch.float32), metadata, False)
    shares = None
    if any(window.is_paper for window in windows):
        shares = _shares(sampler, logits.clone(), metadata, spans)
    tokens, _ = sampler.sample(logits, metadata)
    for window, (first, span) in zip(windows, with_first_rows(spans), strict=True):
        if span.generator is not None:
            place = len(window.tokens)
            for row in range(span.num_rows):
                if first + row in generators.states:
                    window.noise[place + row] = generators.states[first + row]
            window.noise[place + span.num_rows] = span.generator.get_state()
            span.generator.set_state(window.noise[0])
    return SlimDraws(tokens.long().cpu(), shares)


def _shares(
    sampler: Sampler, logits: torch.Tensor, metadata: SamplingMetadata, spans: Sequence[Span]
) -> torch.Tensor:
    """[T] float32: `q'(v) / max q'` of the draft behind each row, `q'` being the law that is drawn
    from; at temperature 0 the law at temperature 1."""
    if metadata.temperature is not None:
        logits = sampler.apply_temperature(logits, metadata.temperature, metadata.all_random)
    for processor in metadata.logitsprocs.argmax_invariant:
        logits = processor.apply(logits)
    logits = apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
    behind = [token for span in spans for token in (*span.drafts, -1)]
    following = torch.tensor(behind, device=logits.device)
    chosen = logits.gather(1, following.clamp(min=0)[:, None]).squeeze(1)
    shares = (chosen - logits.amax(dim=1)).exp()
    return torch.where(following < 0, 0.0, shares).cpu()


# --- vLLM's metadata ------------------------------------------------------------------------------


def draws_one_at_a_time(batch: Any, params: Sequence[Any]) -> list[bool]:
    """[R], requests of the batch that are to have no drafts: what they ask of the sampler is known
    for the next token only.

    Args:
        params: vLLM's sampling parameters of each.
    """
    one_by_one = [each is not None and each.thinking_token_budget is not None for each in params]
    for processor in batch.logitsprocs.all:
        if type(processor) in BUILTIN:
            continue
        if isinstance(processor, AdapterLogitsProcessor):
            # It says to which requests it applies.
            one_by_one = [one or row in processor.req_info for row, one in enumerate(one_by_one)]
        else:
            one_by_one = [True] * len(one_by_one)
    return one_by_one


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

    outputs = _outputs_of_rows(batch, spans)
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
        prompt_token_ids=rows_of(metadata.prompt_token_ids),
        frequency_penalties=rows_of(metadata.frequency_penalties),
        presence_penalties=rows_of(metadata.presence_penalties),
        repetition_penalties=rows_of(metadata.repetition_penalties),
        output_token_ids=outputs,
        allowed_token_ids_mask=rows_of(metadata.allowed_token_ids_mask),
        bad_words_token_ids=by_row(metadata.bad_words_token_ids),
        logitsprocs=_processors_of_rows(batch, requests, of_row, outputs, first_rows),
        logprob_token_ids=by_row(metadata.logprob_token_ids) if all_requests else None,
        spec_token_ids=None,
        thinking_budget_state_holder=holder,
    )


def _outputs_of_rows(batch: Any, spans: Sequence[Span]) -> list[list[int]]:
    """[T], the output of its request that each row stands behind; empty where nobody reads it."""
    is_read = batch.sampling_metadata.output_token_ids or any(
        isinstance(each, MinTokensLogitsProcessor) and each.min_toks
        for each in batch.logitsprocs.all
    )
    if not is_read:
        return []
    return [
        [*batch.req_output_token_ids[span.request], *span.before, *span.drafts[:place]]
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
        params = requests[batch.req_ids[each]].sampling_params
        added.append((row, params, None, outputs[row] if outputs else []))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(added)))
    processor = kind(config, batch.device, False)
    processor.update_state(BatchUpdate(len(added), removed=(), added=added, moved=()))
    return processor


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


class _KeptUnasked:
    """A logits processor that puts all weight on drafts which the paper's rule keeps.

    Log-probabilities are the full model's all the same: vLLM takes them before (`raw_logprobs`, its
    default).

    Args:
        spans: of all requests; kept: for each of their drafts.
    """

    def __init__(
        self, spans: Sequence[Span], kept: Sequence[bool], device: torch.device | str
    ) -> None:
        places = [
            (first + place, token)
            for first, span in with_first_rows(spans)
            for place, token in enumerate(span.drafts)
        ]
        chosen = [place for place, keep in zip(places, kept, strict=True) if keep]
        self.rows, self.tokens = torch.tensor(chosen, device=device).T

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        # What a request forbids stays forbidden.
        allowed = logits[self.rows, self.tokens] > -torch.inf
        rows, tokens = self.rows[allowed], self.tokens[allowed]
        logits[rows] = -torch.inf
        logits[rows, tokens] = 0.0
        return logits
