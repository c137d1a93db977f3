# SPDX-License-Identifier: Apache-2.0
"""The `vllm-nvium` command. Each sub-command is a module with `run` and `add_arguments`, or in its
place `make_parser`; one with many options names those that `--help` shows in `COMMON`. It is
imported only when that command is meant: most need torch, `--help` and `setup-cpu` must not."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import NoReturn

from vllm_nvium.console import complain
from vllm_nvium.errors import UserError
from vllm_nvium.version import __version__

# Name -> its module in this package, and its line in the help.
COMMANDS = {
    "doctor": ("doctor", "check this installation"),
    "demo": ("demo", "run a real model plain, as N-vium and with --via-sd"),
    "setup-cpu": ("setup_cpu", "mend what vLLM's CPU wheel leaves broken"),
    "convert": ("convert", "make an N-vium checkpoint"),
    "train": ("train", "train an N-vium checkpoint"),
    "eval": ("eval", "measure a checkpoint: perplexity, exits, expected speed-up"),
    "batch": ("batch", "answer a file of requests, on one machine or a cluster"),
    "search-mask": ("search_mask", "find the layers that VIA-SD's slim verifier skips"),
}

HELP_ALL = "--help-all"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the first word, which imports no sub-command."""
    parser = argparse.ArgumentParser(
        prog="vllm-nvium", description="N-vium (mixture-of-exits) models and VIA-SD on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vllm-nvium {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        the exit status; with one line on standard error 2 for a `UserError`, and 130 where the
        user interrupted it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = build_parser().parse_args(words[:1]).command
    command = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
    try:
        parser = _parser_of(command, f"vllm-nvium {name}")
        if (common := getattr(command, "COMMON", None)) is not None:
            parser.add_argument(HELP_ALL, action="help", help="show every option")
            if HELP_ALL not in words:
                _shorten(parser, {*common, "--help", HELP_ALL})
        return int(command.run(parser.parse_args(words[1:])) or 0)
    except UserError as error:
        complain(f"vllm-nvium {name}: error: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"vllm-nvium {name}: interrupted.")
        return 130


def _shorten(parser: argparse.ArgumentParser, common: set[str]) -> None:
    """Leave other options out of the help, so that it fits a screen; they work all the same."""
    for action in parser._actions:
        if action.option_strings and common.isdisjoint(action.option_strings):
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        group.description = None
    # vLLM's parser lists groups instead.
    parser.format_help = partial(argparse.ArgumentParser.format_help, parser)  # type: ignore
    # argparse's own usage is lines of brackets, and Python 3.11's cannot leave options out.
    words = [parser.prog]
    for action in parser._actions:
        name = str(action.metavar or action.dest.upper())
        if action.option_strings and action.required:
            words.append(f"{action.option_strings[0]} {name}")
        elif not action.option_strings:
            words.append(name if action.required else f"[{name}]")
    parser.usage = " ".join([*words, "[options]"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuses in one sentence, without the usage that argparse prints."""
        raise UserError(f"{message}.")


def _parser_of(command: ModuleType, prog: str) -> argparse.ArgumentParser:
    if hasattr(command, "make_parser"):
        return command.make_parser(prog=prog, description=command.__doc__)
    parser = _Parser(prog=prog, description=command.__doc__)
    command.add_arguments(parser)
    return parser
