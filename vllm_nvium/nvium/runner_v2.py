# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with N-vium's step, through the seam that vLLM gives to models: a `ModelState`.

The model names this class in `get_model_state_cls()`. vLLM tells it of requests as they come and
go, shows it every batch, and passes what `prepare_inputs` returns to the model's `forward`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_nvium.engine.seeds import engine_seed
from vllm_nvium.model_executor.nvium.completion import CatchUp
from vllm_nvium.model_executor.nvium.step import Step
from vllm_nvium.model_executor.rows import Batch, enter_rows
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.requests import NviumRequests
from vllm_nvium.nvium.stats import StepObserver

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup


# Where vLLM's own logits processors are defined.
BUILTIN_PROCESSORS = "vllm.v1.worker.gpu.sample."


class HostBlockTable:
    """What Model Runner V2 keeps on the device only: which blocks every request holds.

    Reading it back would make the host wait for the device before each step, so the ids are noted
    as vLLM appends them.

    Args:
        block_tables: vLLM's, whose `append_block_ids` is wrapped on this instance.
        group: KV cache group whose blocks are noted.

    Attributes:
        rows: [max requests, max blocks] int32, by vLLM's request index. What lies behind a
            request's blocks is left over from others.
    """

    def __init__(self, block_tables: "BlockTables", group: int) -> None:
        self.rows = np.zeros(tuple(block_tables.block_tables[group].gpu.shape), dtype=np.int32)
        append, num_blocks = block_tables.append_block_ids, block_tables.num_blocks.np[group]

        def append_and_note(
            req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool
        ) -> None:
            start = 0 if overwrite else int(num_blocks[req_index])
            append(req_index, new_block_ids, overwrite)
            self.rows[req_index, start : int(num_blocks[req_index])] = new_block_ids[group]

        block_tables.append_block_ids = append_and_note  # type: ignore[method-assign]


class NviumModelState(DefaultModelState):
    """`DefaultModelState` that hands the model its `Step`.

    vLLM calls these methods in one order per step: requests leave and come, `preprocess_state`,
    `prepare_attn`, `prepare_inputs`, the forward pass, `postprocess_state`. Profile and dummy runs
    skip `preprocess_state`, have no requests behind them, and get no `Step`.
    """

    supports_prompt_embeds = False

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.requests = NviumRequests(
            NviumOptions.from_vllm_config(vllm_config),
            engine_seed(vllm_config),
            num_exits=len(model.exits),  # type: ignore[arg-type]
            decide_early=bool(model.may_decide_early),
            greedy_margin=model.config.greedy_margin,  # type: ignore[union-attr,arg-type]
            max_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        )
        layers: Any = model.segment_layers
        self.observer = StepObserver(layers, self.requests.asked, self.requests.told)
        self._is_real = False
        self._open_step: Step | None = None
        # The last step, for metrics and tests.
        self.step: Step | None = None

    def initialize_kv_cache(
        self, kv_cache_config: "KVCacheConfig", block_tables: "BlockTables"
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        side_cache: Any = self.model.side_cache
        self._group = next(
            index
            for index, group in enumerate(kv_cache_config.kv_cache_groups)
            if side_cache.layer_name in group.layer_names
        )
        self._blocks = HostBlockTable(block_tables, self._group)
        self._catch_up = CatchUp(
            side_cache,
            int(self.model.num_heads),  # type: ignore[arg-type]
            block_tables.block_sizes[self._group],
            # The groups are known from the first `prepare_attn` on.
            lambda rows: enter_rows(self._attn_groups, rows),
            max_rows=self.vllm_config.scheduler_config.max_num_batched_tokens,
            max_ranges=self.vllm_config.scheduler_config.max_num_seqs,
        )

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """vLLM's own sampler stays; it tells whether something of the user's own changes logits,
        named with --logits-processors or installed as an entry point."""
        self.requests.always_full = any(
            not type(own).__module__.startswith(BUILTIN_PROCESSORS)
            for own in sampler.logits_processors
        )
        return super().custom_sampler(sampler)

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        """A new request, or a preempted one that is back: in both cases its blocks are new."""
        super().add_request(req_index, new_req_data)
        self.requests.add(new_req_data.req_id, new_req_data.sampling_params)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.requests.remove(req_id)

    def preprocess_state(self, *args: Any, **kwargs: Any) -> None:
        super().preprocess_state(*args, **kwargs)
        self._is_real = True

    def prepare_attn(
        self,
        input_batch: "InputBatch",
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: "list[list[AttentionGroup]]",
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        self._block_table = block_tables[self._group]
        self._slots = slot_mappings[self._group]
        side_cache: Any = self.model.side_cache
        # The layers that compute attention; the side cache is a group of its own beside them.
        self._attn_groups = [
            group
            for groups in attn_groups
            for group in groups
            if side_cache.layer_name not in group.layer_names
        ]
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
        )

    def prepare_inputs(
        self, input_batch: "InputBatch", req_states: "RequestState"
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if not self._is_real:
            return inputs
        self._is_real = False
        self.step = self._open_step = self._make_step(input_batch, req_states)
        return inputs | {"nvium_step": self.step}

    def _make_step(self, input_batch: "InputBatch", req_states: "RequestState") -> Step:
        num_requests, indices = input_batch.num_reqs, input_batch.idx_mapping_np
        query_start = input_batch.query_start_loc_np[: num_requests + 1]
        # Exact even while the last step's tokens are still unknown here: without speculative
        # decoding every scheduled row counts.
        first = input_batch.num_computed_tokens_np.astype(np.int64)
        last = first + np.diff(query_start) - 1
        # Several rows are a prompt, or the recomputation of what was preempted.
        decoding = (first >= req_states.prompt_len.np[indices]) & (first == last)
        self._unfinished = last + 1 < input_batch.prefill_len_np
        sampling = self.requests.sampling(input_batch.req_ids, last, decoding, self._unfinished)
        return Step(
            request_ids=list(input_batch.req_ids),
            batch=Batch(
                query_start=query_start,
                first=first,
                last=last,
                complete=self.requests.complete,
                # Not a copy of these rows, of which a step reads a few entries.
                block_table=self._blocks.rows,
                block_table_device=self._block_table[:num_requests],
                slots_device=self._slots,
                table_rows=indices,
            ),
            sampling=sampling,
            catch_up=self._catch_up,
        )

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        super().postprocess_state(*args, **kwargs)
        if (step := self._open_step) is not None:
            self._open_step = None
            if step.depth == self._catch_up.num_segments:
                self.requests.completed(step.batch.last)
            else:
                self.requests.stopped()
            self.observer.observe(step, ~self._unfinished)
