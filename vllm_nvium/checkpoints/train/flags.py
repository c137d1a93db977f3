# SPDX-License-Identifier: Apache-2.0
"""The command line of `vllm-nvium train`, and the `--config` file that it overrides. Importing this
module imports transformers.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin

from transformers import HfArgumentParser

from vllm_nvium.checkpoints.train.options import TrainOptions, flag_of
from vllm_nvium.errors import UserError, first_line


class FlagParser(HfArgumentParser):
    """A flag for every field of `TrainOptions`, and `MODEL` and `--config` besides.

    A `--config` file is read as if its names were flags, before those that are really given, so
    both are checked alike and flags win.
    """

    def __init__(self, **about: Any) -> None:
        super().__init__(TrainOptions, formatter_class=argparse.HelpFormatter, **about)
        self.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            # With another default, a MODEL that is left out would replace the one of the file.
            default=argparse.SUPPRESS,
            help="what to start from; the same as --model",
        )
        self.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML or JSON with these options; flags win"
        )

    def add_argument(
        self, *names: str, reads: Callable[[str], Any] | None = None, **about: Any
    ) -> argparse.Action:
        """As HfArgumentParser asks for, but each flag in one spelling.

        Args:
            reads: turns the one word after the flag into a list or a mapping.
        """
        if reads is not None:
            about |= {"type": reads, "nargs": None}
        if about.get("const") is True:
            # HfArgumentParser would take MODEL in `--resume MODEL` for the flag's truth value.
            about = {"action": "store_true", "help": about["help"]}
        return super().add_argument(*(name for name in names if "_" not in name), **about)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Flags over the file over the defaults."""
        found, rest = super().parse_known_args(args, namespace)
        if namespace is not None or found.config is None:
            return found, rest
        try:
            from_file = self.parse_args(_words(found.config), argparse.Namespace())
        except UserError as error:
            raise UserError(f"--config {found.config}: {error}") from error
        return super().parse_known_args(args, from_file)

    def error(self, message: str) -> Any:
        """Refuses in one sentence, without the page of usage that argparse prints."""
        raise UserError(message)


def options_of(args: argparse.Namespace) -> TrainOptions:
    """What a `FlagParser` parsed."""
    (options,) = FlagParser().parse_dict(vars(args), allow_extra_keys=True)
    return options


def _words(path: Path) -> list[str]:
    """A file's names and values as a command line."""
    import yaml

    try:
        text = path.read_text()
        if path.suffix == ".json":
            text = yaml.safe_dump(json.loads(text))
        # To YAML `off` is false and `1e-3` a word: only the flags know what they should be.
        plain, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"it cannot be read ({first_line(error)}).") from error
    if not isinstance(plain, dict):
        raise UserError("it holds no options by name.")
    known = {flag_of(entry.name): entry for entry in dataclasses.fields(TrainOptions)}
    words: list[str] = []
    for name, value in plain.items():
        if (flag := flag_of(name)) not in known:
            names = ", ".join(entry.name for entry in known.values())
            raise UserError(f"{name!r} is no option; the options are {names}.")
        words += _flag_words(known[flag], flag, value, typed[name])
    return words


def _flag_words(entry: dataclasses.Field, flag: str, value: Any, typed: Any) -> list[str]:
    """A flag and its value, which is given as text and as YAML reads it."""
    kind = get_origin(entry.type) or entry.type
    if typed is None:
        raise UserError(f"{flag} has no value: give one, or leave the option out.")
    if kind is bool and isinstance(typed, bool):
        return [flag] if typed else []
    if kind is list:
        values = value if isinstance(value, list) else [value]
        if "reads" in entry.metadata:
            return [f"{flag}={','.join(map(str, values))}"] if values else []
        return [flag, *map(str, values)] if values else []
    if kind is dict:
        return [f"{flag}={json.dumps(typed, default=str)}"]
    if not isinstance(value, str):
        raise UserError(f"{flag} is {typed!r}, and one value is needed.")
    return [f"{flag}={value}"]
