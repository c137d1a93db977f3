# SPDX-License-Identifier: Apache-2.0
"""N-vium in plain PyTorch: every token runs every layer and every head. It is the oracle that the
vLLM model is tested against and the model that training runs; it saves no time by exiting early.

The law is that of arXiv:2605.13190, section 3; `ops/mixture.py` holds the formulas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import ModelOutput

from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
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


class NviumAttention(nn.Module):
    """Causal attention of the Llama family, with Qwen2's biases or Qwen3's head norms if asked."""

    def __init__(self, config: NviumConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        batch, length = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_pos_emb(
            query.transpose(1, 2), key.transpose(1, 2), *position_embeddings
        )  # [B, heads, T, head_dim]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.reshape(batch, length, -1))


class NviumDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer."""

    def __init__(self, config: NviumConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = NviumAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        assert position_embeddings is not None
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            position_embeddings,
            past_key_values,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


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
    """What the backbone and the language model share: initialisation and transformers' switches."""

    config: NviumConfig
    config_class = NviumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NviumDecoderLayer", "NviumExit"]
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


class NviumModel(NviumPreTrainedModel):
    """The transformer without heads; it hands out the residual stream at every exit."""

    def __init__(self, config: NviumConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            NviumDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run every layer.

        Args:
            input_ids: `[B, T]` int64, or `inputs_embeds` `[B, T, H]`: exactly one of them.
            attention_mask: `[B, cached + T]`, 1 for tokens and 0 for padding on either side, or a
                4-D mask as transformers understands it.
            position_ids: `[B, T]`; by default counted along the mask, so padding has no position.
            past_key_values: a cache to read and extend in place.

        Returns:
            The residual stream `h_k` `[B, T, H]` at each exit; `model.norm` of the last layer's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        hidden_states: torch.Tensor = (
            self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )
        length = hidden_states.shape[1]
        if position_ids is None:
            position_ids = _positions(hidden_states, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Positions count along the mask and may stand still over padding, which the mask
            # builder would take for packed sequences. Padding is the mask's own affair.
            position_ids=None,
        )
        assert position_ids.shape[-1] == length
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        residuals: list[torch.Tensor] = []
        exits = set(self.config.exit_layers)
        for layers_run, layer in enumerate(self.layers, start=1):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
            )
            if layers_run in exits:
                residuals.append(hidden_states)
        return residuals, self.norm(hidden_states)


class NviumForCausalLM(NviumPreTrainedModel, GenerationMixin):
    """N-vium as a transformers causal language model: `generate()` samples from the mixture.

    `generate()` applies temperature, top-k and the rest to `log p_mix`, never to a single head.
    """

    # transformers reads it only when `tie_word_embeddings` is true.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NviumConfig) -> None:
        super().__init__(config)
        self.model = NviumModel(config)
        self.exits = nn.ModuleList(NviumExit(config) for _ in config.exit_layers)
        self.final_adapter = (
            NviumAdapter(config.hidden_size, config.final_adapter_size)
            if config.final_adapter_size
            else None
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def unembed(self, head_hidden: torch.Tensor) -> torch.Tensor:
        """Every head's logits.

        Args:
            head_hidden: `[..., N, H]`, `u_k`; a pass over fewer positions than a batch has keeps
                the `[..., N, V]` result small.

        Returns:
            `[..., N, V]` in the model's dtype.
        """
        kind = self.config.exit_head
        if kind == "final":
            return self.lm_head(head_hidden)
        early, final = head_hidden[..., :-1, :], head_hidden[..., -1:, :]
        if kind == "embeddings":
            early_logits = F.linear(early, self.model.embed_tokens.weight)
        else:
            early_logits = torch.stack(
                [exit.lm_head(early[..., k, :]) for k, exit in enumerate(self.exits)], dim=-2
            )
        return torch.cat([early_logits, self.lm_head(final)], dim=-2)

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
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: see
                `NviumModel.forward`.
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
        residuals, final_normed = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
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
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor:
    """`[B or 1, T]` positions of the new tokens, not counting padding."""
    length = hidden_states.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=-1) - 1
        return counted.clamp(min=0)[:, -length:]
    seen = int(cache.get_seq_length()) if cache is not None else 0
    return torch.arange(seen, seen + length, device=hidden_states.device).unsqueeze(0)


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
