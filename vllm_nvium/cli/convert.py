# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium convert DENSE OUT`: a dense model or an authors' checkpoint becomes an N-vium
checkpoint that vLLM serves and training continues from.
"""

import argparse
from pathlib import Path

from vllm_nvium.checkpoints.convert import convert
from vllm_nvium.checkpoints.convert.options import DenseOptions
from vllm_nvium.checkpoints.options import add_flags, given_by
from vllm_nvium.console import say
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.families import FAMILIES

# `--help` shows these; --help-all the others too.
COMMON = ("--exits", "--exit-layers", "--force")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium convert` to a parser."""
    parser.add_argument(
        "dense",
        metavar="DENSE",
        help=f"dense model ({', '.join(FAMILIES)}): a Hugging Face folder, a hub id or a "
        ".gguf file; or a checkpoint folder of the N-vium authors, which is recognised",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--exits",
        metavar="FOLDER",
        help="trained exits for this dense model, as vllm-nvium train leaves them in RUN/exits",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="dtype to write (default: auto, the source's; bfloat16 for GGUF)",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")
    add_flags(parser, DenseOptions)
    parser.add_argument(
        "--no-adapters",
        dest="adapter_size",
        action="store_const",
        const=0,
        default=argparse.SUPPRESS,
        help="no adapters before the heads, as --adapter-size 0",
    )


def run(args: argparse.Namespace) -> None:
    """Convert."""
    given = given_by(args, DenseOptions)
    if "exit_layers" in given and "num_exits" in given:
        raise UserError("--exit-layers and --num-exits exclude each other.")
    # `None` when no flag was given: those flags make no sense for an authors' checkpoint.
    options = DenseOptions(**given) if given else None
    for note in convert(
        args.dense, args.out, options, dtype=args.dtype, force=args.force, exits=args.exits
    ):
        say(f"vllm-nvium convert: {note}")
    say(f"vllm-nvium convert: wrote {args.out}")
