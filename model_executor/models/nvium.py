# SPDX-License-Identifier: Apache-2.0
"""`NviumForCausalLM` for vLLM: vLLM's own model of the dense parent, cut into segments between its
exits. Layers, embedding, unembedding and the loading of weights are the parent's, so what vLLM can
do with that family stays possible; each segment is compiled on its own, and the cascade between
them is `nvium/step.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_nvium.model_executor.layer_slice import make_slice
from vllm_nvium.model_executor.layers.exit_head import Adapter, Exit
from vllm_nvium.model_executor.layers.side_cache import SideCache
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.nvium.step import Step, run_cascade
from vllm_nvium.model_executor.ops.head_rows import (
    MIXTURE,
    NO_TOKEN,
    speakers,
    unpack,
    unpack_on_host,
)
from vllm_nvium.model_executor.ops.mixture import RunningMixture
from vllm_nvium.model_executor.ops.ragged import stretches
from vllm_nvium.model_executor.rows import own_forward_context

# Logits that are computed with at a time where rows need several heads: 16 MiB in float32, and a
# few tensors like that. A dense model's sampler takes several times [T, V]; this adds next to
# nothing to that.
LOGITS_AT_A_TIME = 1 << 22
# Head inputs in one product, unless more have no more logits than that. A product reads the whole
# unembedding, which takes as long as computing with it for some hundred rows: products of a few
# rows would each cost as much. [512, V] in 16 bit is as large as one of the several [256, V] in
# float32 that a dense model's sampler has for 256 sequences.
INPUTS_AT_A_TIME = 512
# Beside the numbers of heads: rows that one head speaks for, whichever it is.
ALONE = -1


class _Segment(nn.Module):
    """Layers [start, stop) of the parent: residual stream in, residual stream out.

    The stream travels as one tensor, `hidden + residual` in vLLM's terms, because that is what an
    exit reads and what waits in the side cache: a position computes the same thing whether it went
    straight on or waited.

    Args:
        parent: vLLM's inner model of the parent's family; it keeps its modules.
    """

    def __init__(
        self, *, vllm_config: VllmConfig, parent: nn.Module, start: int, stop: int
    ) -> None:
        super().__init__()
        # Not by `setattr`, which would make the parent's parameters known under two names.
        self.__dict__["parent"] = parent
        self.start, self.stop = start, stop

    def run_layers(
        self, state: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = state, None
        for layer in self.parent.layers[self.start : self.stop]:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


def _forward_first(
    self: _Segment, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Token ids in: the embedding belongs to the first segment."""
    hidden, residual = self.run_layers(self.parent.embed_input_ids(input_ids), positions)
    return hidden + residual


def _forward(self: _Segment, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden, residual = self.run_layers(state, positions)
    return hidden + residual


def _forward_last(self: _Segment, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Normed states out: the parent's final norm belongs to the last segment."""
    hidden, residual = self.run_layers(state, positions)
    normed, _ = self.parent.norm(hidden, residual)
    return normed


def _make_segment(vllm_config: VllmConfig, parent: nn.Module, start: int, stop: int) -> nn.Module:
    """The layers between two exits, see `layer_slice`."""
    forward: Callable[..., torch.Tensor] = _forward
    if start == 0:
        forward = _forward_first
    elif stop == len(parent.layers):
        forward = _forward_last
    return make_slice(
        f"NviumSegment_{start}_{stop}",
        _Segment,
        forward,
        {"input_ids" if start == 0 else "state": 0, "positions": 0},
        f"nvium_segment_{start}_{stop}",
        vllm_config,
        parent=parent,
        start=start,
        stop=stop,
    )


def unembeddings_of_heads(config: NviumConfig) -> np.ndarray:
    """[N] int64, ascending from 0: heads of the same number share one unembedding."""
    heads = np.arange(config.num_heads_of_mixture)
    if config.exit_head == "own":
        return heads
    has_two = config.exit_head == "embeddings" and not config.tie_word_embeddings
    return (has_two & (heads == heads[-1])).astype(np.int64)


class NviumForCausalLM(nn.Module, SupportsQuant):
    """The vLLM model (arXiv:2605.13190, section 3).

    A model runner passes a `Step` to `forward`; without one (profiling, warm-up) every segment and
    exit runs on the same rows, so that each is compiled at start.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NviumConfig = vllm_config.model_config.hf_config
        self.config = config
        self.vllm_config = vllm_config
        model_config = vllm_config.model_config
        if config.exit_head == "own" and model_config.word_embeddings_untied_by_checkpoint:
            # vLLM has taken an exit's `lm_head.weight` for one of the parent's.
            config.tie_word_embeddings = True
            model_config.word_embeddings_untied_by_checkpoint = False
        # The way in which vLLM's multimodal models make their language model. Names of layers stay
        # those of the parent: lists of layers in quantised checkpoints know no others.
        self.language_model = init_vllm_registered_model(
            vllm_config,
            prefix=prefix,
            hf_config=config.parent,
            architectures=[config.family.architecture],
        )
        bounds = [0, *config.exit_layers, config.num_hidden_layers]
        self.segments = nn.ModuleList(
            _make_segment(vllm_config, self.language_model.model, start, stop)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        )
        self.exits = nn.ModuleList(
            Exit(config, maybe_prefix(prefix, f"exits.{k}")) for k in range(len(config.exit_layers))
        )
        self.final_adapter = (
            Adapter(
                config.hidden_size, config.final_adapter_size, maybe_prefix(prefix, "final_adapter")
            )
            if config.final_adapter_size
            else None
        )
        # vLLM orders caches by the one integer in a layer's name: after the decoder layers.
        self.side_cache = SideCache(
            vllm_config,
            config.hidden_size,
            maybe_prefix(prefix, f"side_cache.{config.num_hidden_layers}"),
        )
        self.num_heads = len(self.segments)
        self.segment_layers = [
            stop - start for start, stop in zip(bounds, bounds[1:], strict=False)
        ]
        self.unembedding_of = unembeddings_of_heads(config)
        # With one unembedding for all heads a row need not say whose it is.
        self.heads_differ = bool(self.unembedding_of.any())
        # [N-1] margins of exits, when they are the same for every token.
        self.constant_margins: np.ndarray | None = None
        self._constants_known = False
        self.may_decide_early = get_tensor_model_parallel_world_size() == 1

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model.embed_input_ids(input_ids)

    def final_head(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed states of the last segment [T, H] -> inputs of the unembedding [T, H]."""
        return normed if self.final_adapter is None else self.final_adapter(normed)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        nvium_step: Step | None = None,
    ) -> torch.Tensor:
        """See `run_cascade`; [T, H] or [T, W]."""
        if nvium_step is not None:
            if not self._constants_known:
                self._find_constants()
            with own_forward_context():
                return run_cascade(self, nvium_step, input_ids, positions)
        state = self.segments[0](input_ids, positions)
        for exit_, segment in zip(self.exits, self.segments[1:], strict=True):
            normed = exit_.norm(state)
            exit_.margins(normed)
            exit_.head_input(normed)
            state = segment(state, positions)
        for segment in self.segments:
            # Once compiled, a segment's guards can only cost time: vLLM drops those of an artefact
            # that it loads from disk, but checks those of one that it has just made.
            if (compiled := getattr(segment, "aot_compiled_fn", None)) is not None:
                compiled.disable_guard_check()
        return self.final_head(state)

    def head_logits(self, head_inputs: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of one head, [T, H] -> [T, V]."""
        if head == len(self.exits) or not self.heads_differ:
            return self.language_model.compute_logits(head_inputs)
        own = self.exits[head].lm_head
        unembedding = self.language_model.model.embed_tokens if own is None else own
        return self.language_model.logits_processor(unembedding, head_inputs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of sampled rows: one head's, or `log p_mix` where the row asks for the mixture.

        Args:
            hidden_states: [T, H], or packed `HeadRows` [T, W].
        """
        if hidden_states.shape[1] == self.config.hidden_size:
            return self.head_logits(hidden_states, len(self.exits))
        return self._wide_logits(hidden_states)

    def _wide_logits(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed `HeadRows` [T, W] -> [T, V] float32."""
        inputs, log_weights, _, _ = unpack(packed, self.num_heads, self.config.hidden_size)
        weights, single, token = unpack_on_host(packed, self.num_heads)
        rows, heads, alone = speakers(weights, single, token)
        parts = np.where(alone, ALONE, heads)
        order = np.lexsort((parts, self.unembedding_of[heads]))
        rows, heads, parts = rows[order], heads[order], parts[order]
        mixture = RunningMixture(log_weights, self.config.vocab_size)
        at = torch.from_numpy(rows).to(packed.device)
        for pairs, logits in self.logits_in_parts(inputs, rows, heads, parts):
            if parts[pairs.start] == ALONE:
                mixture.put(at[pairs], logits)
            else:
                mixture.add(int(heads[pairs.start]), at[pairs], logits)
        result = mixture.logits()
        # Rows that nothing is read from, and those whose token is decided.
        decided = token != NO_TOKEN
        silent = ~decided & (single == MIXTURE) & (weights == -torch.inf).all(dim=1)
        result[silent.nonzero().squeeze(1).to(result.device)] = 0.0
        known = decided.nonzero().squeeze(1)
        result[known.to(result.device), token[known].long().to(result.device)] = 0.0
        return result

    def logits_in_parts(
        self, inputs: torch.Tensor, rows: np.ndarray, heads: np.ndarray, parts: np.ndarray
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of pairs of a row and a head, by as few products as memory allows: one for all
        heads that share an unembedding, unless there are very many pairs.

        Args:
            inputs: [T, N, H] of all heads.
            rows, heads: [P] int64; heads that share an unembedding are beside each other.
            parts: [P] int64, what belongs together; equal ones are beside each other.

        Yields:
            Pairs of one part and their logits [n, V], at most `LOGITS_AT_A_TIME` where that is a
            row or more. Where another rank samples there is nothing.
        """
        at_a_time = max(1, LOGITS_AT_A_TIME // self.config.vocab_size)
        index = torch.from_numpy(np.stack((rows, heads))).to(inputs.device)  # [2, P]
        for product in stretches(self.unembedding_of[heads], max(at_a_time, INPUTS_AT_A_TIME)):
            row, head = index[:, product]
            logits = self.head_logits(inputs[row, head], int(heads[product.start]))
            if logits is None:
                continue
            for piece in stretches(parts[product], at_a_time):
                start = product.start + piece.start
                yield slice(start, start + piece.stop - piece.start), logits[piece]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the checkpoint layout that `nvium_reference.py` saves."""
        loader = AutoWeightsLoader(self)
        loaded = loader.load_weights(self._note_identities(weights), mapper=self._weights_mapper())
        # vLLM may finish loading a layer later than here, so they are looked at when first needed.
        self._constants_known = False
        return loaded

    def weights_changed(self) -> None:
        """Weights may have been written in place, without `load_weights`: what was noticed in the
        old ones no longer holds. An adapter that adds zeros is computed from now on."""
        self._constants_known = False
        for exit_ in self.exits:
            if exit_.adapter is not None:
                exit_.adapter.is_identity = False
        if self.final_adapter is not None:
            self.final_adapter.is_identity = False

    def _find_constants(self) -> None:
        """Notices routers whose result is the same for every token and need not be computed."""
        margins: list[float | None] = []
        for exit_ in self.exits:
            head, constant = exit_.router.head, None
            if not bool(head.weight.any()):
                bias = head.bias.float()
                constant = float(bias[1] - bias[0])
            exit_.router.constant_margin = constant
            margins.append(constant)
        self.constant_margins = None if None in margins else np.array(margins)
        self._constants_known = True

    def _weights_mapper(self) -> WeightsMapper:
        """The parent's names, behind which its own class does the rest."""
        own = hasattr(self.language_model, "lm_head") and not self.config.tie_word_embeddings
        lm_head = "language_model.lm_head." if own else None
        return WeightsMapper(
            orig_to_new_prefix={"model.": "language_model.model.", "lm_head.": lm_head}
        )

    def _note_identities(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Passes weights on, noticing adapters that add zeros. After loading it may be too late:
        vLLM's CPU build frees the weights of linear layers that it has packed."""
        for name, weight in weights:
            if match := re.fullmatch(r"exits\.(\d+)\.adapter\.fc2\.weight", name):
                self.exits[int(match[1])].adapter.is_identity = not bool(weight.any())
            elif name == "final_adapter.fc2.weight" and self.final_adapter is not None:
                self.final_adapter.is_identity = not bool(weight.any())
            yield name, weight
