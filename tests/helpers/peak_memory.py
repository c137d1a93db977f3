# SPDX-License-Identifier: Apache-2.0
"""Prints how many MiB of tensors one request with log-probabilities of its whole prompt has at
once, beside what the engine keeps: `peak_memory.py CHECKPOINT`."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from torch.profiler import ProfilerActivity, profile
from vllm import LLM, SamplingParams

TOKENS = 1500


def peak(profiled: profile) -> int:
    """Most bytes allocated at once. What torch's allocator was asked for, not the process's size:
    that depends on what the start left behind and on what malloc gives back."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]"]
    changes.sort(key=lambda e: e["ts"])
    held, most = 0, 0
    for change in changes:
        held += change["args"]["Bytes"]
        most = max(most, held)
    return most


def main() -> None:
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=4,
        block_size=32,
        num_gpu_blocks_override=80,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompt = {"prompt_token_ids": [7 + i % 900 for i in range(TOKENS)]}
    llm.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=1), use_tqdm=False)
    sys.stdout.write(f"PEAK {peak(profiled) >> 20}\n")


if __name__ == "__main__":
    main()
