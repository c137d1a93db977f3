# SPDX-License-Identifier: Apache-2.0
"""VIA-SD where vLLM would choose Model Runner V2 and nobody has said otherwise, as in vLLM's own
image for CPUs, which has Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton_interpreter

TESTS = Path(__file__).resolve().parent


@pytest.mark.timeout(900)
def test_model_runner_v1_is_chosen_and_works() -> None:
    checks = TESTS / "triton_interpreter" / "check_via_sd_with_triton.py"
    variables = triton_interpreter.env()
    del variables["VLLM_USE_V2_MODEL_RUNNER"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env=variables,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout
