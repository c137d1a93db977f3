# SPDX-License-Identifier: Apache-2.0
"""What a start with `--via-sd` goes through: before vLLM makes its configuration the drafter's
count and the classes of worker and scheduler are set, and after it what cannot work is refused with
one sentence. Without `--via-sd` nothing here changes anything."""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_nvium.engine.options import shown
from vllm_nvium.errors import UserError
from vllm_nvium.via_sd.options import (
    AUTO,
    DEFAULT_MASK,
    PREFIX,
    SKIP,
    ViaSDOptions,
    is_own,
    options_of,
)
from vllm_nvium.via_sd.refusals import (
    METHODS,
    check_architecture,
    check_drafter,
    check_graphs,
    check_rejection,
    refuse_unsupported,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_nvium.model_executor.via_sd.mask import MaskFile

logger = logging.getLogger("vllm.via_sd")

CPU_WORKER = "vllm_nvium.via_sd.cpu_worker.ViaSDCPUWorker"
GPU_WORKER = "vllm_nvium.via_sd.gpu_worker.ViaSDGPUWorker"
SCHEDULER = "vllm_nvium.via_sd.scheduler.ViaSDScheduler"
DRAFTS, MASK, SLIM = PREFIX + "drafts", PREFIX + "mask", PREFIX + "slim"
# The drafter of a start that names none: n-grams that stood in the text before, which cost nothing.
# Behind them, and where there are none, the slim verifier drafts for itself.
DEFAULT_DRAFTER = {"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 5}
DEFAULT_DRAFTS = 4
V2_SWITCH = "VLLM_USE_V2_MODEL_RUNNER"
# vLLM's short flags for some of --speculative-config's keys.
SHORT_FLAGS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}


@contextmanager
def prepared(engine_args: Any) -> Iterator[None]:
    """While vLLM makes its configuration, engine arguments as VIA-SD needs them.

    The drafter's `num_speculative_tokens` becomes the window, because buffers, reserved KV slots
    and statistics of vLLM all follow it; what it was goes along as an option of its own.

    Raises:
        UserError: an option is wrong, or --speculative-config is missing or does not fit.
    """
    given = engine_args.additional_config
    options = ViaSDOptions.from_config(given)
    if options is None:
        yield
        return
    if DRAFTS in given:
        raise UserError(
            f"additional_config {DRAFTS!r} is {given[DRAFTS]!r}, but the drafter's count is "
            "num_speculative_tokens of --speculative-config; remove it."
        )
    # vLLM's own checks see what is changed here, and would speak of numbers that nobody gave.
    refuse_unsupported(_as_given(engine_args))
    names = ["additional_config", "speculative_config", "scheduler_cls", "worker_cls"]
    names += ["async_scheduling", *SHORT_FLAGS]
    before = {name: getattr(engine_args, name) for name in names}
    spec, drafts = _speculative_config(_with_short_flags(engine_args), options)
    for name in SHORT_FLAGS:
        setattr(engine_args, name, None)
    engine_args.additional_config = {**given, DRAFTS: drafts}
    # Checks that the window holds the drafts of a round.
    ViaSDOptions.from_config(engine_args.additional_config)
    engine_args.speculative_config = spec
    if engine_args.async_scheduling is None:
        engine_args.async_scheduling = False
    if engine_args.scheduler_cls is None:
        engine_args.scheduler_cls = SCHEDULER
    if engine_args.worker_cls == "auto":
        engine_args.worker_cls = _worker_class()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(engine_args, name, value)


def check(vllm_config: "VllmConfig") -> None:
    """Refuses what VIA-SD cannot run with.

    Raises:
        UserError: one sentence.
    """
    options = options_of(vllm_config)
    if options is None:
        return
    refuse_unsupported(vllm_config)
    # With another scheduler the slim verifier would write into blocks of other requests.
    for flag, found, own in (
        ("--worker-cls", vllm_config.parallel_config.worker_cls, (CPU_WORKER, GPU_WORKER)),
        ("--scheduler-cls", vllm_config.scheduler_config.scheduler_cls, (SCHEDULER,)),
    ):
        if found not in own:
            raise UserError(
                f"{flag} is {found!r}, but VIA-SD has one of its own ({own[0]}); leave it out."
            )
    model = vllm_config.model_config
    check_architecture(model)
    check_drafter(vllm_config.speculative_config)
    check_graphs(vllm_config)
    may_keep = options.mode == "paper" or options.allow_paper_mode
    if may_keep and model.logprobs_mode.startswith("processed"):
        raise UserError(
            f"--logprobs-mode is {model.logprobs_mode!r}, but tokens that the paper's rule keeps "
            "have no processed law; set it to raw_logprobs or leave the paper's rule off."
        )
    from vllm_nvium.model_executor.via_sd.mask import (
        ModelIdentity,
        layer_list,
        mask_file_of,
        skipped_layers,
    )

    kind = _kind_of_slim(options, model)
    if options.rounds != 0:
        from vllm_nvium.via_sd.kinds import check_copies

        check_copies(kind, vllm_config, _is_int8(model))
        if kind != SKIP and model.head_dtype != model.dtype:
            raise UserError(
                f"--hf-overrides sets head_dtype {str(model.head_dtype).removeprefix('torch.')}, "
                f"but --via-sd-slim {kind} multiplies with a copy of the head; leave it out, or "
                "give skip."
            )
    checked: dict[str, Any] = {SLIM: kind}
    mask = options.mask or (DEFAULT_MASK if kind == SKIP else None)
    skipped: tuple[int, ...] = ()
    if mask is not None:
        skipped = skipped_layers(
            mask,
            model.hf_text_config.num_hidden_layers,
            ModelIdentity.from_config(model.hf_config),
        )
        if (mask_file := mask_file_of(mask)) is not None:
            _check_weights(mask, mask_file, vllm_config)
        # Workers skip what was checked here: a file may change, and other processes may not see it.
        checked[MASK] = layer_list(skipped)
    # A new mapping, because options that were read are remembered by theirs.
    vllm_config.additional_config = {**vllm_config.additional_config, **checked}
    if vllm_config.use_v2_model_runner:
        raise UserError(
            f"{V2_SWITCH} is {os.environ.get(V2_SWITCH)!r}, but VIA-SD needs Model Runner V1, "
            "where drafts can be checked before they are verified; unset it."
        )
    logger.info(
        "VIA-SD on Model Runner V1: mode %s, slim verifier %s, which skips %d of %d layers (%s), "
        "windows of at most %d tokens, %d drafts at a time",
        options.mode,
        kind,
        len(skipped),
        model.hf_text_config.num_hidden_layers,
        layer_list(skipped) or "none",
        options.window,
        options.drafts,
    )


def _kind_of_slim(options: ViaSDOptions, model: Any) -> str:
    """What `--via-sd-slim` comes to for this target.

    Raises:
        UserError: copies are asked for of weights that have no more bits already.
    """
    kind = options.kind
    if kind == SKIP or model.quantization is None:
        return kind
    if _is_int8(model):
        if kind not in (AUTO, "int4"):
            raise UserError(
                f"--via-sd-slim is {kind!r}, but the weights of {model.model} have eight bits "
                f"already ({model.quantization}); give int4, which has fewer, or skip."
            )
        return kind
    if kind != AUTO:
        raise UserError(
            f"--via-sd-slim is {kind!r}, but the weights of {model.model} are quantised already "
            f"({model.quantization}), and int4 copies are made of compressed-tensors weights in "
            "eight bits only; give skip."
        )
    logger.info(
        "VIA-SD: the weights of %s are quantised already (%s), so the slim verifier skips layers",
        model.model,
        model.quantization,
    )
    return SKIP


def _is_int8(model: Any) -> bool:
    """Whether all quantised layers have integer weights and activations in eight bits, as
    compressed-tensors stores them, and nothing is turned around them."""
    if model.quantization != "compressed-tensors":
        return False
    config = getattr(model.hf_config, "quantization_config", None) or {}
    groups = [*config.get("config_groups", {}).values()]
    return bool(groups) and not config.get("transform_config") and all(map(_is_int8_group, groups))


def _is_int8_group(group: Any) -> bool:
    parts = [group.get("weights") or {}, group.get("input_activations") or {}]
    # Eight integer bits are the default.
    return all(
        part and part.get("num_bits", 8) == 8 and part.get("type", "int") == "int" for part in parts
    )


def _as_given(engine_args: Any) -> Any:
    """Engine arguments in the shape of the configuration that vLLM makes of them: most keep their
    names, whichever part they go to."""
    return SimpleNamespace(
        parallel_config=engine_args,
        scheduler_config=engine_args,
        cache_config=engine_args,
        attention_config=engine_args.attention_config,
        structured_outputs_config=engine_args.structured_outputs_config,
        model_config=SimpleNamespace(runner_type=engine_args.runner),
        offload_config=SimpleNamespace(
            offload_backend=engine_args.offload_backend, prefetch=engine_args
        ),
        kv_transfer_config=engine_args.kv_transfer_config,
        watermark_config=engine_args.watermark_config,
        lora_config=engine_args.enable_lora or None,
    )


def instead_of(
    error: Exception, engine_args: Any, make: Callable[[Any], "VllmConfig"]
) -> Exception | None:
    """What to raise instead of an error of vLLM's own at a start with VIA-SD, whose words may be
    about numbers that `prepared` put there; None for the error itself.

    Args:
        engine_args: as the user gave them.
        make: vLLM's own way from engine arguments to a configuration.
    """
    options = ViaSDOptions.from_config(engine_args.additional_config)
    if options is None:
        return None
    plain = copy.copy(engine_args)
    plain.additional_config = {
        key: value for key, value in engine_args.additional_config.items() if not is_own(key)
    }
    if plain.async_scheduling is None:
        plain.async_scheduling = False
    try:
        vllm_config = make(plain)
    except Exception as other:  # noqa: BLE001 - the same mistake, in terms of what was given
        return other
    try:
        refuse_unsupported(vllm_config)
        check_architecture(vllm_config.model_config)
        if vllm_config.speculative_config is not None:
            check_drafter(vllm_config.speculative_config)
    except UserError as refusal:
        return refusal
    changed = f"--via-sd-window is {options.window}, which is num_speculative_tokens to vLLM"
    if vllm_config.use_v2_model_runner:
        changed += ", on Model Runner V1"
    return UserError(
        f"{changed}, and vLLM refuses this start with it, not without --via-sd "
        f"({_one_line(error)}); give another window or change what it says, or remove --via-sd."
    )


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ValidationError):
        text = "; ".join(line["msg"].removeprefix("Value error, ") for line in error.errors())
    return (" ".join(text.split()) or type(error).__name__).rstrip(".")


def _check_weights(spec: str, mask: "MaskFile", vllm_config: "VllmConfig") -> None:
    """The sizes are the target's, but they may be those of a fine-tune, or of another model."""
    from vllm_nvium.model_executor.via_sd.mask import layer_list
    from vllm_nvium.weights import checkpoint_name, fingerprint

    model = vllm_config.model_config
    folder = vllm_config.load_config.download_dir
    here = fingerprint(model.model, mask.num_layers, model.revision, folder)
    if mask.weights is not None and here is not None:
        if mask.weights != here:
            raise UserError(
                f"--via-sd-mask is {spec!r}, which was searched for {mask.model!r}, and the "
                f"weights of {model.model!r} are others: search a mask for this target with "
                f"`vllm-nvium search-mask`, or give `--via-sd-mask {layer_list(mask.skipped)}` if "
                "it is a fine-tune, or the same model in another dtype, that shall skip the same "
                "layers."
            )
    elif checkpoint_name(mask.model) != checkpoint_name(model.model):
        logger.warning(
            "--via-sd-mask %s was searched for %s and is used for %s, which has the same sizes: "
            "right for a fine-tune or another folder of the same model, and slow for another one",
            spec,
            mask.model,
            model.model,
        )


def _with_short_flags(engine_args: Any) -> dict[str, Any]:
    """`--speculative-config` with what `--spec-method`, `--spec-model` and `--spec-tokens` add."""
    given = engine_args.speculative_config or {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UserError(
            f"--speculative-config is {shown(given)}; it must be a JSON object, as "
            '\'{"method": "ngram", "num_speculative_tokens": 4}\'.'
        )
    # As vLLM reads them.
    spec = {key.replace("-", "_"): value for key, value in given.items()}
    for name, key in SHORT_FLAGS.items():
        value = getattr(engine_args, name)
        if value is None:
            continue
        if key in spec:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {value!r} and --speculative-config has {key} {spec[key]!r}; give one "
                "of them."
            )
        spec[key] = value
    return spec


def _speculative_config(given: Any, options: ViaSDOptions) -> tuple[dict[str, Any], int]:
    if not given:
        most = max(min(DEFAULT_DRAFTS, options.window - int(options.rounds != 0)), 1)
        given = DEFAULT_DRAFTER | {"num_speculative_tokens": most}
    spec = dict(given)
    method = spec.get("method") or ("draft_model" if spec.get("model") else None)
    if method not in METHODS:
        raise UserError(
            f"--speculative-config has method {method!r}, and VIA-SD works with "
            f"{', '.join(METHODS)}."
        )
    drafts = spec.get("num_speculative_tokens")
    if not isinstance(drafts, int) or isinstance(drafts, bool) or drafts < 1:
        raise UserError(
            f"--speculative-config has num_speculative_tokens {drafts!r}, and VIA-SD needs the "
            "most tokens that the drafter proposes at a time, an integer >= 1."
        )
    if "num_speculative_tokens_per_batch_size" in spec:
        raise UserError(
            "--speculative-config has num_speculative_tokens_per_batch_size, but VIA-SD chooses "
            "the number of drafts itself; remove it."
        )
    # Before vLLM compares the lengths of its rates with the window.
    check_rejection(spec.get("rejection_sample_method", "standard"))
    return spec | {"num_speculative_tokens": options.window}, drafts


def _worker_class() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda_alike():
        return GPU_WORKER
    raise UserError(
        f"--via-sd is on, but VIA-SD has workers for CPU and CUDA only and this is "
        f"{current_platform.device_name!r}; remove it."
    )
