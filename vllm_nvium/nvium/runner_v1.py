# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with N-vium's step: a mixin over vLLM's own runner class.

Three methods are overridden: `_update_states` to follow requests as they come, go and are
preempted, `_model_forward`, which vLLM documents as overridable, to hand the model its `Step`, and
`sample_tokens` to report what the step did.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS

from vllm_nvium.engine.seeds import engine_seed
from vllm_nvium.engine.stats import KEY
from vllm_nvium.model_executor.nvium.completion import CatchUp
from vllm_nvium.model_executor.nvium.step import Step
from vllm_nvium.model_executor.rows import Batch, enter_rows
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.requests import NviumRequests
from vllm_nvium.nvium.stats import StepObserver

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class NviumModelRunnerMixin:
    """Put before `GPUModelRunner` or `CPUModelRunner` in a class's bases."""

    nvium_requests: NviumRequests
    nvium_catch_up: CatchUp
    # The last step, for metrics and tests.
    nvium_step: Step | None = None
    nvium_observer: StepObserver

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        model = self.get_model()  # type: ignore[attr-defined]
        config = self.vllm_config  # type: ignore[attr-defined]
        self.nvium_requests = NviumRequests(
            NviumOptions.from_vllm_config(config),
            engine_seed(config),
            num_exits=len(model.exits),
            always_full=self._nvium_has_custom_processors(),
            decide_early=model.may_decide_early,
            greedy_margin=model.config.greedy_margin,
            max_rows=config.scheduler_config.max_num_batched_tokens,
        )
        requests = self.nvium_requests
        self.nvium_observer = StepObserver(model.segment_layers, requests.asked, requests.told)

    def _nvium_has_custom_processors(self) -> bool:
        """Whether something of the user's own changes logits: named with --logits-processors, or
        installed as an entry point. What vLLM has built tells, and nothing else does."""
        batch: Any = self.input_batch  # type: ignore[attr-defined]
        return any(type(own) not in BUILTIN_LOGITS_PROCESSORS for own in batch.logitsprocs.all)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        model = self.get_model()  # type: ignore[attr-defined]
        # The layers that compute attention; the side cache is a group of its own beside them.
        side_cache = model.side_cache.layer_name
        groups = [g for groups in self.attn_groups for g in groups]  # type: ignore[attr-defined]
        attention = [g for g in groups if side_cache not in g.layer_names]
        block_table = self.input_batch.block_table[0]  # type: ignore[attr-defined]
        self.nvium_catch_up = CatchUp(
            model.side_cache,
            model.num_heads,
            block_table.block_size,
            lambda rows: enter_rows(attention, rows),
            max_rows=self.scheduler_config.max_num_batched_tokens,  # type: ignore[attr-defined]
            max_ranges=self.scheduler_config.max_num_seqs,  # type: ignore[attr-defined]
        )

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.nvium_requests.remove(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            self.nvium_requests.add(new.req_id, new.sampling_params)
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self.nvium_requests.preempted(request_id)
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        if (
            not get_forward_context().attn_metadata
        ):  # profile and dummy runs have no requests behind them
            return super()._model_forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
            )
        step = self._nvium_make_step()
        output = super()._model_forward(  # type: ignore[misc]
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            nvium_step=step,
            **model_kwargs,
        )
        if step.depth == self.nvium_catch_up.num_segments:
            self.nvium_requests.completed(step.batch.last)
        else:
            self.nvium_requests.stopped()
        self.nvium_step = step
        self.nvium_observer.observe(step, ~self._nvium_unfinished())
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        if output is not None:
            setattr(output, KEY, self.nvium_observer.report())
        return output

    def _nvium_unfinished(self) -> np.ndarray:
        """[R] bool, requests of which more of the prompt follows: no token is drawn for them."""
        num_requests = self.input_batch.num_reqs  # type: ignore[attr-defined]
        return self.discard_request_mask.np[:num_requests]  # type: ignore[attr-defined]

    def _nvium_make_step(self) -> Step:
        batch = self.input_batch  # type: ignore[attr-defined]
        num_requests = batch.num_reqs
        query_start = self.query_start_loc.np[: num_requests + 1]  # type: ignore[attr-defined]
        first = batch.num_computed_tokens_cpu[:num_requests].astype(np.int64)
        last = first + np.diff(query_start) - 1
        block_table = batch.block_table[0]
        prompt_lengths = batch.num_prompt_tokens_cpu_tensor.numpy()[:num_requests]
        # Several rows are a prompt, or the recomputation of what was preempted.
        decoding = (first >= prompt_lengths) & (first == last)
        sampling = self.nvium_requests.sampling(
            batch.req_ids, last, decoding, self._nvium_unfinished()
        )
        return Step(
            request_ids=list(batch.req_ids),
            batch=Batch(
                query_start=query_start,
                first=first,
                last=last,
                complete=self.nvium_requests.complete,
                block_table=block_table.get_numpy_array()[:num_requests],
                block_table_device=block_table.get_device_tensor(num_requests),
                slots_device=block_table.slot_mapping.gpu,
            ),
            sampling=sampling,
            catch_up=self.nvium_catch_up,
        )
