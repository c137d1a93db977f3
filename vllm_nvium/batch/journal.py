# SPDX-License-Identifier: Apache-2.0
"""The results that a batch job has so far, in a folder beside its output: each block of rows is
appended and synced to disk when it is done, and a job that was killed begins with what it finds."""

import fcntl
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vllm_nvium.engine.options import shown
from vllm_nvium.errors import UserError
from vllm_nvium.files import read_record, write_atomically

MANIFEST, LOCK, SPOOL, SHARDS = "manifest.json", "lock", "input.jsonl", "rows-*.jsonl"
NOT_DONE = -1
# A value of a job that is not known everywhere: the model may lie on other machines only.
WEIGHTS = "weights of --model (a digest)"


def folder_of(output: Path) -> Path:
    """Where the results of a job stand until it is complete."""
    return output.with_name(output.name + ".parts")


def claim(folder: Path, about: Mapping[str, Any], output: Path) -> BinaryIO:
    """Make the folder of a job, or find that of the same job.

    Args:
        about: what the results depend on: JSON values by the name of their flag.

    Returns:
        the lock, to be kept open: no other process can have the job while it is.

    Raises:
        UserError: the folder or the output belongs to another job, or is in use.
    """
    mine = json.loads(json.dumps(about))
    if not has_results(folder):
        refuse_existing(output)
    if folder.is_dir() and not (folder / LOCK).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there and is not the folder of a job: move it away.")
    folder.mkdir(exist_ok=True)
    lock = (folder / LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _in_use(output) from None
    # Whoever had the job has removed its folder since the lock was opened.
    if not _is_there(lock, folder / LOCK):
        lock.close()
        raise _in_use(output)
    for cut_off in folder.glob(".*.partial"):  # by a kill, while it was written
        cut_off.unlink()
    manifest = folder / MANIFEST
    if has_results(folder):
        _check_same(_read(manifest), mine, folder)
        return lock
    # A job that has no result yet may as well be another one.
    for file in (folder / SPOOL, *folder.glob(SHARDS)):
        file.unlink(missing_ok=True)
    text = json.dumps(mine, indent=1) + "\n"
    write_atomically(manifest, lambda path: path.write_text(text))
    return lock


def refuse_existing(output: Path) -> None:
    """Nothing is written over what a job that is not complete cannot have made.

    Raises:
        UserError: the output is there.
    """
    if output.exists():
        raise UserError(f"OUTPUT {output} exists already: move it away, or give another name.")


def _in_use(output: Path) -> UserError:
    return UserError(f"another process is running the job of {output}: wait for it.")


def _is_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """While something is read from the folder of a job or written into it.

    Raises:
        UserError: the disk is full, or the folder is closed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"results cannot be kept in {folder} ({error.strerror or error}): when that is mended, "
            "the same command goes on."
        ) from error


def has_results(folder: Path) -> bool:
    """Whether anything would be lost with the folder of a job."""
    return any(shard.stat().st_size for shard in folder.glob(SHARDS))


def _read(manifest: Path) -> dict[str, Any]:
    try:
        return read_record(manifest)
    except UserError as error:
        raise UserError(
            f"{manifest} is damaged, so that nobody knows whose results are beside it: move the "
            "folder away."
        ) from error


def _check_same(theirs: Mapping[str, Any], mine: Mapping[str, Any], folder: Path) -> None:
    for name in [*mine, *theirs]:
        is_known = name != WEIGHTS or None not in (theirs.get(name), mine.get(name))
        if theirs.get(name) == mine.get(name) or not is_known:
            continue
        if name == WEIGHTS:
            raise UserError(
                "OUTPUT belongs to another job: the weights or configurations of --model are "
                f"others than those that {folder} was begun with; put these back to go on, or "
                "give another OUTPUT."
            )
        raise UserError(
            f"OUTPUT belongs to another job: {name} is {shown(mine.get(name, 'not given'))}, "
            f"and {folder} was begun with {shown(theirs.get(name, 'none'))}; give the same "
            "command to go on, or another OUTPUT."
        )


class Journal:
    """The results of a job, by row.

    Args:
        folder: that `claim` gave to this process.
        rows: of the input.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.done = 0
        # For a million rows ten megabytes; the results themselves stay on disk.
        self._offsets = array("q", [NOT_DONE]) * rows
        self._shards = array("H", [0]) * rows
        shards = sorted(folder.glob(SHARDS))
        for number, shard in enumerate(shards):
            self._recover(number, shard)
        # A shard of its own for every start: an unfinished last line is never written behind.
        shards.append(folder / f"rows-{len(shards):05}.jsonl")
        self._file = shards[-1].open("xb")
        self._readers: list[BinaryIO] = [shard.open("rb") for shard in shards]

    def _recover(self, number: int, shard: Path) -> None:
        offset = 0
        with shard.open("rb") as file:
            for line in file:
                if line.endswith(b"}\n"):
                    self._note(int(line.partition(b"\t")[0]), number, offset)
                offset += len(line)

    def _note(self, index: int, shard: int, offset: int) -> None:
        if self._offsets[index] == NOT_DONE:
            self.done += 1
        self._offsets[index], self._shards[index] = offset, shard

    def has(self, index: int) -> bool:
        return self._offsets[index] != NOT_DONE

    def add(self, results: Iterable[tuple[int, bytes]]) -> int:
        """Write results, each one JSON object without line breaks, and wait until they are on disk.

        Returns:
            how many are new; a row that has a result keeps it.
        """
        before, here = self.done, len(self._readers) - 1
        for index, result in results:
            if not self.has(index):
                offset = self._file.tell()
                self._file.write(b"%d\t%b\n" % (index, result))
                self._note(index, here, offset)
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.done - before

    def result(self, index: int) -> bytes:
        """The result of a row that is done."""
        reader = self._readers[self._shards[index]]
        reader.seek(self._offsets[index])
        return reader.readline().partition(b"\t")[2].rstrip(b"\n")

    def close(self) -> None:
        # What could not be written cannot be now, either.
        with suppress(OSError):
            self._file.close()
        for file in self._readers:
            file.close()


def remove(folder: Path) -> None:
    """Forget a job whose output is there, or that has no results: at once, because half a folder
    would be taken for a job that is to go on."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
