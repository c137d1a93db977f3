# SPDX-License-Identifier: Apache-2.0
"""The paged side cache: one residual state and one depth mark for every slot of the KV cache.

A position that left the model at an early exit keeps its state here until a catch-up pass takes it
further; the mark says how many segments it has been through (`catch_up.py` reads and writes both).

To vLLM this is one more attention layer, whose KV cache spec has the block size of all the others.
All are full attention, so vLLM puts them into one KV cache group: one block table, one slot
mapping, one prefix cache, and a page that is part of the KV memory budget. A slot here is therefore
the same number as a slot of the KV cache:
`block_table[request, position // block_size] * block_size + position % block_size`.

A slot is a row of `bytes_per_slot` bytes:
`[state: hidden_size values of the model's dtype | mark: one byte | padding]`.
State and mark lie side by side so that whatever moves a block moves both (a copy-on-write of a
shared block, for instance).
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

# Rows start at multiples of this many bytes, so a state can be viewed in any dtype and is moved by
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
    """Storage for the state and depth mark of every slot, allocated and counted with the KV cache.

    Args:
        vllm_config: vLLM's configuration of this engine. The layer registers itself there.
        hidden_size: H, the width of the residual stream.
        prefix: the layer's name. It must hold exactly one integer, and one that no decoder layer
            uses, because vLLM orders caches by it: the number of decoder layers is a good choice.

    Attributes:
        layer_name: `prefix`, the key into the forward context's `attn_metadata` and `slot_mapping`.
        bytes_per_slot: size of a row, padding included.

    Raises:
        ValueError: the name is taken.
    """

    def __init__(self, vllm_config: VllmConfig, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.layer_name = prefix
        self.hidden_size = hidden_size
        self.state_dtype: torch.dtype = vllm_config.model_config.dtype
        self._state_bytes = hidden_size * self.state_dtype.itemsize
        self.bytes_per_slot = -(-(self._state_bytes + 1) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        self._states: torch.Tensor | None = None
        self._marks: torch.Tensor | None = None
        self._marks_host: np.ndarray | None = None
        self._kv_cache = torch.tensor([])

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
        # vLLM also assigns an empty tensor here to release the memory: the views go with it.
        self._kv_cache = kv_cache
        self._states = self._marks = self._marks_host = None

    @property
    def is_bound(self) -> bool:
        """False during the profile run, which comes before the KV cache exists."""
        return self._kv_cache.numel() > 0

    @property
    def states(self) -> torch.Tensor:
        """`[num_slots, H]`, model's dtype: a slot's residual state. Rows contiguous, strided."""
        if self._states is None:
            self._make_views()
        assert self._states is not None
        return self._states

    @property
    def marks(self) -> torch.Tensor:
        """`[num_slots]` uint8, strided: how many segments a slot's position has been through."""
        if self._marks is None:
            self._make_views()
        assert self._marks is not None
        return self._marks

    def _make_views(self) -> None:
        if not self.is_bound:
            raise RuntimeError(f"{self.layer_name} is used before the KV cache was allocated")
        rows = self._kv_cache.view(torch.uint8).view(-1, self.bytes_per_slot)  # [slots, bytes]
        self._states = rows[:, : self._state_bytes].view(self.state_dtype)  # [slots, H]
        self._marks = rows[:, self._state_bytes]  # [slots]
        # On CPU the marks are read and written without a tensor operation in between.
        self._marks_host = self._marks.numpy() if self._marks.device.type == "cpu" else None

    def set_marks(self, slots: np.ndarray, depth: int) -> None:
        """Marks positions in `slots` ([T] int64, host) as having been through `depth` segments."""
        if self._marks is None:
            self._make_views()
        if self._marks_host is not None:
            self._marks_host[slots] = depth
        else:
            self.marks[torch.from_numpy(slots).to(self.marks.device)] = depth

    def get_marks(self, slots: np.ndarray) -> np.ndarray:
        """Marks of the positions in `slots` ([T] int64, host) as a [T] uint8 host array."""
        if self._marks_host is not None:
            return self._marks_host[slots]
        return self.marks[torch.from_numpy(slots).to(self.marks.device)].cpu().numpy()

    def write_states(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Stores states [T, H] at `slots` ([T] int64, device)."""
        self.states.index_copy_(0, slots, states)

    def read_states(self, slots: torch.Tensor) -> torch.Tensor:
        """States [T, H] at `slots` ([T] int64, device)."""
        return self.states.index_select(0, slots)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SideCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One head, whose content is the whole row.

        The dtype named is the KV cache's although the content is not of that type: when the dtypes
        of layers differ vLLM zeroes every block it hands out, which nothing here needs.
        """
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

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, bytes_per_slot={self.bytes_per_slot}"
