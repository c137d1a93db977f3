# SPDX-License-Identifier: Apache-2.0
"""How much an exit at each depth of a dense model can know: every exit gets the linear map that
fits the final state best and is measured on other text. A retrofit starts there, and its exits are
chosen by it.

    python benchmarks/exit_depths.py DENSE --layers 10,12,14 --text train.txt --validation valid.txt
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from vllm_nvium.checkpoints.evaluate.measure import dense_top_tokens, evaluate_nvium
from vllm_nvium.checkpoints.text import load_blocks
from vllm_nvium.checkpoints.train.linear_start import start_linear
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import open_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("--layers", required=True, help="L1,L2,...")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--validation", nargs="+", required=True)
    parser.add_argument("--adapter-size", type=int, default=0, help="default: the hidden size")
    parser.add_argument("--fit-tokens", type=int, default=40_000)
    parser.add_argument("--tokens", type=int, default=8192, help="of the validation text")
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")]
    options = TrainOptions(
        model=args.dense, exit_layers=layers, adapter_size=args.adapter_size, dtype="bfloat16"
    )
    with tempfile.TemporaryDirectory() as folder:
        start = open_start(options, Path(folder))
    tokenizer, model = start.tokenizer, start.model
    fitted = load_blocks(args.text, tokenizer, 512, max_tokens=args.fit_tokens)
    measured = load_blocks(args.validation, tokenizer, 512, max_tokens=args.tokens)[:]["input_ids"]
    start_linear(model, (fitted[i : i + 4]["input_ids"] for i in range(0, len(fitted), 4)))
    parent = AutoModelForCausalLM.from_pretrained(args.dense, dtype=model.dtype)
    top = dense_top_tokens(parent, measured, 4)
    found = evaluate_nvium(model, measured, 4, parent_top=top)
    assert found.agreement is not None
    print("| layers run | agrees with the last layer | perplexity |\n|---|---|---|")
    depths = [*layers, model.config.num_hidden_layers]
    for depth, agreement, perplexity in zip(
        depths, found.agreement, found.head_perplexities, strict=True
    ):
        print(f"| {depth} | {agreement:.1%} | {perplexity:.1f} |")


if __name__ == "__main__":
    main()
