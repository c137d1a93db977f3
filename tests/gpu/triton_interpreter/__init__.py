# SPDX-License-Identifier: Apache-2.0
"""Environment in which vLLM's CPU build uses Model Runner V2, with Triton's kernels interpreted.
Slow (about six times a step of V1), but the code that runs is the one that GPUs run."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent


def env(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for a process that runs Model Runner V2 on CPU.

    They must be set when that process starts: `sitecustomize.py` beside this file prepares Triton
    before anything imports vLLM. Processes that it spawns inherit them.

    Args:
        base: what to start from, `os.environ` by default.
    """
    variables = dict(os.environ if base is None else base)
    path = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = str(HERE) + (os.pathsep + path if path else "")
    variables["TRITON_INTERPRET"] = "1"
    variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return variables


def run_checks(file: str, variables: Mapping[str, str]) -> str:
    """Runs tests of a file of this folder in a process of their own, and fails with what they say.

    Args:
        variables: its environment, made from `env()`.

    Returns:
        what pytest printed.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        env=dict(variables),
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return run.stdout
