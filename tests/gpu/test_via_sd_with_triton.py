# SPDX-License-Identifier: Apache-2.0
"""VIA-SD where vLLM would choose Model Runner V2 and nobody has said otherwise, as in vLLM's own
image for CPUs, which has Triton."""

import pytest
import triton_interpreter


@pytest.mark.timeout(900)
def test_model_runner_v1_is_chosen_and_works() -> None:
    variables = triton_interpreter.env()
    del variables["VLLM_USE_V2_MODEL_RUNNER"]
    said = triton_interpreter.run_checks("check_via_sd_with_triton.py", variables)
    assert " passed" in said and " skipped" not in said
