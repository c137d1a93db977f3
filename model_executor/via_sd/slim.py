# SPDX-License-Identifier: Apache-2.0
"""The slim verifier: the target with some of its layers skipped (arXiv:2606.12243, section 3), or
with copies of its weights at low precision, or both. It writes the target's own KV cache, and a
later pass of the full model over the same positions makes good what it left open.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context

from vllm_nvium.model_executor.layer_slice import make_slice
from vllm_nvium.model_executor.layers.low_precision_linear import bounded
from vllm_nvium.model_executor.rows import Rows, common_attention_metadata


class SlimPass(Protocol):
    """A cheaper pass over some rows that gives states for the unembedding; the window and the model
    runner know nothing else of the tier.

    Attributes:
        attention_groups: per KV cache group vLLM's attention groups, whose metadata builders
            describe the rows; set once there is a KV cache.
    """

    attention_groups: Sequence[Sequence[Any]]

    def __call__(self, token_ids: torch.Tensor, groups: Sequence[Rows]) -> torch.Tensor:
        """Runs the rows and writes their K/V.

        Args:
            token_ids: [T] int64 on the model's device.
            groups: the same rows for every KV cache group, each with its own blocks and slots.

        Returns:
            [T, H], what the unembedding is applied to.
        """
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, V], the slim verifier's logits for states [T, H] of a pass."""
        ...

    def warm_up(self, num_tokens: int, device: torch.device) -> None:
        """A pass without requests, so that it is compiled at start and counts in the memory
        profile."""
        ...


class SlimVerifier:
    """The target without the layers in `skipped` and with copies of some modules in their places,
    as a `SlimPass`.

    Args:
        model: the target, as vLLM loaded it.
        skipped: indices of layers; see `mask.skipped_layers`.
        copies: module of the target -> what the slim verifier has instead; see `slim_quantised`.
        kind: names what they are, for compiled artefacts.
        before_pass: called before each.
    """

    attention_groups: Sequence[Sequence[Any]] = ()

    def __init__(
        self,
        model: nn.Module,
        skipped: Sequence[int],
        vllm_config: VllmConfig,
        copies: Mapping[nn.Module, nn.Module] | None = None,
        kind: str = "skip",
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.vllm_config, self.kind, self._before_pass = vllm_config, kind, before_pass
        self.skipped = tuple(skipped)
        inner, copies = model.model, copies or {}
        kept = [
            with_copies(layer, copies)
            for i, layer in enumerate(inner.layers)
            if i not in self.skipped
        ]
        if vllm_config.model_config.dtype == torch.float16:
            kept = [FiniteInputs(layer) for layer in kept]
        class_name = f"Slim{type(inner).__name__}_{kind}_{'_'.join(map(str, self.skipped))}"
        self.layers = of_layers(inner, kept, class_name, vllm_config)
        self._head = with_copies(model, copies, below=("lm_head", "model", "embed_tokens"))
        # Only these layers' caches are written and need metadata.
        self.layer_names = {
            name
            for layer in kept
            for module in layer.modules()
            if (name := getattr(module, "layer_name", None))
        }

    def __call__(self, token_ids: torch.Tensor, groups: Sequence[Rows]) -> torch.Tensor:
        self._before_pass()
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for attention, rows in zip(self.attention_groups, groups, strict=True):
            common = common_attention_metadata(rows)
            for group in attention:
                names = [name for name in group.layer_names if name in self.layer_names]
                if names:
                    metadata.update(dict.fromkeys(names, group.build_metadata(common)))
                    slots.update(dict.fromkeys(names, rows.slots_device))
        positions = groups[0].positions
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=slots,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
        ):
            return self.layers(token_ids, positions, None, None)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head.compute_logits(hidden)
        return logits

    def warm_up(self, num_tokens: int, device: torch.device) -> None:
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
            self.layers(token_ids, token_ids.clone(), None, None)


class FiniteInputs(nn.Module):
    """A decoder layer whose inputs are finite numbers, so that its K/V are.

    Layers left out or rounded may overflow float16 where the target does not. K/V of tokens that
    do not stay, or of a request that is aborted, lie in their blocks until somebody writes there,
    and attention multiplies what it does not look at by 0, which a NaN survives: it would end up in
    the text of whoever gets the block.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        hidden_states = bounded(hidden_states, hidden_states.dtype)
        if residual is not None:
            residual = bounded(residual, residual.dtype)
        return self.layer(positions, hidden_states, residual, **kwargs)


def with_copies(
    module: nn.Module, copies: Mapping[nn.Module, nn.Module], below: Sequence[str] | None = None
) -> nn.Module:
    """The module with copies in the places of some of its parts. All else is shared, attention
    modules and so the KV cache among it; with nothing to replace, it is the module itself.

    Args:
        below: names of parts that are looked into; all of them by default.
    """
    if module in copies:
        return copies[module]
    parts = {
        name: with_copies(part, copies, below)
        if part is not None and (below is None or name in below)
        else part
        for name, part in vars(module)["_modules"].items()
    }
    if all(parts[name] is part for name, part in vars(module)["_modules"].items()):
        return module
    found = copy.copy(module)
    found.__dict__["_modules"] = parts
    return found


def of_layers(
    inner: nn.Module, layers: Sequence[nn.Module], name: str, vllm_config: VllmConfig
) -> nn.Module:
    """A model of the class of `inner` that shares all of its modules and runs these layers."""
    base = type(inner)

    def share(self: nn.Module, **_: Any) -> None:
        # Everything is shared but the list of layers; nn.Module's own __init__ would empty it all.
        self.__dict__.update(vars(inner))
        self.__dict__.pop("aot_compiled_fn", None)
        self.__dict__["_modules"] = {**vars(inner)["_modules"], "layers": nn.ModuleList(layers)}
        self.start_layer, self.end_layer = 0, len(layers)
        # What EAGLE-3 has the target hand out is read by its drafter after the full pass only.
        self.aux_hidden_state_layers = ()

    return make_slice(
        name,
        base,
        base.forward,
        # `positions` is [T], or [3, T] with multimodal rotary embeddings.
        {"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0},
        "via_sd_slim",
        vllm_config,
        init=share,
    )
