# SPDX-License-Identifier: Apache-2.0
"""The input of a batch job, JSON lines or Parquet: how many rows it has, what identifies it, and
where each block of rows begins, so that any block can be read alone."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import write_atomically

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PARQUET_SUFFIX = ".parquet"
# A line that is not UTF-8.
NO_TEXT = b"\xff"

# Inode, bytes, time of the last change.
State = tuple[int, int, int]


@dataclass(frozen=True)
class Lines:
    """A file of JSON lines. Empty lines are no rows.

    Attributes:
        offsets: of every block of `block` rows, in bytes.
        state: of the file when it was read; see `state_of`.
    """

    path: Path
    rows: int
    block: int
    offsets: array  # type: ignore[type-arg]
    state: State

    def blocks(self) -> range:
        return range(len(self.offsets))

    def indices(self, number: int) -> range:
        """Numbers of the rows of a block, from 0."""
        first = number * self.block
        return range(first, min(first + self.block, self.rows))

    def read(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Number and text of the rows of a block."""
        return read_block(self.path, self.offsets[number], self.indices(number), self.state)


def state_of(path: Path) -> State:
    """What changes when a file is written to or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(path: Path, state: State) -> None:
    """Refuse a file that is not what it was: its rows would be those of another job.

    Raises:
        UserError: it is another, or gone.
    """
    if not path.exists() or state_of(path) != state:
        raise UserError(
            f"INPUT {path} was changed while the job ran: the same command goes on when it is as "
            "it was."
        )


def read_block(
    path: Path, offset: int, indices: range, state: State
) -> Iterator[tuple[int, bytes]]:
    """Number and text of the rows that begin at an offset of a file of JSON lines.

    Raises:
        UserError: the file has changed since it had this state.
    """
    rows = []
    if path.exists():
        with path.open("rb") as file:
            file.seek(offset)
            lines = (line.strip() for line in file)
            rows = list(islice((line for line in lines if line), len(indices)))
    check_unchanged(path, state)
    yield from zip(indices, rows, strict=True)


def check_suffix(flag: str, path: Path) -> None:
    """Refuse a file that is neither JSON lines nor Parquet by its name.

    Raises:
        UserError: it is.
    """
    if path.suffix not in (*JSON_SUFFIXES, PARQUET_SUFFIX):
        raise UserError(
            f"{flag} is {str(path)!r}; its name must end in {', '.join(JSON_SUFFIXES)} or "
            f"{PARQUET_SUFFIX}."
        )


def digest_of(path: Path) -> tuple[str, State]:
    """What identifies a file, the SHA-256 of its bytes, and its state before they were read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = state_of(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), state
    except OSError as error:
        raise UserError(f"INPUT {path} cannot be read ({error.strerror}).") from None


def scan(path: Path, block: int) -> Lines:
    """Find the rows of a file of JSON lines.

    Raises:
        UserError: it cannot be read, or has none.
    """
    offsets, rows, offset = array("q"), 0, 0
    try:
        state = state_of(path)
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    if rows % block == 0:
                        offsets.append(offset)
                    rows += 1
                offset += len(line)
    except OSError as error:
        raise UserError(f"INPUT {path} cannot be read ({error.strerror}).") from None
    if not rows:
        raise UserError(f"INPUT {path} has no rows.")
    return Lines(path, rows, block, offsets, state)


def parquet_to_lines(path: Path, out: Path) -> None:
    """Write the rows of a Parquet file as JSON lines, one by one: its row groups are too large to
    be read once for every block. A job that goes on after a crash finds all of them, or no file.

    Raises:
        UserError: it cannot be read.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as lines:
            lines.writelines(line + b"\n" for line in _lines_of_parquet(path))

    write_atomically(out, write)


def _lines_of_parquet(path: Path) -> Iterator[bytes]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from _lines_of_batch(batch)
    except (ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"INPUT {path} is not a readable Parquet file ({first_line(error)})."
        ) from (None)


def _lines_of_batch(batch: Any) -> list[bytes]:
    """A line for each row of a pyarrow `RecordBatch`."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
        return [json.dumps(_given(row), default=str, ensure_ascii=False).encode() for row in rows]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [NO_TEXT]
        alone = (batch.slice(place, 1) for place in range(batch.num_rows))
        return [line for row in alone for line in _lines_of_batch(row)]


def _given(value: Any) -> Any:
    """Without the fields that are None: in a column, what one row has every row has."""
    if isinstance(value, dict):
        return {_given(key): _given(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_given(entry) for entry in value]
    if isinstance(value, bytes):
        # Columns of text that a writer has not marked as such.
        return value.decode()
    return value
