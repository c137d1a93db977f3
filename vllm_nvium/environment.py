# SPDX-License-Identifier: Apache-2.0
"""The environment that a process of vLLM starts best in: on CPU it is faster with libraries that it
asks for in its log, and would otherwise take a share of the machine's memory."""

import glob
import sys
from collections.abc import Mapping
from pathlib import Path


def environment_for(checkpoint: Path | str, base: Mapping[str, str]) -> dict[str, str]:
    """The environment vLLM should start in with a checkpoint of the demo; what is set already stays
    as it is."""
    environment = with_libraries(base)
    if Path(checkpoint).is_dir():
        environment.setdefault("HF_HUB_OFFLINE", "1")
    return environment


def with_libraries(base: Mapping[str, str]) -> dict[str, str]:
    """The environment for any checkpoint; what is set already stays as it is."""
    environment = dict(base)
    # The CPU build would otherwise take a share of the machine's memory; GPUs ignore it.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    libraries = preload_libraries()
    if libraries and not environment.get("LD_PRELOAD"):
        environment["LD_PRELOAD"] = ":".join(libraries)
    return environment


def preload_libraries() -> list[str]:
    """Intel OpenMP (installed with vllm-cpu) and tcmalloc, where they exist: vLLM's CPU worker
    is faster with them and asks for them in its log."""
    patterns = (
        f"{sys.prefix}/lib/libiomp5.so",
        "/usr/lib/*/libtcmalloc_minimal.so.4",
        "/usr/lib*/libtcmalloc_minimal.so.4",
    )
    found = [matches[0] for pattern in patterns if (matches := sorted(glob.glob(pattern)))]
    return list({Path(path).name: path for path in found}.values())
