# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of a checkpoint from a vLLM engine, in a process of its own or of the caller's.

Run as `python generate_greedy.py MODEL OUT`, it uses vLLM's default compilation and writes JSON.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 128


def prompts(vocab_size: int = 256) -> list[list[int]]:
    """Eight prompts of 1 to 75 tokens, the same in every process."""
    generator = random.Random(0)
    lengths = [5, 1, 17, 32, 33, 64, 75, 8]
    return [[generator.randrange(3, vocab_size) for _ in range(n)] for n in lengths]


def greedy_tokens(model: str, **engine_args: Any) -> dict[str, list[list[int]]]:
    """128 tokens a prompt: `alone` the first by itself, `together` all eight in one batch."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    # Groups of ranks that an earlier engine of this process has left have none for experts.
    cleanup_dist_env_and_memory()
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        num_gpu_blocks_override=128,
        # A hit would leave the second run less to compute, and so less to compare.
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
        **engine_args,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    all_prompts = [{"prompt_token_ids": prompt} for prompt in prompts()]

    def run(some: list[Any]) -> list[list[int]]:
        outputs = llm.generate(some, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return {"alone": [run([prompt])[0] for prompt in all_prompts[:1]], "together": run(all_prompts)}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    Path(sys.argv[2]).write_text(json.dumps(greedy_tokens(sys.argv[1])))
