# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own, timed on command, so that several models can take turns
on one machine. Commands and answers are JSON lines on a pair of pipes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class EngineProcess:
    """The other end: starts a worker for one model and asks it for timings."""

    def __init__(self, name: str, model: str, engine_args: dict[str, Any]) -> None:
        self.name = name
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        command = [sys.executable, str(Path(__file__)), "--model", model]
        command += ["--engine-args", json.dumps(engine_args)]
        command += ["--read", str(down_read), "--write", str(up_write)]
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
        self.process = subprocess.Popen(
            command, pass_fds=(down_read, up_write), env=environment, stdout=subprocess.DEVNULL
        )
        os.close(down_read)
        os.close(up_write)
        self._out, self._in = os.fdopen(down_write, "w"), os.fdopen(up_read)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._in.readline()
        if not line:
            raise SystemExit(f"{self.name}: the engine process ended; run it alone to see why")
        return json.loads(line)

    def measure(self, **command: Any) -> dict[str, Any]:
        """Runs one batch; see `Worker.measure` for what goes in and comes back."""
        self._out.write(json.dumps(command) + "\n")
        self._out.flush()
        return self._answer()

    def close(self) -> None:
        self._out.close()
        self.process.wait(timeout=60)


class Worker:
    def __init__(self, model: str, engine_args: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.engine = LLMEngine.from_engine_args(EngineArgs(model=model, **engine_args))
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.count = 0

    def measure(
        self, prompts: list[int], new_tokens: int, temperature: float, seed: int
    ) -> dict[str, Any]:
        """Times one batch of random prompts, whose lengths are given.

        Returns:
            prefill: seconds until every request has its first token; started: new tokens by then;
            decode: seconds from there to the end; tokens: new tokens in that part.
        """
        from vllm import SamplingParams

        draw = random.Random(seed)
        for i, prompt_length in enumerate(prompts):
            prompt = [draw.randrange(10, self.vocabulary - 10) for _ in range(prompt_length)]
            params = SamplingParams(
                temperature=temperature,
                seed=seed * 1000 + i if temperature else None,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        lengths: dict[str, int] = {}
        start = first = time.perf_counter()
        started_tokens = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            if len(lengths) == len(prompts) and not started_tokens:
                first, started_tokens = time.perf_counter(), sum(lengths.values())
        end = time.perf_counter()
        tokens = sum(lengths.values()) - started_tokens
        return {
            "prefill": first - start,
            "started": started_tokens,
            "decode": end - first,
            "tokens": tokens,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--read", type=int, required=True)
    parser.add_argument("--write", type=int, required=True)
    args = parser.parse_args()
    worker = Worker(args.model, args.engine_args)
    with os.fdopen(args.read) as commands, os.fdopen(args.write, "w") as answers:
        print("{}", file=answers, flush=True)
        for line in commands:
            print(json.dumps(worker.measure(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
