# SPDX-License-Identifier: Apache-2.0
"""The side cache: residual states and depth marks of positions that left the model early.

A position's state stays here until a catch-up pass takes it further; the mark says how many
segments it has been through (`nvium/completion.py` reads and writes both). Both belong to a slot
of the KV cache:
`block_table[request, position // block_size] * block_size + position % block_size`.

States are on the device. To vLLM they are one more attention layer, whose KV cache spec has the
block size of all the others. All are full attention, so vLLM puts them into one KV cache group: one
block table, one slot mapping, one prefix cache, and a page that is part of the KV memory budget.
Where one state per slot takes no more than `SideCache.SHARE` of what the other layers take, state
and slot have the same number. Otherwise the layer's memory is cut to that share and its rows are
given to whichever slots wait (`state_pool.py`); a step that finds none left goes on to full depth.

Marks, and that map, are on the host: one byte per slot, and eight more where there is a map. vLLM
moves or copies no block of such a group: hits are whole blocks, since a group that is alone hashes
by its own block size (`KVCacheCoordinator`), and a KV connector is refused at start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    get_kv_quant_mode,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_nvium.model_executor.layers.state_pool import NONE, StatePool

# Rows are multiples of this many bytes, so a state can be viewed in any dtype and is moved by
# vector instructions. More than 16 gained nothing when measured.
_ROW_ALIGNMENT = 16


class SideCacheMetadataBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    """Passes the step's `CommonAttentionMetadata` through, at no cost.

    Both model runners build the metadata of every layer before the forward pass. During it
    `get_forward_context().attn_metadata[side_cache.layer_name]` therefore describes the whole batch
    in the same words under either of them: block table, sequence lengths, query starts, slots.
    """

    # A forward pass that asks the device who continues cannot be recorded as one graph. Saying so
    # here makes vLLM choose another CUDA graph mode instead of recording a wrong one.
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        # Defined only because the base class declares it abstract.
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        """Return `common_attn_metadata` itself."""
        return common_attn_metadata


class SideCacheBackend(AttentionBackend):
    """The backend that vLLM wants every such layer to name. It has storage and no kernels."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]
    # Any: states keep the model's dtype whatever the KV cache's is.
    supported_kv_cache_dtypes: list[Any] = []

    @staticmethod
    def get_name() -> str:
        return "NVIUM_SIDE_CACHE"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("the side cache stores states; it computes no attention")

    @staticmethod
    def get_builder_cls() -> type[SideCacheMetadataBuilder]:
        return SideCacheMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # One stride from slot to slot needs the layer's blocks to follow each other; layouts that
        # keep all layers of a block together do not have that. The order is vLLM's own preference,
        # so that naming these two changes nothing else.
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)


class SideCache(nn.Module, AttentionLayerBase):
    """Storage for states and depth marks, allocated and counted with the KV cache.

    Args:
        vllm_config: vLLM's configuration of this engine. The layer registers itself there.
        hidden_size: H, the width of the residual stream.
        prefix: the layer's name. It must hold exactly one integer, and one that no decoder layer
            uses, because vLLM orders caches by it: the number of decoder layers is a good choice.

    Attributes:
        layer_name: `prefix`, the key into the forward context's `attn_metadata` and `slot_mapping`.
        row_bytes: size of one state, padding included.
        bytes_per_slot: what the layer's memory is worth per slot; less than `row_bytes` where not
            every slot can have a state at the same time.
        states: `[num_rows, H]`, model's dtype.
        marks: `[num_slots]` uint8 on the host: how many segments a slot's position has been
            through.
        pool: which state belongs to which slot; None where it is the one of the same number.

    Raises:
        ValueError: the name is taken.
    """

    # Of the bytes of all other layers. A lower one leaves fewer states, not other results.
    SHARE = 0.12

    states: torch.Tensor
    marks: np.ndarray
    pool: StatePool | None

    def __init__(self, vllm_config: VllmConfig, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.layer_name = prefix
        self.hidden_size = hidden_size
        self.state_dtype: torch.dtype = vllm_config.model_config.dtype
        self._state_bytes = hidden_size * self.state_dtype.itemsize
        self.row_bytes = -(-self._state_bytes // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        self.bytes_per_slot = self.row_bytes
        self.kv_cache = torch.tensor([])

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix!r}: give the side cache another name")
        layers[prefix] = self

    @property
    def kv_cache(self) -> torch.Tensor:
        """What vLLM bound: `[blocks, 1, block_size, bytes_per_slot / itemsize]`, or empty."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: torch.Tensor) -> None:
        # vLLM also assigns an empty tensor here to release the memory: the view goes with it.
        self._kv_cache = kv_cache
        memory = kv_cache.view(torch.uint8).view(-1)
        num_slots, num_rows = len(memory) // self.bytes_per_slot, len(memory) // self.row_bytes
        rows = memory[: num_rows * self.row_bytes].view(num_rows, self.row_bytes)
        self.states = rows[:, : self._state_bytes].view(self.state_dtype)  # [num_rows, H]
        self.marks = np.zeros(num_slots, dtype=np.uint8)
        self.pool = StatePool(num_slots, num_rows) if num_rows < num_slots else None

    @property
    def is_bound(self) -> bool:
        """False during the profile run, which comes before the KV cache exists."""
        return self._kv_cache.numel() > 0

    def has_room(self, num_states: int) -> bool:
        """Whether so many more states can be written."""
        return self.pool is None or num_states <= self.pool.num_free

    def write_states(
        self, slots: np.ndarray, slots_device: torch.Tensor, states: torch.Tensor
    ) -> None:
        """Stores states [T, H] at `slots` ([T] int64, host and device), which hold none."""
        if self.pool is not None:
            slots_device = torch.from_numpy(self.pool.take(slots)).to(states.device)
        self.states.index_copy_(0, slots_device, states)

    def read_states(self, slots: np.ndarray) -> torch.Tensor:
        """The states [T, H] that wait at `slots` ([T] int64, host)."""
        return self.states.index_select(0, self._rows_of(slots))

    def replace_states(self, slots: np.ndarray, states: torch.Tensor) -> None:
        """Stores states [T, H] at `slots` ([T] int64, host) in the place of those that wait."""
        self.states.index_copy_(0, self._rows_of(slots), states)

    def _rows_of(self, slots: np.ndarray) -> torch.Tensor:
        rows = slots
        if self.pool is not None:
            rows = self.pool.rows(slots)
            # A missing row is -1, the last one to an array.
            assert (rows != NONE).all(), f"no state waits at some of {slots.tolist()}"
        return torch.from_numpy(rows).to(self.states.device)

    def release(self, slots: np.ndarray) -> None:
        """What waits at `slots` ([T] int64, host), if anything does, is not needed any more."""
        if self.pool is not None:
            self.pool.release(slots)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SideCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One head, whose content is the share of a state that each slot pays for.

        The dtype named is the KV cache's although the content is not of that type: when the dtypes
        of layers differ vLLM zeroes every block it hands out, which nothing here needs.
        """
        share = int(self.SHARE * self._bytes_of_other_layers(vllm_config))
        share -= share % _ROW_ALIGNMENT
        self.bytes_per_slot = min(self.row_bytes, max(share, _ROW_ALIGNMENT))
        cache_dtype = vllm_config.cache_config.cache_dtype
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.hidden_size,
            head_size_v=0,
            dtype=kv_cache_dtype_str_to_dtype(cache_dtype, vllm_config.model_config),
            kv_quant_mode=get_kv_quant_mode(cache_dtype),
            state_content_bytes=self.bytes_per_slot,
        )

    def _bytes_of_other_layers(self, vllm_config: VllmConfig) -> int:
        """What all other layers of the KV cache take per slot."""
        total = 0
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if layer is not self and isinstance(layer, AttentionLayerBase):
                spec = layer.get_kv_cache_spec(vllm_config)
                total += spec.page_size_bytes // spec.block_size if spec else 0
        return total

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, bytes_per_slot={self.bytes_per_slot}"
