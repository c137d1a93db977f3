# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2, the one that GPUs use, held against the reference model. It runs on CPU under
Triton's interpreter, in a process prepared for that (`triton_interpreter/`)."""

import pytest
import triton_interpreter


@pytest.mark.timeout(1200)
def test_against_the_reference() -> None:
    variables = triton_interpreter.env() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    said = triton_interpreter.run_checks("check_model_runner_v2.py", variables)
    assert " skipped" not in said
