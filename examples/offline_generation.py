# SPDX-License-Identifier: Apache-2.0
"""Generate for a batch of prompts with an N-vium checkpoint, one request with another sampling law.
The plugin is loaded by vLLM itself: nothing of this package is imported here.

    python examples/offline_generation.py CHECKPOINT [--sampling mixture] [--max-deferred 64]
"""

import argparse

from vllm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "In one sentence, a hash table is",
    "def fibonacci(n):",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder or hub id of an N-vium checkpoint")
    parser.add_argument("--sampling", choices=("routed", "mixture"), default="routed")
    parser.add_argument("--max-deferred", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args()

    # Options of the engine: `vllm serve` calls them --nvium-sampling and --nvium-max-deferred.
    options = {"nvium_sampling": args.sampling}
    if args.max_deferred is not None:
        options["nvium_max_deferred"] = args.max_deferred
    llm = LLM(args.checkpoint, additional_config=options, enforce_eager=args.enforce_eager)

    # Options of one request: here the last prompt is drawn from the mixture whatever the engine's
    # default is. With a seed, a request's output does not depend on the rest of the batch, but for
    # the rounding of matrix products.
    params = [
        SamplingParams(
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            seed=17,
            extra_args={"nvium_sampling": "mixture"} if i == len(PROMPTS) - 1 else None,
        )
        for i in range(len(PROMPTS))
    ]
    for output in llm.generate(PROMPTS, params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


# vLLM starts its engine in a process that imports this file again.
if __name__ == "__main__":
    main()
