# SPDX-License-Identifier: Apache-2.0
"""Offline generation with VIA-SD: the target at low precision drafts for itself and checks what a
drafter proposes before the target verifies it. The text is the same as without any of it.

    python examples/via_sd_offline.py MODEL [--slim int4] [--mask even:0.2] [--drafter DRAFT_MODEL]
"""

import argparse

from vllm import LLM, SamplingParams

from vllm_nvium import ViaSDOptions

PROMPTS = [
    "def fibonacci(n):\n",
    "Repeat after me: the cat sat on the mat, the cat sat on the mat, the cat sat on",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--slim", help="auto, int4, int8, fp8 or skip")
    parser.add_argument("--mask", help="layers that the slim verifier skips")
    parser.add_argument("--drafter", default="", help="a draft model (default: n-gram lookup)")
    args = parser.parse_args()
    drafter = None
    if args.drafter:
        drafter = {"method": "draft_model", "model": args.drafter, "num_speculative_tokens": 4}
    llm = LLM(
        model=args.model,
        speculative_config=drafter,
        additional_config=ViaSDOptions(slim=args.slim, mask=args.mask).to_config(),
        max_model_len=1024,
        disable_log_stats=False,
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=64)):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))
    for metric in llm.get_metrics():
        if "via_sd" in metric.name:
            print(metric.name, getattr(metric, "value", ""))


# vLLM starts its engine in a process that imports this file again.
if __name__ == "__main__":
    main()
