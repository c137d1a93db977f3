# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2, the one that GPUs use, held against the reference model. It runs on CPU under
Triton's interpreter, in a process prepared for that (`triton_interpreter/`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton_interpreter

TESTS = Path(__file__).resolve().parent


@pytest.mark.timeout(1200)
def test_against_the_reference() -> None:
    checks = TESTS / "triton_interpreter" / "check_model_runner_v2.py"
    variables = triton_interpreter.env() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env=variables,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout
