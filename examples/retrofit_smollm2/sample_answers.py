# SPDX-License-Identifier: Apache-2.0
"""Lets the dense parent answer the prompts of every part that prepare_text.py wrote, so that its
own answers are trained on and measured like any other text.

    python examples/retrofit_smollm2/sample_answers.py DENSE TEXT
"""

import argparse
from pathlib import Path

from vllm_nvium.checkpoints.train.distill import self_distill

# New tokens; the answers of training are a third of what a run sees.
TOKENS = {"valid": 12_000, "test": 12_000, "train": 180_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", help="folder of the dense model")
    parser.add_argument("text", type=Path, help="folder that prepare_text.py wrote")
    args = parser.parse_args()
    for seed, (part, tokens) in enumerate(TOKENS.items()):
        prompts = str(args.text / part / "prompts.jsonl")
        out = args.text / part / "answers.jsonl"
        self_distill(args.dense, out, tokens, prompt_files=[prompts], seed=seed)


if __name__ == "__main__":
    main()
