# SPDX-License-Identifier: Apache-2.0
"""An N-vium model named as the drafter of another model is refused where the start is asked for.
vLLM looks at a drafter only when a worker loads it, after the target."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.errors import UserError
from vllm_nvium.nvium.options import ARCHITECTURE, PREFIX, is_nvium

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_nvium_drafter(engine_args: Any) -> None:
    """Refuse what is known of the drafter before vLLM has made its configuration, which has checks
    of its own (vocabulary, method) that speak of other things.

    Raises:
        UserError: one sentence.
    """
    spec = engine_args.speculative_config
    if not isinstance(spec, dict):
        spec = {}
    drafter = spec.get("model") or engine_args.spec_model
    if not isinstance(drafter, str) or not _is_nvium_checkpoint(drafter, spec.get("revision")):
        return
    # Of an N-vium model, any drafter is refused with a sentence about the model.
    if not _is_nvium_checkpoint(engine_args.model, engine_args.revision):
        raise _refusal(drafter)


def check_drafter(vllm_config: "VllmConfig") -> None:
    """The same, of a configuration, for drafters that vLLM had to fetch first.

    Raises:
        UserError: one sentence.
    """
    spec = vllm_config.speculative_config
    drafter = spec.draft_model_config if spec is not None else None
    if drafter is None or is_nvium(vllm_config):
        return
    if _names_nvium(drafter.hf_config.model_type, drafter.architectures):
        raise _refusal(drafter.model)


def _refusal(drafter: str) -> UserError:
    return UserError(
        f"--speculative-config names {drafter!r}, which is an N-vium model, but a drafter has to "
        "run all of its layers for each token; name a dense model, or remove it."
    )


def _names_nvium(model_type: Any, architectures: Any) -> bool:
    # vLLM calls an EAGLE head `EagleNviumForCausalLM`.
    names = architectures if isinstance(architectures, list) else []
    return model_type == PREFIX.rstrip("_") or any(ARCHITECTURE in str(name) for name in names)


def _is_nvium_checkpoint(model: str, revision: str | None) -> bool:
    """Whether a folder, or a model of the hub that is in its cache, is an N-vium checkpoint."""
    config = _config_file(model, revision)
    try:
        fields = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and _names_nvium(
        fields.get("model_type"), fields.get("architectures")
    )


def _config_file(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model, "config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
