# SPDX-License-Identifier: Apache-2.0
"""Checks of flags that several commands have, before anything slow starts."""

import argparse
import os
from pathlib import Path

from vllm_nvium.errors import UserError


def check_at_least(args: argparse.Namespace, **smallest: int) -> None:
    """Refuse numbers that are too small, by the names they have in `args`."""
    for name, bound in smallest.items():
        if (value := getattr(args, name)) < bound:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {value}, and it must be at least {bound}.")


def check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written."""
    if path is None:
        return
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} is {str(path)!r}, and the folder {folder} does not exist.")
    if path.expanduser().is_dir():
        raise UserError(f"{flag} is {str(path)!r}, which is a folder; a file name is needed.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} is {str(path)!r}, and {folder} cannot be written to.")
