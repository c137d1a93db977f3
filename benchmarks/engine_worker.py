# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own that takes one timed step at a time, so that several
models can take turns on one machine. Commands and answers are JSON lines on a pair of pipes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


class EngineProcess:
    """The other end: starts a worker for one model and asks it for timings.

    Args:
        checkout: folder whose `vllm_nvium` the worker imports; None for the one that is installed.
    """

    def __init__(
        self, name: str, model: str, engine_args: dict[str, Any], checkout: Path | None = None
    ) -> None:
        self.name = name
        # Several engines share the machine. On CPU this is only what must be free at the start.
        engine_args = {"gpu_memory_utilization": 0.2} | engine_args
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        command = [sys.executable, str(Path(__file__)), "--model", model]
        command += ["--engine-args", json.dumps(engine_args)]
        command += ["--read", str(down_read), "--write", str(up_write)]
        environment = os.environ | {
            "VLLM_LOGGING_LEVEL": "ERROR",
            # The engine in the worker itself: only then is a step something that can be asked for.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Intel OpenMP's threads spin for 200 ms after their work unless told otherwise (vLLM
            # tells its own worker processes 5): here they would spin on the next engine's turn.
            "KMP_BLOCKTIME": "1",
        }
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout.resolve())
        self.process = subprocess.Popen(
            command, pass_fds=(down_read, up_write), env=environment, stdout=subprocess.DEVNULL
        )
        os.close(down_read)
        os.close(up_write)
        self._out, self._in = os.fdopen(down_write, "w"), os.fdopen(up_read)
        package = Path(self._answer()["package"]).resolve()
        if checkout is not None and checkout.resolve() not in package.parents:
            raise SystemExit(f"{name}: the engine runs {package}, not what is in {checkout}")

    def _answer(self) -> dict[str, Any]:
        line = self._in.readline()
        if not line:
            raise SystemExit(f"{self.name}: the engine process ended; run it alone to see why")
        return json.loads(line)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self._out.write(json.dumps(command) + "\n")
        self._out.flush()
        return self._answer()

    def begin(self, **batch: Any) -> None:
        """Hands the engine one batch; see `Worker.begin`."""
        self._ask(batch)

    def step(self) -> dict[str, Any]:
        """One engine step; see `Worker.step` for what comes back."""
        return self._ask({})

    def via_sd(self) -> dict[str, Any]:
        """Counts of a VIA-SD engine since its start and its planner's view; empty of another."""
        return self._ask({"via_sd": True})

    def close(self) -> None:
        self._out.close()
        self.process.wait(timeout=60)


def steps_in_turn(
    engines: Sequence[EngineProcess], whole: bool = False
) -> Iterator[tuple[EngineProcess, dict[str, Any]]]:
    """Runs what engines have begun, an engine step of each in turn, until all are done.

    Args:
        whole: all steps of one engine, then of the next. VIA-SD's `auto` plans by the time between
            its steps too, and would take the steps of others for its own overhead.

    Yields:
        an engine and what `EngineProcess.step` said.
    """
    todo = list(engines)
    while todo:
        for engine in list(todo):
            unfinished = True
            while unfinished:
                step = engine.step()
                yield engine, step
                unfinished = step["unfinished"]
                if not whole:
                    break
            if not unfinished:
                todo.remove(engine)
        todo = todo[1:] + todo[:1]  # nobody always follows the same engine


class Worker:
    def __init__(self, model: str, engine_args: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.engine = LLMEngine.from_engine_args(EngineArgs(model=model, **engine_args))
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.count = 0

    def begin(
        self,
        prompts: list[Any],
        new_tokens: int,
        temperature: float,
        seed: int,
        seeded: bool = True,
        extra_args: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds one batch of prompts, token ids or the lengths of random ones; nothing runs yet.

        Args:
            seeded: sampled requests name a seed.
            extra_args: of every request, as `vllm_xargs` over HTTP.
        """
        from vllm import SamplingParams

        draw = random.Random(seed)
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, int):
                prompt = [draw.randrange(10, self.vocabulary - 10) for _ in range(prompt)]
            params = SamplingParams(
                temperature=temperature,
                seed=seed * 1000 + i if temperature and seeded else None,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra_args,
            )
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        self.waiting = len(prompts)
        self.lengths: dict[str, int] = {}
        self.texts: dict[str, list[int]] = {}
        return {}

    def step(self) -> dict[str, Any]:
        """One engine step.

        Returns:
            seconds: what it took; tokens: new tokens of all requests; prefill: whether some
            request had no token before it; unfinished: whether there is more to do; depth: the
            segments that an N-vium model ran, 0 of another.
        """
        prefill = len(self.lengths) < self.waiting
        before = sum(self.lengths.values())
        start = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        for output in outputs:
            self.texts[output.request_id] = list(output.outputs[0].token_ids)
            self.lengths[output.request_id] = len(self.texts[output.request_id])
        return {
            "seconds": seconds,
            "tokens": sum(self.lengths.values()) - before,
            "prefill": prefill,
            "unfinished": self.engine.has_unfinished_requests(),
            "depth": self.engine.collective_rpc(_depth_of_last_step)[0],
        }


def _via_sd(worker: Any) -> dict[str, Any]:
    runner = worker.model_runner
    if not hasattr(runner, "session"):
        return {}
    snapshot = getattr(runner.session.planner, "snapshot", dict)()
    return {"counts": asdict(runner.session.counts), "planner": snapshot}


def _depth_of_last_step(worker: Any) -> int:
    step = getattr(worker.model_runner, "nvium_step", None)
    return 0 if step is None else step.depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--read", type=int, required=True)
    parser.add_argument("--write", type=int, required=True)
    args = parser.parse_args()
    worker = Worker(args.model, args.engine_args)
    import vllm_nvium

    with os.fdopen(args.read) as commands, os.fdopen(args.write, "w") as answers:
        print(json.dumps({"package": vllm_nvium.__file__}), file=answers, flush=True)
        for line in commands:
            command = json.loads(line)
            if "via_sd" in command:
                answer = worker.engine.collective_rpc(_via_sd)[0]
            else:
                answer = worker.begin(**command) if command else worker.step()
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
