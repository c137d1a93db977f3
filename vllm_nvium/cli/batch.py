# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium batch INPUT OUTPUT --model M`: answers a file of requests, JSON lines or Parquet, on
one machine or on a cluster of Ray. The same command goes on after anything was killed."""

import argparse
import os
from pathlib import Path
from typing import Any

from vllm_nvium.checkpoints import require
from vllm_nvium.cli.common import check_at_least, check_output
from vllm_nvium.console import complain, say
from vllm_nvium.environment import with_libraries
from vllm_nvium.errors import UserError

# `--help` shows these; --help-all the others, and vLLM's, too.
COMMON = ("--model", "--replicas", "--address")


def make_parser(**about: Any) -> argparse.ArgumentParser:
    """The parser of a job's flags and of all of vLLM's engine.

    Raises:
        UserError: vLLM or Ray is not installed.
    """
    require("vllm", extra="cpu")
    require("ray", extra="ray")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_nvium.batch.engine import add_engine_arguments

    parser = FlexibleArgumentParser(**about)
    parser.add_argument(
        "input",
        metavar="INPUT",
        type=Path,
        help="rows, one request each (.jsonl or .parquet): lines of OpenAI's batch files, or "
        "prompt or messages beside sampling parameters",
    )
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="file of results (.jsonl or .parquet)"
    )
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="engines (default: 1)")
    parser.add_argument(
        "--cpus-per-replica",
        type=float,
        metavar="C",
        help="cores of each worker of an engine, on CPU (default: this machine's, shared out)",
    )
    parser.add_argument(
        "--address",
        help="of a cluster of Ray that runs, or auto; INPUT and OUTPUT are files of the machine "
        "that the command is given on (default: this machine alone)",
    )
    parser.add_argument(
        "--row-seeds",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give rows that have no seed one made from --seed and their place, so that a job "
        "reproduces whatever its replicas (default: yes)",
    )
    parser.add_argument("--engine-logs", action="store_true", help="print what the replicas print")
    add_engine_arguments(parser)
    # vLLM's own default is a model that nobody named.
    parser.set_defaults(parser=parser, model=None)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do the job, or what is left of it.

    Returns:
        0, or 130 when it was interrupted.
    """
    parser = args.parser
    del args.parser
    check(args)
    # For this process, too: it makes the engine's configuration to check it. What is preloaded is
    # for engines alone.
    suited = with_libraries(os.environ)
    os.environ.update({key: value for key, value in suited.items() if key != "LD_PRELOAD"})
    from vllm_nvium.batch.engine import engine_of
    from vllm_nvium.batch.job import Job
    from vllm_nvium.batch.job import run as run_job
    from vllm_nvium.batch.pipeline import Cluster

    own = {"input", "output", "replicas", "cpus_per_replica", "address", "row_seeds", "engine_logs"}
    given = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in own})
    usual = parser.parse_args([str(args.input), str(args.output), "--model", args.model])
    for name in (*own, "parser"):
        delattr(usual, name)
    engine = engine_of(given, usual)
    cluster = Cluster(args.replicas, _cpus(args, engine.workers), args.address, args.engine_logs)
    seed = (args.seed or 0) if args.row_seeds else None
    source, output = (path.expanduser().absolute() for path in (args.input, args.output))
    job = Job(source, output, engine, cluster, seed)
    try:
        progress = run_job(job, lambda line: say(f"vllm-nvium batch: {line}"))
    except KeyboardInterrupt:
        complain("vllm-nvium batch: interrupted; the same command goes on.")
        return 130
    say(f"vllm-nvium batch: {progress.line()}", f"vllm-nvium batch: wrote {args.output}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything slow starts."""
    from vllm_nvium.batch.inputs import check_suffix

    if args.model is None:
        raise UserError("--model is not given; name a folder or a hub id.")
    check_at_least(args, replicas=1)
    if args.cpus_per_replica is not None and args.cpus_per_replica <= 0:
        raise UserError(f"--cpus-per-replica is {args.cpus_per_replica}, and it must be above 0.")
    if (args.address or "").startswith("ray://"):
        raise UserError(
            f"--address is {args.address!r}; a job reads its files itself, so give the command on "
            "a machine of the cluster, with --address auto."
        )
    if args.model.startswith(("/", ".", "~")) and not Path(args.model).expanduser().exists():
        raise UserError(f"--model is {args.model!r}, which does not exist.")
    check_suffix("INPUT", args.input)
    check_suffix("OUTPUT", args.output)
    check_output("OUTPUT", args.output)
    if not args.input.expanduser().is_file():
        raise UserError(f"INPUT {args.input} is not a file.")


def _cpus(args: argparse.Namespace, workers: int) -> float:
    if args.cpus_per_replica is not None:
        return args.cpus_per_replica
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (args.replicas * workers))
