# SPDX-License-Identifier: Apache-2.0
"""Environment in which vLLM's CPU build uses Model Runner V2, with Triton's kernels interpreted.
Slow (about six times a step of V1), but the code that runs is the one that GPUs run."""

import os
from collections.abc import Mapping
from pathlib import Path


def env(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for a process that runs Model Runner V2 on CPU.

    They must be set when that process starts: `sitecustomize.py` beside this file prepares Triton
    before anything imports vLLM. Processes that it spawns inherit them.

    Args:
        base: what to start from, `os.environ` by default.
    """
    variables = dict(os.environ if base is None else base)
    here = str(Path(__file__).resolve().parent)
    path = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = here + (os.pathsep + path if path else "")
    variables["TRITON_INTERPRET"] = "1"
    variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return variables
