# SPDX-License-Identifier: Apache-2.0
"""What a mask is worth in vLLM: tokens per second of VIA-SD. Every mask gets an engine in a process
of its own, which is this module run as a program."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from vllm_nvium.errors import UserError, first_line
from vllm_nvium.model_executor.via_sd import DEFAULT_WINDOW
from vllm_nvium.model_executor.via_sd.mask import layer_list

# GiB of the engine's KV cache on a CPU, unless the environment says something else: vLLM would take
# most of the memory, and refuse to start where other processes use some of it.
CPU_KV_CACHE = "2"
# Slim checks in every window. With `auto`, an engine would stop using a slim verifier that does not
# pay, and all such masks would be as fast as plain decoding.
ROUNDS, WINDOW = 2, DEFAULT_WINDOW
# The median of this many runs counts.
TIMED_RUNS = 3


@dataclass(frozen=True)
class SpeedRun:
    """What is generated to measure a mask's speed.

    Attributes:
        target: checkpoint of the full model.
        drafter: checkpoint of the draft model; `None` for n-gram drafts.
        prompts: token ids.
        new_tokens: generated after each prompt, whatever they are (eos does not end a text).
        dtype: vLLM's `dtype`.
        drafts: tokens drafted at a time, the paper's gamma.
    """

    target: str
    drafter: str | None
    prompts: list[list[int]]
    new_tokens: int
    dtype: str
    drafts: int = 5


def measure_speed(run: SpeedRun, skipped: tuple[int, ...]) -> float:
    """Tokens per second that VIA-SD generates greedily with a mask, all prompts at once."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"run": asdict(run), "skipped": skipped}))
        child = subprocess.run(
            [sys.executable, "-m", __name__, str(request), str(answer)],
            env={"VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE} | os.environ,
            capture_output=True,
            text=True,
            errors="replace",
        )
        found = json.loads(answer.read_text()) if answer.is_file() else {}
    if "tokens_per_second" not in found:
        last = (child.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        why = found.get("error") or last
        raise UserError(
            f"vLLM stopped with status {child.returncode} while the speed without layers "
            f"{layer_list(skipped)} was measured ({why.rstrip('.')})."
        )
    return float(found["tokens_per_second"])


def main(argv: Sequence[str]) -> None:
    """The engine's process: reads the request's file, writes the answer's."""
    # The engine's core in this process: an error of it is then raised here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request = json.loads(Path(argv[0]).read_text())
    answer: dict[str, Any]
    try:
        answer = {"tokens_per_second": _generate(SpeedRun(**request["run"]), request["skipped"])}
    except ValidationError as error:  # of vLLM's configuration; its text is a list
        answer = {
            "error": str(error.errors()[0]["msg"]).removeprefix("Value error, ").split("\n")[0]
        }
    except Exception as error:  # noqa: BLE001 - the parent shows it, whatever it is
        answer = {"error": first_line(error)}
    Path(argv[1]).write_text(json.dumps(answer))
    raise SystemExit("error" in answer)


def _generate(run: SpeedRun, skipped: Sequence[int]) -> float:
    """New tokens per second. A first run, in which everything is compiled, is not timed."""
    from vllm import LLM, SamplingParams

    drafter: dict[str, Any] = {"num_speculative_tokens": run.drafts}
    if run.drafter is None:
        drafter |= {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    else:
        drafter |= {"method": "draft_model", "model": run.drafter}
    llm = LLM(
        run.target,
        dtype=run.dtype,
        # vLLM drafts nothing where a whole window would not fit.
        max_model_len=max(map(len, run.prompts)) + run.new_tokens + WINDOW,
        enable_prefix_caching=False,
        speculative_config=drafter,
        additional_config={
            "via_sd": True,
            "via_sd_mask": layer_list(skipped),
            "via_sd_rounds": ROUNDS,
            "via_sd_window": WINDOW,
        },
    )
    if not llm.llm_engine.vllm_config.parallel_config.worker_cls.startswith("vllm_nvium."):
        raise UserError("VLLM_PLUGINS leaves vllm-nvium out, and without it there is no VIA-SD")
    sampling = SamplingParams(temperature=0.0, max_tokens=run.new_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in run.prompts]
    llm.generate(prompts, sampling, use_tqdm=False)
    speeds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(speeds)


if __name__ == "__main__":
    main(sys.argv[1:])
