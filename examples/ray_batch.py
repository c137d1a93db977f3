# SPDX-License-Identifier: Apache-2.0
"""Ray Data by hand: an N-vium model as a stage of a pipeline of one's own. `vllm-nvium batch` is
for files of requests; this is for data that is already in Ray.

    pip install '.[ray]'
    python examples/ray_batch.py MODEL [--replicas 2] [--sampling mixture]
"""

import argparse
import os
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from vllm.platforms import current_platform

QUESTIONS = ["What is a river?", "What is a mountain?", "What is the sea?", "What is a lake?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--sampling", choices=("routed", "mixture"), default="routed")
    parser.add_argument("--max-model-len", type=int, default=512)
    args = parser.parse_args()

    on_cpu: dict[str, Any] = {}
    if current_platform.is_cpu():
        # Every replica would bind its threads to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        on_cpu = {"placement_group_config": {"bundles": [{"CPU": 1}]}}
    # One core more than the replicas take, for what stands before and behind them.
    ray.init(num_cpus=args.replicas + 1, include_dashboard=False)
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={
            "max_model_len": args.max_model_len,
            "enforce_eager": True,
            # Ray makes the engine's arguments before vLLM loads its plugins, and knows no
            # `nvium_sampling=` then; what is in here is read later.
            "additional_config": {"nvium_sampling": args.sampling},
        },
        concurrency=(args.replicas, args.replicas),
        batch_size=2,
        # A row that fails gets an `__inference_error__`, and its postprocess is left out.
        should_continue_on_error=True,
        # Otherwise an engine needs all of ray[serve].
        log_engine_metrics=False,
        **on_cpu,
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        # Rows become columns: a key that only some have is None in the others, which is "not
        # given" to N-vium and VIA-SD. An integer of some rows only would become a float.
        extra = {"nvium_sampling": "mixture" if row["id"] % 2 else None}
        return {
            "messages": [{"role": "user", "content": row["question"]}],
            "sampling_params": {"max_tokens": 16, "seed": row["id"], "extra_args": extra},
        }

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "question": row["question"], "answer": row["generated_text"]}

    rows = [{"id": number, "question": text} for number, text in enumerate(QUESTIONS)]
    answers = build_processor(config, preprocess=ask, postprocess=keep)(ray.data.from_items(rows))
    for row in sorted(answers.take_all(), key=lambda row: row["id"]):
        print(repr(row["question"]), "->", repr(row.get("answer") or row["__inference_error__"]))


if __name__ == "__main__":
    main()
