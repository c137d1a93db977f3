# SPDX-License-Identifier: Apache-2.0
"""The `vllm-nvium` command. Its sub-commands import what they need when they run, because
`setup-cpu` must work before vLLM and torch do."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_nvium.version import __version__

# Commands whose modules may need torch and transformers, so that a module is imported only when its
# command is meant: name -> module (with `add_arguments` and `run`), line in the help.
LAZY_COMMANDS = {
    "convert": ("vllm_nvium.checkpoints.convert.command", "make an N-vium checkpoint"),
    "train": ("vllm_nvium.checkpoints.train.command", "train an N-vium checkpoint"),
    "eval": (
        "vllm_nvium.checkpoints.evaluate.command",
        "measure a checkpoint: perplexity, exits, expected speed-up",
    ),
    "search-mask": (
        "vllm_nvium.checkpoints.mask_search.command",
        "find the layers that VIA-SD's slim verifier skips",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser; importing the sub-commands' modules must stay cheap."""
    parser = argparse.ArgumentParser(
        prog="vllm-nvium", description="N-vium (mixture-of-exits) models and VIA-SD on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vllm-nvium {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    from vllm_nvium.cli import demo, doctor, setup_cpu

    for name, module, text in (
        ("doctor", doctor, "check this installation"),
        ("demo", demo, "make an N-vium checkpoint if needed and generate with it"),
        ("setup-cpu", setup_cpu, "mend what vLLM's CPU wheel leaves broken"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    for name, (_, text) in LAZY_COMMANDS.items():
        command = commands.add_parser(name, help=text, add_help=False)
        command.add_argument("rest", nargs=argparse.REMAINDER)
        command.set_defaults(run=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in LAZY_COMMANDS:
        return _run_lazy(arguments[0], arguments[1:])
    args = build_parser().parse_args(arguments)
    return int(args.run(args) or 0)


def _run_lazy(name: str, arguments: Sequence[str]) -> int:
    command = importlib.import_module(LAZY_COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"vllm-nvium {name}", description=command.__doc__)
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(arguments)) or 0)
