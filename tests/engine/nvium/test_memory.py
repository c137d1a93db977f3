# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a long prompt need several heads at each of its positions. They take no more
than twice the memory of a dense model, for which vLLM has planned."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tiny_models import make_dense, make_nvium

SCRIPT = Path(__file__).parents[2] / "helpers" / "peak_memory.py"
# A vocabulary that makes the logits large beside everything else.
SIZES = {"vocab_size": 32000, "max_position_embeddings": 2048, "initializer_range": 0.02}


def added_by_prompt_logprobs(path: Path) -> int:
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = re.search(r"PEAK (\d+)", run.stdout)
    assert found, run.stdout[-2000:] + run.stderr[-2000:]
    return int(found[1])


def test_prompt_logprobs_take_at_most_twice_a_dense_models_memory(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense", **SIZES)
    make_nvium(tmp_path / "nvium", exit_layers=[1, 2, 3], **SIZES)
    dense, nvium = (added_by_prompt_logprobs(tmp_path / name) for name in ("dense", "nvium"))
    # [1500, 32000] float32 is 183 MiB, of which vLLM's own sampler needs two.
    assert dense > 180
    assert nvium <= 2 * dense
