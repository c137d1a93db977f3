# SPDX-License-Identifier: Apache-2.0
"""Prints by how many MiB one request with log-probabilities of its whole prompt raises the peak
memory of this process: `peak_memory.py CHECKPOINT`."""

import os
import resource
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

TOKENS = 1500


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


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
    before = peak()
    llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=1), use_tqdm=False)
    sys.stdout.write(f"PEAK {peak() - before}\n")


if __name__ == "__main__":
    main()
