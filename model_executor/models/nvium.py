# SPDX-License-Identifier: Apache-2.0
"""`NviumForCausalLM` for vLLM: vLLM's own model of the dense parent, cut into segments between its
exits. Layers, embedding, unembedding and the loading of weights are the parent's, so what vLLM can
do with that family stays possible; each segment is compiled on its own, and the cascade between
them is `nvium/step.py`.
"""

import re
from collections.abc import Callable, Iterable

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
from vllm_nvium.model_executor.ops.head_rows import MIXTURE, NO_TOKEN, unpack
from vllm_nvium.model_executor.ops.mixture import RunningMixture
from vllm_nvium.model_executor.rows import own_forward_context

# Logits of one head that are in memory at a time where rows need several: 16 MiB. A dense model's
# sampler takes several times [T, V]; this adds next to nothing to that.
LOGITS_AT_A_TIME = 1 << 22


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
        # With one unembedding for all heads a row need not say whose it is.
        self.heads_differ = config.exit_head == "own" or (
            config.exit_head == "embeddings" and not config.tie_word_embeddings
        )
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
        result = torch.empty(
            len(hidden_states),
            self.config.vocab_size,
            device=hidden_states.device,
            dtype=torch.float32,
        )
        step = max(1, LOGITS_AT_A_TIME // self.config.vocab_size)
        for start in range(0, len(hidden_states), step):
            rows = slice(start, start + step)
            result[rows] = self._wide_logits(hidden_states[rows])
        return result

    def _wide_logits(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed `HeadRows` [T, W] -> [T, V] float32."""
        heads, log_weights, single, token = unpack(packed, self.num_heads, self.config.hidden_size)
        # A row that one head speaks for is a mixture in which that head has all the weight.
        alone = single != MIXTURE
        own = torch.full_like(log_weights, -torch.inf)
        own[alone, single[alone].long()] = 0.0
        mixture = RunningMixture(
            torch.where(alone[:, None], own, log_weights), self.config.vocab_size
        )
        for head in range(self.num_heads):
            rows = mixture.rows_of(head)
            if len(rows) == 0:
                continue
            logits = self.head_logits(heads[rows, head].contiguous(), head)
            if logits is not None:  # None where another rank samples
                mixture.add(head, rows, logits)
        result = mixture.logits()
        # Rows that nothing is read from; a decided one follows.
        result[~alone & (log_weights == -torch.inf).all(dim=1)] = 0.0
        decided = (token != NO_TOKEN).nonzero().squeeze(1)
        if len(decided):
            result[decided] = -torch.inf
            result[decided, token[decided].long()] = 0.0
        return result

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
