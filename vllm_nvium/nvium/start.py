# SPDX-License-Identifier: Apache-2.0
"""What vLLM runs before it starts an N-vium model: options that cannot work are refused with one
sentence, and the worker class is chosen. vLLM calls it from `VllmConfig.__post_init__`, in the
process that makes the configuration, before asynchronous scheduling and the worker are decided."""

from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.checkpoint_layout import check_files
from vllm_nvium.nvium import cuda_graphs
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.refusals import refuse_unsupported
from vllm_nvium.weights import weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_WORKER = "vllm_nvium.nvium.cpu_worker.NviumCPUWorker"
GPU_WORKER = "vllm_nvium.nvium.gpu_worker.NviumGPUWorker"


class NviumForCausalLMConfig(VerifyAndUpdateConfig):
    """The row of vLLM's `MODELS_CONFIG_MAP` for `NviumForCausalLM`."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        # What a worker derives for a drafter: all other options in it are the target's. Such a
        # drafter was refused by itself (`as_drafter.py`).
        if vllm_config.model_config.runner_type == "draft":
            return
        NviumOptions.from_vllm_config(vllm_config)
        refuse_unsupported(vllm_config)
        refuse_mismatched_weights(vllm_config)
        cuda_graphs.switch_off(vllm_config)
        keep_one_block_table(vllm_config)
        if not vllm_config.use_v2_model_runner:
            choose_v1_worker(vllm_config)


def keep_one_block_table(vllm_config: "VllmConfig") -> None:
    """Give layers with a sliding window the blocks of all the others.

    The side cache, its marks and catch-up passes know a position by one slot. vLLM would give such
    layers a group of KV caches of their own, in which it frees blocks behind the window, and with
    them K/V that a position may still attend to which left early and has not caught up. Without its
    hybrid manager those blocks are kept; attention looks no further than the window either way.
    """
    vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True


# The values of --load-format that read plain safetensors when there are any.
SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")


def refuse_mismatched_weights(vllm_config: "VllmConfig") -> None:
    """Raise UserError when the checkpoint's tensors are not those its configuration describes.

    vLLM would find out in the engine's process, after seconds, from inside a layer. Weights that
    are not here yet, or not in the checkpoint's own shapes (quantised, dummy), are not looked at.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format not in SAFETENSORS_FORMATS or model.quantization is not None:
        return
    if files := weight_files(model.model, model.revision, load.download_dir):
        check_files(model.hf_config, files)


def choose_v1_worker(vllm_config: "VllmConfig") -> None:
    """Set the worker whose Model Runner V1 knows about exits, and switch off what it cannot do.

    Model Runner V2 needs nothing here: it asks the model for its state class. On V1 the runner is
    made by the worker, and vLLM replaces only the worker class "auto", so a class set here stays.
    """
    from vllm.platforms import current_platform

    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if current_platform.is_cpu():
        worker = CPU_WORKER
    elif current_platform.is_cuda_alike():
        worker = GPU_WORKER
    else:
        raise UserError(
            f"Model Runner V1 is in use on {current_platform.device_name!r}, but N-vium has a V1 "
            "worker for CPU and CUDA only; set VLLM_USE_V2_MODEL_RUNNER=1."
        )
    # The front ends of a data-parallel start may build a configuration from one built before.
    if parallel.worker_cls not in ("auto", worker):
        if not _is_subclass(parallel.worker_cls, worker):
            raise UserError(
                f"--worker-cls is {_shown(parallel.worker_cls)}, but on Model Runner V1 an N-vium "
                f"model needs {worker}; leave it at 'auto' or derive the class from that one."
            )
    else:
        parallel.worker_cls = worker
    # With asynchronous scheduling V1 plans a step before the last one's tokens are known on the
    # host, and the exit draw reads them there.
    if scheduler.async_scheduling:
        raise UserError(
            "--async-scheduling is True, but an N-vium model on Model Runner V1 draws its exits on "
            "the host and needs each step's tokens first; leave it off."
        )
    scheduler.async_scheduling = False


def _is_subclass(worker_cls: Any, base: str) -> bool:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if not isinstance(worker_cls, str):
        return False  # a pickled class: what it is can only be told by running it
    try:
        return issubclass(resolve_obj_by_qualname(worker_cls), resolve_obj_by_qualname(base))
    except (ImportError, AttributeError, TypeError):
        return False


def _shown(worker_cls: Any) -> str:
    return repr(worker_cls) if isinstance(worker_cls, str) else "a class object"
