# SPDX-License-Identifier: Apache-2.0
"""A copy of a checkpoint whose linear weights are a little off: a control for targets that come
out of 4-bit files, whose weights lie on a grid that flatters any 4-bit copy of them.

    python benchmarks/noisy_copy.py Qwen2.5-Coder-0.5B-Instruct OUT --noise 0.25
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_nvium.console import progress, say

# A 4-bit block of GGUF's Q4_K has so many weights and levels.
GROUP, LEVELS = 32, 16


def with_noise(weight: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Normal noise whose standard deviation is a share of the step of a 4-bit grid.

        w + noise step E,   step = (max - min) / 15 over each group of 32 of a row,   E ~ N(0, 1)

    Args:
        weight: [N, K], K a multiple of 32.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (LEVELS - 1)
    error = torch.randn(groups.shape, generator=generator)
    return (groups + noise * step * error).flatten(1).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint (Hugging Face folder)")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--noise", type=float, default=0.25, help="in steps of a 4-bit grid")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.copytree(args.source, args.out, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(args.seed)
    files = sorted(args.source.glob("*.safetensors"))
    with progress("Adding noise", len(files), "file") as bar:
        for file in files:
            weights = load_file(file)
            for name, weight in weights.items():
                # Embeddings too: a tied head is one of them.
                if weight.dim() == 2 and weight.shape[1] % GROUP == 0:
                    weights[name] = with_noise(weight, args.noise, generator)
            save_file(weights, args.out / file.name, metadata={"format": "pt"})
            bar.update(1)
    say(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
