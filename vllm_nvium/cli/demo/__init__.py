# SPDX-License-Identifier: Apache-2.0
"""Run one real model plain, as N-vium and with --via-sd, and compare the three: text coloured by
where each token came from, speed, depth. Or start `vllm serve` with its N-vium twin."""

import argparse
import os
import time
from pathlib import Path

from vllm_nvium.cli.common import check_at_least
from vllm_nvium.cli.demo.checkpoint import Models, prepare
from vllm_nvium.cli.demo.report import Answer, Result, show_answer, shows_colours, summary
from vllm_nvium.cli.demo.runs import Run, answers_of, runs_of
from vllm_nvium.cli.demo.server import check_port, serve
from vllm_nvium.console import comma_separated, say, table
from vllm_nvium.engine.hooks import vllm_distribution
from vllm_nvium.environment import environment_for
from vllm_nvium.errors import UserError
from vllm_nvium.nvium.options import SAMPLING_LAWS

# `--help` shows these; --help-all the others too.
COMMON = (
    "--prompt",
    "--max-tokens",
    "--temperature",
    "--compile",
    "--serve",
    "--port",
    "--verbose",
)

PROMPTS = (
    "What is a mixture of experts, in one sentence?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three rivers in Europe.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="",
        help="folder or hub id, N-vium or dense (default: SmolLM2)",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--max-tokens", type=int, default=48, metavar="N", help="per prompt (default: 48)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of all runs (default: N-vium .5, else 0)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the model, which takes minutes (default: on GPUs)",
    )
    parser.add_argument(
        "--exits",
        type=comma_separated(int),
        default=(),
        metavar="L1,L2,..",
        help="exits of a conversion (default: evenly spaced; for SmolLM2 those that are trained)",
    )
    parser.add_argument(
        "--hazards",
        type=comma_separated(float),
        default=(),
        metavar="H1,H2,..",
        help="constant probabilities of leaving at each exit, in a conversion. The routers are not "
        "trained, so this costs quality and is for measuring speed only. (default: never leave)",
    )
    parser.add_argument("--sampling", choices=SAMPLING_LAWS, help="--nvium-sampling")
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="context length (default: the model's)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--serve", action="store_true", help="start `vllm serve` with N-vium instead")
    what.add_argument("--prepare-only", action="store_true", help="print the checkpoint's path")
    parser.add_argument("--port", type=int, default=8000, help="with --serve (default: 8000)")
    parser.add_argument("--verbose", action="store_true", help="show the log of vLLM")


def run(args: argparse.Namespace) -> int:
    """Prepare the checkpoints, then compare, serve, or print the path of the N-vium one."""
    check_at_least(args, max_tokens=1, port=1)
    if args.temperature is not None and not args.temperature >= 0:
        raise UserError(f"--temperature is {args.temperature}, and it must be at least 0.")
    if args.serve:
        check_port(args.port)
    started = time.perf_counter()
    models = prepare(args.model, args.exits, args.hazards)
    if args.prepare_only:
        say(str(models.nvium))
        return 0
    eager = _is_cpu_build() if args.compile is None else not args.compile
    if args.serve:
        serve(
            models.nvium,
            port=args.port,
            eager=eager,
            sampling=args.sampling,
            max_model_len=args.max_model_len,
        )
    if args.compile is None and eager:
        say("vLLM's compilation is off, which takes minutes on CPUs; --compile switches it on.")
    return compare(models, args, eager, started)


def compare(models: Models, args: argparse.Namespace, eager: bool, started: float) -> int:
    """One engine after another, each in a process of its own, and the table of them all."""
    coloured = shows_colours(os.environ)
    prompts = list(args.prompt or PROMPTS)
    runs = runs_of(models, args.temperature, args.sampling)
    if models.dense is not None and all(each.kind != "via_sd" for each in runs):
        say(f"No run with --via-sd: its slim verifier does not take a {models.architecture}.")
    results = []
    for number, each in enumerate(runs, 1):
        say("", f"[{number}/{len(runs)}] {each.title}", "Starting the engine ...")
        results.append(_one(each, prompts, args, eager, coloured))
    say("")
    table(summary(results), numbers=True)
    say("")
    if len(results) > 1:
        say("N-vium is a model of its own, so its text is not compared with plain.")
    say("So few tokens show how it works. How fast it is: docs/benchmarks.md.")
    say(f"All of it took {time.perf_counter() - started:.0f} s.")
    return 0


def _one(
    each: Run, prompts: list[str], args: argparse.Namespace, eager: bool, coloured: bool
) -> Result:
    """Run one engine and show its answers as they come."""
    result = Result(each)
    environment = environment_for(Path(each.model), os.environ)
    request = {
        "model": each.model,
        "kind": each.kind,
        "additional_config": each.additional_config,
        "temperature": each.temperature,
        "prompts": prompts,
        "max_tokens": args.max_tokens,
        "max_model_len": args.max_model_len,
        "enforce_eager": eager,
    }
    for event in answers_of(request, environment, verbose=args.verbose):
        if event.pop("event") == "loaded":
            result.start(event["num_layers"], event["exit_layers"])
            say(f"Started in {event['seconds']:.0f} s.", *result.legend(coloured))
            continue
        answer = Answer(**event)
        result.answers.append(answer)
        show_answer(answer, result.sources, coloured)
    say("", result.shares())
    return result


def _is_cpu_build() -> bool:
    """Told by the distribution's name, because asking vLLM takes seconds."""
    name, version = vllm_distribution() or ("", "")
    return "cpu" in name or version.endswith("+cpu")
