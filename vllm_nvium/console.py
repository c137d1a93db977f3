# SPDX-License-Identifier: Apache-2.0
"""What the command line tools read and print: lists in flags, plain lines, tables, and a progress
bar where a person is looking. Kept apart, so that nothing else in the package prints."""

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def say(*lines: str) -> None:
    """Print lines at once, so that they stay in order with what child processes print."""
    for line in lines:
        print(line, flush=True)


def complain(line: str) -> None:
    """Print one line to standard error."""
    print(line, file=sys.stderr, flush=True)


def interactive() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def progress(title: str, total: int, unit: str) -> "tqdm[Any]":
    """A bar on a terminal, one line elsewhere. `total` in units."""
    from tqdm import tqdm

    if not interactive():
        say(f"{title} ...")
    return tqdm(desc=title, total=total, unit=unit, file=sys.stdout, disable=not interactive())


def table(rows: Iterable[tuple[str, ...]], numbers: bool = False) -> None:
    """Print columns padded to their widest cell.

    Args:
        numbers: every column but the first is one of numbers, which stand on the right.
    """
    columns = []
    for place, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        right = numbers and place > 0
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    for row in zip(*columns, strict=True):
        say("  ".join(row).rstrip())


def comma_separated(kind: type) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list of `kind`."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise ArgumentTypeError(
                f"{text!r} is not a comma-separated list of {kind.__name__} values"
            ) from None

    return parse
