# SPDX-License-Identifier: Apache-2.0
"""What the commands that measure and write files check in their flags, before anything slow
starts."""

import argparse
import os
from pathlib import Path

from vllm_nvium.errors import UserError

DTYPES = ("float32", "bfloat16")


def check_at_least(args: argparse.Namespace, **smallest: int) -> None:
    """Refuse numbers that are too small, by the names they have in `args`.

    Raises:
        UserError: one of them is.
    """
    for name, bound in smallest.items():
        if (value := getattr(args, name)) < bound:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {value}, and it must be at least {bound}.")


def check_blocks(args: argparse.Namespace, flag: str, tokens: int | None) -> None:
    """Refuse a number of tokens with which not even one block can be filled.

    Raises:
        UserError: it is one.
    """
    if tokens is not None and tokens < args.block_size:
        raise UserError(
            f"{flag} is {tokens}, which is less than one block of --block-size {args.block_size}."
        )


def check_dtype(dtype: str) -> None:
    """Refuse a `--dtype` that models are not loaded in.

    Raises:
        UserError: it is another word.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, and it must be {' or '.join(DTYPES)}.")


def check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written.

    Raises:
        UserError: its folder is missing or closed, or it is a folder itself.
    """
    if path is None:
        return
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} is {str(path)!r}, and the folder {folder} does not exist.")
    if path.expanduser().is_dir():
        raise UserError(f"{flag} is {str(path)!r}, which is a folder; a file name is needed.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} is {str(path)!r}, and {folder} cannot be written to.")
