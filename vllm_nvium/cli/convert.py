# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium convert DENSE OUT`: a dense model or an authors' checkpoint becomes an N-vium
checkpoint that vLLM serves and training continues from.
"""

import argparse
from pathlib import Path

from vllm_nvium.checkpoints.convert import DENSE_OPTIONS, convert
from vllm_nvium.console import comma_separated, say
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
    _add_exit_arguments(parser)


def _add_exit_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the exits of a dense model, one for each field of `DenseOptions`."""
    parser.add_argument(
        "--exit-layers",
        type=comma_separated(int),
        metavar="L1,L2,...",
        help="layers already run at each early exit (default: evenly spaced)",
    )
    parser.add_argument(
        "--num-exits",
        type=int,
        metavar="N",
        help="number of evenly spaced early exits, without --exit-layers (default: 3)",
    )
    parser.add_argument(
        "--hazards",
        type=comma_separated(float),
        metavar="P1,P2,...",
        help="constant chance of leaving at each exit, for measuring speed; one value is for all "
        "exits (default: 0, the output equals the dense model)",
    )
    parser.add_argument(
        "--exit-norm",
        choices=("final", "ones"),
        help="what every exit's norm starts as: the final norm's weight, or ones (default: final)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--adapter-size",
        type=_positive,
        metavar="A",
        help="inner width of the adapters (default: the hidden size, as in the paper)",
    )
    size.add_argument(
        "--no-adapters",
        dest="adapter_size",
        action="store_const",
        const=0,
        help="no adapters before the heads",
    )
    parser.add_argument(
        "--router-size",
        type=_positive,
        metavar="I",
        help="inner width of the routers (default: about 0.66 of the hidden size, as in the paper)",
    )
    parser.add_argument("--seed", type=int, help="seed of the routers' random weights (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Convert.

    Raises:
        UserError: what was given cannot be converted; nothing was written.
    """
    from vllm_nvium.checkpoints.convert.dense import DenseOptions

    given = {name: value for name in DENSE_OPTIONS if (value := getattr(args, name)) is not None}
    if "exit_layers" in given and "num_exits" in given:
        raise UserError("--exit-layers and --num-exits exclude each other.")
    # `None` when no flag was given: those flags make no sense for an authors' checkpoint.
    options = DenseOptions(**given) if given else None
    for note in convert(
        args.dense, args.out, options, dtype=args.dtype, force=args.force, exits=args.exits
    ):
        say(f"vllm-nvium convert: {note}")
    say(f"vllm-nvium convert: wrote {args.out}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value
