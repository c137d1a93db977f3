# SPDX-License-Identifier: Apache-2.0
"""The side cache as vLLM sees it (one KV cache group with the attention layers, counted in the
budget) and as the catch-up sees it (states and marks at the KV cache's slots)."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from tiny_models import make_dense
from vllm_nvium.model_executor.layers.side_cache import SideCache

BLOCK_SIZE = 32
KV_BYTES = 8 << 20


def make_side_cache(dtype: torch.dtype, hidden_size: int = 20) -> SideCache:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    return SideCache(config, hidden_size, "model.side_cache.4")


def bind(cache: SideCache, dtype: torch.dtype, num_blocks: int = 3) -> torch.Tensor:
    """Binds memory laid out as vLLM does it, behind other layers' bytes; returns the raw bytes."""
    size = num_blocks * BLOCK_SIZE * cache.bytes_per_slot
    raw = torch.zeros(4096 + size, dtype=torch.int8)
    shape = (num_blocks, 1, BLOCK_SIZE, cache.bytes_per_slot)
    cache.bind_kv_cache(raw[4096:].view(shape).view(dtype))
    return raw[4096:].view(torch.uint8).view(-1, cache.bytes_per_slot)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_states_are_views_of_a_slots_own_bytes(
    state_dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    cache = make_side_cache(state_dtype)
    raw = bind(cache, cache_dtype)
    assert cache.states.shape == (3 * BLOCK_SIZE, 20)
    assert cache.states.dtype == state_dtype
    assert cache.marks.shape == (3 * BLOCK_SIZE,)
    assert cache.pool is None and cache.has_room(10**9)

    slots = torch.tensor([0, 31, 32, 95])
    states = torch.randn(4, 20).to(state_dtype)
    cache.write_states(slots.numpy(), slots, states)
    assert torch.equal(cache.read_states(slots.numpy()), states)
    assert torch.equal(raw[slots, : 20 * state_dtype.itemsize].view(state_dtype), states)
    others = torch.ones(len(raw), dtype=torch.bool)
    others[slots] = False
    assert not raw[others].any()


def test_fewer_states_than_slots() -> None:
    cache = make_side_cache(torch.float32, hidden_size=60)
    assert cache.row_bytes == 240
    cache.bytes_per_slot = 80
    raw = bind(cache, torch.float32)
    assert len(cache.marks) == 3 * BLOCK_SIZE and len(cache.states) == BLOCK_SIZE
    assert cache.states.data_ptr() == raw.data_ptr()

    slots = np.array([95, 3, 50, 3])  # two requests share the prefix that slot 3 belongs to
    states = torch.randn(4, 60)
    states[3] = states[1]
    cache.write_states(slots, torch.from_numpy(slots), states)
    assert torch.equal(cache.read_states(slots), states)
    assert cache.has_room(BLOCK_SIZE - 3) and not cache.has_room(BLOCK_SIZE - 2)
    cache.release(np.array([3, 3, 7]))
    assert cache.has_room(BLOCK_SIZE - 2)
    assert torch.equal(cache.read_states(slots[[0, 2]]), states[[0, 2]])


def test_views_follow_what_is_bound() -> None:
    cache = make_side_cache(torch.float32)
    assert not cache.is_bound
    bind(cache, torch.float32)
    old = cache.states
    bind(cache, torch.float32)
    assert cache.states.data_ptr() != old.data_ptr()
    cache.kv_cache = torch.tensor([])  # what vLLM does at shutdown
    assert not cache.is_bound and len(cache.states) == len(cache.marks) == 0


def test_name_must_be_free() -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    SideCache(config, 8, "model.side_cache.4")
    with pytest.raises(ValueError, match=r"'model\.side_cache\.4'"):
        SideCache(config, 8, "model.side_cache.4")


class SideCacheProbe(LlamaForCausalLM):
    """A dense model that stores its last hidden states in a side cache and looks at them."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.side_cache = SideCache(vllm_config, config.hidden_size, "model.side_cache.4")
        # Per forward pass: [(slots of the request, marks there before the pass), ...]
        self.seen: list[list[tuple[list[int], list[int]]]] = []

    def forward(self, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = super().forward(input_ids, positions, *args, **kwargs)
        context = get_forward_context()
        cache = self.side_cache
        if context.attn_metadata:
            batch = context.attn_metadata[cache.layer_name]
            layer = next(name for name in context.attn_metadata if name != cache.layer_name)
            assert torch.equal(
                context.attn_metadata[layer].block_table, batch.block_table_tensor
            ), "one block table for all"
            assert torch.equal(context.slot_mapping[layer], context.slot_mapping[cache.layer_name])
            self._note(batch, positions)
            num_rows = batch.num_actual_tokens
            slots = batch.slot_mapping[:num_rows]
            cache.write_states(slots.numpy(), slots, hidden[:num_rows])
            cache.marks[slots.numpy()] = 1
            assert torch.equal(cache.read_states(slots.numpy()), hidden[:num_rows])
            cache.release(slots.numpy())
        return hidden

    def _note(self, batch: Any, positions: torch.Tensor) -> None:
        seen = []
        starts = batch.query_start_loc_cpu.tolist()
        for request, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            length = int(batch.seq_lens[request])
            assert positions[start:stop].tolist() == list(range(length - stop + start, length))
            all_positions = torch.arange(length)
            blocks = batch.block_table_tensor[request, all_positions // BLOCK_SIZE]
            slots = blocks.long() * BLOCK_SIZE + all_positions % BLOCK_SIZE
            assert (
                slots[length - stop + start :].tolist() == batch.slot_mapping[start:stop].tolist()
            )
            seen.append((slots.tolist(), self.side_cache.marks[slots.numpy()].tolist()))
        self.seen.append(seen)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense")
    make_dense(path)
    return str(path)


def start(checkpoint: str, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> tuple[LLM, Any]:
    """An engine in this process with the probe as its model, and its model runner."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM lets it override kv_cache_memory_bytes.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    ModelRegistry.register_model("SideCacheProbe", SideCacheProbe)
    arguments: dict[str, Any] = {
        "hf_overrides": {"architectures": ["SideCacheProbe"]},
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": True,
    }
    llm = LLM(checkpoint, **(arguments | kwargs))
    return llm, llm.llm_engine.model_executor.driver_worker.worker.model_runner


def generate(llm: LLM, *prompts: list[int], max_tokens: int = 4) -> list[Any]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def test_in_an_engine(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, runner = start(checkpoint, monkeypatch)
    cache, config = runner.model.side_cache, runner.kv_cache_config

    # One group, so one block table, and no block is zeroed on its account.
    (group,) = config.kv_cache_groups
    assert isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
    assert cache.layer_name in group.layer_names and len(group.layer_names) == 5
    assert not config.needs_kv_cache_zeroing
    assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching

    # Part of the budget: a block is the page of 4 layers (K and V of one head of 32) and its own.
    layers = 4 * 2 * 32 * 4
    page = BLOCK_SIZE * (layers + cache.bytes_per_slot)
    assert cache.bytes_per_slot == int(0.12 * layers) // 16 * 16
    assert config.num_blocks == KV_BYTES // page
    assert len(cache.marks) == config.num_blocks * BLOCK_SIZE
    assert len(cache.states) == len(cache.marks) * cache.bytes_per_slot // (64 * 4)

    # Chunked prefill and several sequences: a row is marked once it has run, and not before.
    seen = runner.model.seen
    prompts = [list(range(3, 103)), [5, 6, 7], list(range(40, 90))]
    generate(llm, *prompts)
    for step in seen:
        for slots, marks in step:
            assert len(set(slots)) == len(slots)
            assert marks == sorted(marks, reverse=True)
    finished = {slot for step in seen for slots, _ in step for slot in slots}
    assert cache.marks.sum() == len(finished)

    # A prefix-cache hit finds the marks of the finished request: 3 of the 100 tokens' blocks.
    seen.clear()
    (output,) = generate(llm, prompts[0] + [7, 8])
    assert output.num_cached_tokens == 96
    assert seen[0][0][1][:96] == [1] * 96


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's FP8 KV cache needs AVX-512 or AMX",
)
def test_quantised_kv_cache_leaves_states_alone(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, runner = start(checkpoint, monkeypatch, dtype="bfloat16", kv_cache_dtype="fp8")
    generate(llm, list(range(3, 103)))  # the probe compares what it stored
    cache, config = runner.model.side_cache, runner.kv_cache_config
    assert cache.states.dtype == torch.bfloat16
    assert not config.needs_kv_cache_zeroing
    assert cache.bytes_per_slot <= 0.12 * 4 * 2 * 32
    page = BLOCK_SIZE * (4 * 2 * 32 + cache.bytes_per_slot)
    assert config.num_blocks == KV_BYTES // page


@pytest.mark.parametrize(
    ("hidden", "layers", "kv_heads", "head_size", "share_of_a_state"),
    [
        (1536, 28, 2, 128, 1.0),  # Qwen2.5-1.5B
        (2048, 28, 8, 128, 1.0),  # Qwen3-1.7B
        (2048, 16, 8, 64, 0.96),  # Llama-3.2-1B
        (2048, 22, 4, 64, 0.66),  # TinyLlama-1.1B
    ],
)
def test_share_of_the_kv_bytes(
    hidden: int, layers: int, kv_heads: int, head_size: int, share_of_a_state: float
) -> None:
    class Layer(AttentionLayerBase):
        def get_attn_backend(self) -> Any:
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
            return FullAttentionSpec(
                block_size=16, num_kv_heads=kv_heads, head_size=head_size, dtype=torch.bfloat16
            )

    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype="bfloat16", block_size=16),
        compilation_config=SimpleNamespace(
            static_forward_context={str(i): Layer() for i in range(layers)}
        ),
    )
    cache = SideCache(config, hidden, f"model.side_cache.{layers}")
    page = cache.get_kv_cache_spec(config).page_size_bytes
    assert page <= 0.12 * layers * Layer().get_kv_cache_spec(config).page_size_bytes
    assert page == 16 * cache.bytes_per_slot
    assert cache.bytes_per_slot / (2 * hidden) == pytest.approx(share_of_a_state, abs=0.01)
