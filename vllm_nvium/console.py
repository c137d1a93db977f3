# SPDX-License-Identifier: Apache-2.0
"""Output of the command line tools: plain lines, and a progress bar where a person is looking.
Kept apart, so that nothing else in the package prints."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a step may call to say how far it is."""

    def update(self, n: float = 1) -> object: ...


class _Silent:
    def update(self, n: float = 1) -> None: ...


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


@contextmanager
def progress(title: str, total: int, unit: str = "B") -> Iterator[Progress]:
    """A bar on a terminal, one line elsewhere. `total` in units; bytes are scaled."""
    if not interactive():
        say(f"{title} ...")
        yield _Silent()
        return
    try:
        from tqdm import tqdm
    except ImportError:  # before vLLM is installed
        say(f"{title} ...")
        yield _Silent()
        return
    scale = unit == "B"
    with tqdm(desc=title, total=total, unit=unit, unit_scale=scale, file=sys.stdout) as bar:
        yield bar


def table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print columns padded to their widest cell; the last column is left as it is."""
    cells = list(rows)
    if not cells:
        return
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        say("  ".join([*padded, row[-1]]).rstrip())
