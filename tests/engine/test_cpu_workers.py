# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CPU build needs from our workers before a model runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BFLOAT16_START = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], dtype="bfloat16", max_model_len=64, enforce_eager=True,
        num_gpu_blocks_override=8, gpu_memory_utilization=0.3,
        speculative_config={"method": "ngram", "prompt_lookup_max": 2, "num_speculative_tokens": 2},
        additional_config={"via_sd": True, "via_sd_mask": "1"},
    )
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    output, = llm.generate([{"prompt_token_ids": [2, 2, 2, 2]}], params)
    assert len(output.outputs[0].token_ids) == 4
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_a_model_too_small_for_onednn_runs_in_bfloat16(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Its attention is the first to use AMX, which a process has to ask for."""
    script = tmp_path / "start.py"
    script.write_text(BFLOAT16_START)
    done = subprocess.run(
        [sys.executable, str(script), str(dense_checkpoint)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
