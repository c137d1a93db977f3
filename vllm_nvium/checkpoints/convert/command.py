# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium convert DENSE OUT`: a dense model or an authors' checkpoint becomes an N-vium
checkpoint that vLLM serves and training continues from. `convert()` is the same for Python.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.errors import UserError
from vllm_nvium.files import from_hub

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.convert.checkpoint import Source
    from vllm_nvium.checkpoints.convert.dense import DenseOptions

# What belongs to dense models only, and therefore makes no sense beside an authors' checkpoint.
DENSE_FLAGS = {
    "exit_layers": "--exit-layers",
    "num_exits": "--num-exits",
    "hazards": "--hazards",
    "exit_norm": "--exit-norm",
    "adapter_size": "--adapter-size",
    "router_size": "--router-size",
    "seed": "--seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium convert` to a parser."""
    parser.add_argument(
        "dense",
        metavar="DENSE",
        help="dense model (llama, mistral, qwen2, qwen3): a Hugging Face folder, a hub id or a "
        ".gguf file; or a checkpoint folder of the N-vium authors, which is recognised",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
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
    parser.add_argument("--seed", type=int, help="seed of the routers' random weights (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when OUT is there, 2 with one line on stderr when it is not."""
    from vllm_nvium.checkpoints.convert.dense import DenseOptions

    given = {name: value for name in DENSE_FLAGS if (value := getattr(args, name)) is not None}
    try:
        if "exit_layers" in given and "num_exits" in given:
            raise UserError("--exit-layers and --num-exits exclude each other.")
        # `None` when no flag was given: those flags make no sense for an authors' checkpoint.
        options = DenseOptions(**given) if given else None
        for note in convert(
            args.dense,
            args.out,
            options,
            dtype=args.dtype,
            force=args.force,
            exits=args.exits,
        ):
            print(f"vllm-nvium convert: {note}")
    except UserError as error:
        print(f"vllm-nvium convert: error: {error}", file=sys.stderr)
        return 2
    print(f"vllm-nvium convert: wrote {args.out}")
    return 0


def convert(
    dense: str | Path,
    out: str | Path,
    options: "DenseOptions | None" = None,
    *,
    dtype: str = "auto",
    force: bool = False,
    exits: str | Path | None = None,
) -> list[str]:
    """Convert a checkpoint.

    Args:
        dense: folder, hub id or `.gguf` file.
        out: folder to write; it appears complete or not at all.
        options: the exits of a dense model; must be `None` for an authors' checkpoint.
        dtype: `"auto"`, `"bfloat16"` or `"float32"`.
        force: replace a checkpoint at `out`.
        exits: folder of trained exits (see `exits.py`) for a dense model; excludes `options`.

    Returns:
        Notes for the user, one sentence each; mostly none.

    Raises:
        UserError: what was given cannot be converted; nothing was written.
    """
    from vllm_nvium.checkpoints.convert import authors
    from vllm_nvium.checkpoints.convert import dense as dense_models
    from vllm_nvium.checkpoints.convert import exits as trained_exits
    from vllm_nvium.checkpoints.convert.checkpoint import source_dtype, write_checkpoint

    source = open_source(str(dense), dtype)
    if exits is not None:
        if options is not None:
            raise UserError(
                f"--exits holds exits that are given, so {', '.join(DENSE_FLAGS.values())} do not "
                "apply."
            )
        config, plan, notes = trained_exits.plan(source, Path(exits))
    elif authors.is_authors_layout(source):
        if options is not None:
            raise UserError(
                f"{dense} is a checkpoint of the N-vium authors, whose exits are given, so "
                f"{', '.join(DENSE_FLAGS.values())} do not apply."
            )
        config, plan, notes = authors.plan(source)
    else:
        config, plan = dense_models.plan(source, options or dense_models.DenseOptions())
        notes = []
    write_checkpoint(Path(out), source, config, plan, source_dtype(source, dtype), force)
    return notes


def open_source(name: str, dtype: str = "auto") -> "Source":
    """Opens a folder, hub id or `.gguf` file to convert from.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    from vllm_nvium.checkpoints.convert.checkpoint import open_folder
    from vllm_nvium.checkpoints.convert.dense import open_gguf

    path = Path(name).expanduser()
    if path.is_dir():
        return open_folder(path, name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{name} does not exist.")
        return open_gguf(path, dtype)
    if path.exists():
        raise UserError(f"{name} is a file, and a folder, a hub id or a .gguf file is needed.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name} does not exist.")
    return open_folder(from_hub(name), name)


def comma_separated(kind: type) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list of `kind`."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a comma-separated list of {kind.__name__} values"
            ) from None

    return parse


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value
