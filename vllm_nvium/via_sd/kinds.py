# SPDX-License-Identifier: Apache-2.0
"""Which kinds of copies a target can have: those that this machine has a kernel for, which takes
all of the target's sizes. A start asks it of the configuration, before any process is started, and
a worker again of the weights."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size
from vllm.utils.platform_utils import is_uva_available
from vllm.utils.torch_utils import set_default_torch_num_threads

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.layers.low_precision_kernels import LAYERS, layers_for
from vllm_nvium.model_executor.layers.low_precision_linear import (
    INT4,
    KINDS,
    LowPrecisionLinear,
)
from vllm_nvium.via_sd.options import AUTO, SKIP

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

Layers = list[type[LowPrecisionLinear]]
Shapes = set[tuple[int, int]]


def check_copies(kind: str, vllm_config: "VllmConfig", is_int8: bool) -> None:
    """Refuses copies that workers could not make, as far as the configuration tells: how much
    memory there is only they know.

    Args:
        kind: `--via-sd-slim`, as it came out for this target.
        is_int8: whether the target has eight bits already.

    Raises:
        UserError: one sentence.
    """
    if kind == SKIP:
        return
    device_type, parallel = vllm_config.device_config.device_type, vllm_config.parallel_config
    if device_type != "cpu":  # there vLLM does not offload
        _check_offloading(kind, vllm_config.offload_config)
    if kind != AUTO:
        # Trying a GPU's kernels would take memory of it, in a process that does not use it.
        layers = partial(layers_for if device_type == "cpu" else _written_for, device_type)
        shapes = shapes_of_config(vllm_config.model_config, parallel)
        kinds = (INT4,) if is_int8 else KINDS
        # A process that has had several of OpenMP's threads must not fork any more.
        with set_default_torch_num_threads(1):
            candidates_for(kind, kinds, shapes, parallel.tensor_parallel_size, layers)


def candidates_for(
    kind: str,
    kinds: tuple[str, ...],
    shapes: Shapes,
    num_ranks: int,
    layers: Callable[[tuple[str, ...]], Layers],
) -> Layers:
    """The layers of a kind, or of all kinds for `auto`, that take all weights.

    Args:
        kinds: those that have fewer bits than the target.
        shapes: (outputs, inputs) of a tensor-parallel rank's parts of the weights.
        layers: given kinds, those of them that there are here.

    Raises:
        UserError: there is none of the kind that was asked for.
    """
    found = layers(kinds if kind == AUTO else (kind,))
    refusals = [_refusal(layer, shapes, num_ranks) for layer in found]
    candidates = [layer for layer, reason in zip(found, refusals, strict=True) if reason is None]
    if kind != AUTO and not candidates:
        why = refusals[0] if refusals else "this machine has no kernel for it"
        works = {each.kind for each in layers(kinds) if not _refusal(each, shapes, num_ranks)}
        works |= {SKIP}
        raise UserError(
            f"--via-sd-slim is {kind!r}, but {why}; here {', '.join(sorted(works))} "
            f"{'work' if len(works) > 1 else 'works'}."
        )
    return candidates


def shapes_of_config(model: "ModelConfig", parallel: "ParallelConfig") -> Shapes:
    """(outputs, inputs) of all weights that copies are made of, of a tensor-parallel rank's parts
    of them: what `target_weights.shapes_of` finds in the loaded target."""
    ranks, hidden = parallel.tensor_parallel_size, model.get_hidden_size()
    queries = model.get_num_attention_heads(parallel) * model.get_head_size()
    keys = model.get_num_kv_heads(parallel) * model.get_head_size()
    inner = model.hf_text_config.intermediate_size // ranks
    vocabulary = pad_vocab_size(model.get_vocab_size()) // ranks
    return {
        (queries + 2 * keys, hidden),
        (hidden, queries),
        (2 * inner, hidden),
        (hidden, inner),
        (vocabulary, hidden),
    }


def _written_for(device_type: str, kinds: tuple[str, ...]) -> Layers:
    """Those that run on such a device, whether or not this one can."""
    return [each for each in LAYERS if each.device_type == device_type and each.kind in kinds]


def _refusal(layer: type[LowPrecisionLinear], shapes: Shapes, num_ranks: int) -> str | None:
    """Of the first weight that it cannot take."""
    reasons = (layer.refusal(*shape) for shape in sorted(shapes))
    where = f" in the parts of {num_ranks} tensor-parallel ranks" if num_ranks > 1 else ""
    return next((reason + where for reason in reasons if reason), None)


def _check_offloading(kind: str, offload: Any) -> None:
    """Where the GPU reads the host's memory itself, offloaded weights are weights like all others.
    Otherwise vLLM gives a layer a function of its own that fetches them, and a copy of the layer
    would run that: the target's own weights, at the target's price."""
    import vllm.envs as envs

    gib = offload.uva.cpu_offload_gb
    if not gib:
        return
    if envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA:
        remedy = "unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA, or "
    elif not is_uva_available():
        remedy = ""
    else:
        return
    raise UserError(
        f"--cpu-offload-gb is {gib}, but without unified virtual addressing a layer fetches "
        f"offloaded weights by itself, and --via-sd-slim {kind} has copies of them; "
        f"{remedy}give --via-sd-slim skip."
    )
