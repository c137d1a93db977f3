# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train MODEL --out RUN --text ... --validation ...`: gives a dense model exits that
have learned when to leave, or trains an N-vium model from scratch. A run that was interrupted goes
on with `--resume`.
"""

import argparse
from pathlib import Path

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.options import add_flags, given_by
from vllm_nvium.checkpoints.train.options import TrainOptions, read_config
from vllm_nvium.console import say

# `--help` shows these; --help-all the others too.
COMMON = ("--out", "--text", "--validation", "--method", "--config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every option, and `MODEL` and `--config` besides."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help="what to start from; the same as --model",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON with these options; flags win"
    )
    add_flags(parser, TrainOptions)


def options_of(args: argparse.Namespace) -> TrainOptions:
    """The flags over the file over the defaults."""
    from_file = {} if args.config is None else read_config(args.config)
    return TrainOptions(**from_file | given_by(args, TrainOptions))


def run(args: argparse.Namespace) -> None:
    """Train."""
    require("transformers")
    from vllm_nvium.checkpoints.train.run import train

    say(f"vllm-nvium train: wrote {train(options_of(args))}")
