# SPDX-License-Identifier: Apache-2.0
"""N-vium in plain PyTorch: transformers' model of the dense parent, every layer and every head for
every token. It is the oracle that the vLLM model is tested against and the model that training
runs; it saves no time by exiting early.

The law is that of arXiv:2605.13190, section 3; `ops/mixture.py` holds the formulas.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import ModelOutput

from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.parent import capped, logits_cap
from vllm_nvium.model_executor.ops.mixture import exit_log_weights, mixture_log_probs


@dataclass
class NviumOutput(ModelOutput):
    """What one forward pass returns.

    B sequences, N heads, V vocabulary, H hidden size, and T positions: those of the input, or
    fewer with `logits_to_keep`.

    Attributes:
        loss: scalar, mean of `-log p_mix(next token)`, when `labels` were given.
        logits: `[B, T, V]` float32, `log p_mix`: already normalised, so `softmax` leaves it alone.
        exit_log_weights: `[B, T, N]` float32, `log pi`.
        margins: `[B, T, N-1]` float32, `e_k - c_k`, the log-odds of leaving at exit k.
        head_hidden: `[B, T, N, H]`, `u_k`, what the unembedding of head k is applied to.
        head_logits: `[B, T, N, V]`, every head's own logits, when `output_head_logits=True`.
        past_key_values: the KV cache, when `use_cache`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_log_weights: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    head_hidden: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    past_key_values: Cache | None = None


class NviumZeroLinear(nn.Linear):
    """A bias-free linear layer that a fresh model starts at zero."""


class NviumAdapter(nn.Module):
    """Residual adapter `u = n + A_2 SiLU(A_1 n)`, no biases; the identity while `A_2` is zero."""

    def __init__(self, hidden_size: int, adapter_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, adapter_size, bias=False)
        self.fc2 = NviumZeroLinear(adapter_size, hidden_size, bias=False)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        return normed + self.fc2(F.silu(self.fc1(normed)))


class NviumRouterBlock(nn.Module):
    """One block of a router's body, `fc2 GELU(fc1 x)` with biases and the exact (erf) GELU."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class NviumRouter(nn.Module):
    """Reads an exit's normed state, answers with the log-odds of leaving there."""

    def __init__(self, config: NviumConfig) -> None:
        super().__init__()
        assert config.router_hidden_size is not None
        assert config.router_intermediate_size is not None
        inner, width = config.router_intermediate_size, config.router_hidden_size
        self.blocks = nn.ModuleList(
            NviumRouterBlock(config.hidden_size if j == 0 else width, inner, width)
            for j in range(config.router_num_blocks)
        )
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.head = nn.Linear(width, 2)  # row 0: continue, row 1: exit

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> margins `e - c`, `[...]`, at least float32."""
        for block in self.blocks:
            normed = block(normed)
        logits = self.head(self.norm(normed))  # [..., 2]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits[..., 1] - logits[..., 0]


class NviumExit(nn.Module):
    """What stands at one early exit: norm, adapter, router, and perhaps its own unembedding."""

    def __init__(self, config: NviumConfig) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.adapter = (
            NviumAdapter(config.hidden_size, config.exit_adapter_size)
            if config.exit_adapter_size
            else None
        )
        self.router = NviumRouter(config)
        if config.exit_head == "own":
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`h_k` `[..., H]` -> `u_k` `[..., H]` and the margin `[...]`."""
        normed = self.norm(residual)
        hidden = normed if self.adapter is None else self.adapter(normed)
        return hidden, self.router(normed)


class NviumPreTrainedModel(PreTrainedModel):
    """Initialisation and transformers' switches."""

    config: NviumConfig
    config_class = NviumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NviumExit"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A class of its own and not a case for NviumAdapter: for models defined outside
        # transformers, modules without parameters of their own are never handed to this function.
        if isinstance(module, NviumZeroLinear):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)


class NviumForCausalLM(NviumPreTrainedModel, GenerationMixin):
    """N-vium as a transformers causal language model: `generate()` samples from the mixture.

    `generate()` applies temperature, top-k and the rest to `log p_mix`, never to a single head.
    """

    # transformers reads it only when `tie_word_embeddings` is true.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NviumConfig) -> None:
        super().__init__(config)
        parent = config.parent
        if getattr(parent, "attn_logit_softcapping", None) is not None:
            parent._attn_implementation = "eager"  # the only one that caps attention's logits
        self.model = MODEL_MAPPING[type(parent)](parent)
        self.exits = nn.ModuleList(NviumExit(config) for _ in config.exit_layers)
        self.final_adapter = (
            NviumAdapter(config.hidden_size, config.final_adapter_size)
            if config.final_adapter_size
            else None
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def residuals(self, **inputs: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run every layer.

        Args:
            inputs: of the parent's model; see `forward`.

        Returns:
            The residual stream `h_k` `[B, T, H]` at each exit; `model.norm` of the last layer's.
        """
        output = self.model(
            output_hidden_states=[layers - 1 for layers in self.config.exit_layers], **inputs
        )
        return [h for h in output.hidden_states if h is not None], output.last_hidden_state

    def unembed(self, head_hidden: torch.Tensor) -> torch.Tensor:
        """Every head's logits.

        Args:
            head_hidden: `[..., N, H]`, `u_k`; a pass over fewer positions than a batch has keeps
                the `[..., N, V]` result small.

        Returns:
            `[..., N, V]` in the model's dtype.
        """
        kind = self.config.exit_head
        early, final = head_hidden[..., :-1, :], head_hidden[..., -1:, :]
        if kind == "final":
            logits = self.lm_head(head_hidden)
        elif kind == "embeddings":
            early_logits = F.linear(early, self.model.embed_tokens.weight)
            logits = torch.cat([early_logits, self.lm_head(final)], dim=-2)
        else:
            own = [exit.lm_head(early[..., k, :]) for k, exit in enumerate(self.exits)]
            logits = torch.cat([torch.stack(own, dim=-2), self.lm_head(final)], dim=-2)
        return capped(logits, logits_cap(self.config))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_head_logits: bool = False,
        compute_logits: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> NviumOutput:
        """One pass of all layers, all exits and all heads over `[B, T]` tokens.

        Args:
            input_ids: `[B, T]` int64, or `inputs_embeds` `[B, T, H]`: exactly one of them.
            attention_mask: `[B, cached + T]`, 1 for tokens and 0 for padding on either side, or a
                mask as the parent's model understands it.
            position_ids: `[B, T]`; by default counted along the mask, so padding has no position.
            past_key_values: a cache to read and extend in place.
            labels: `[B, T]` int64, aligned with the input (shifted here), -100 where not to be
                learnt.
            use_cache: return a cache (default: the configuration's value, and never in training).
            logits_to_keep: evaluate exits and heads at the last so many positions only, or at the
                positions of an index tensor; 0 for all.
            output_head_logits: also return `[B, T, N, V]`.
            compute_logits: `False` stops after `head_hidden` and leaves `logits` empty: training
                then calls `unembed` on a few positions at a time.
            num_items_in_batch: divide the summed loss by this instead of the number of labels
                (transformers' Trainer passes it under gradient accumulation).
            kwargs: ignored; `generate()` passes switches that concern other models.

        Raises:
            ValueError: `labels` together with `logits_to_keep` or `compute_logits=False`.
        """
        if labels is not None and (not compute_logits or not isinstance(logits_to_keep, int)):
            raise ValueError("labels need the logits of every position.")
        if labels is not None and logits_to_keep != 0:
            raise ValueError(
                f"logits_to_keep is {logits_to_keep}, and labels need the logits of every "
                "position, so it must be 0."
            )
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if self.model.gradient_checkpointing and self.training:
            use_cache = False  # a recomputed layer would write its keys twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None and attention_mask is not None:
            position_ids = _positions(attention_mask, input_ids, inputs_embeds)
        residuals, final_normed = self.residuals(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        pairs = [
            exit(residual[:, kept]) for exit, residual in zip(self.exits, residuals, strict=True)
        ]
        final_hidden = final_normed[:, kept]
        if self.final_adapter is not None:
            final_hidden = self.final_adapter(final_hidden)
        head_hidden = torch.stack([u for u, _ in pairs] + [final_hidden], dim=-2)  # [B, T, N, H]
        margins = torch.stack([margin for _, margin in pairs], dim=-1)  # [B, T, N-1]
        log_weights = exit_log_weights(margins)  # [B, T, N]
        head_logits = self.unembed(head_hidden) if compute_logits else None  # [B, T, N, V]
        logits = None if head_logits is None else mixture_log_probs(head_logits, log_weights)
        loss = None
        if labels is not None and logits is not None:
            loss = mixture_loss(logits, labels, num_items_in_batch)
        return NviumOutput(
            loss=loss,
            logits=logits,
            exit_log_weights=log_weights,
            margins=margins,
            head_hidden=head_hidden,
            head_logits=head_logits if output_head_logits else None,
            past_key_values=past_key_values if use_cache else None,
        )


def mixture_loss(
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`L_mix = -mean log p_mix(next token)`.

    Args:
        log_probs: `[B, T, V]`, `log p_mix` at every position.
        labels: `[B, T]` int64 aligned with the input: position t is scored on `labels[:, t + 1]`;
            -100 is not scored.
        num_items_in_batch: divisor of the sum; the number of scored labels when `None`.
    """
    targets = labels[:, 1:].reshape(-1).to(log_probs.device)
    flat = log_probs[:, :-1].reshape(-1, log_probs.shape[-1])
    if num_items_in_batch is None:
        return F.nll_loss(flat, targets, ignore_index=-100)
    return F.nll_loss(flat, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def _positions(
    attention_mask: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor | None:
    """`[B, T]` positions of the new tokens, not counting padding; None for the parent's own."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    counted = attention_mask.long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, -given.shape[1] :]


def register_with_transformers() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know N-vium; harmless when repeated."""
    AutoConfig.register(NviumConfig.model_type, NviumConfig, exist_ok=True)
    AutoModelForCausalLM.register(NviumConfig, NviumForCausalLM, exist_ok=True)


def load_reference(checkpoint: str | Path, **options: Any) -> NviumForCausalLM:
    """The reference model of an N-vium checkpoint: plain transformers, without vLLM.

    Args:
        checkpoint: folder or hub id.
        options: of `from_pretrained`, such as `dtype=torch.float32`.
    """
    return NviumForCausalLM.from_pretrained(checkpoint, **options)
