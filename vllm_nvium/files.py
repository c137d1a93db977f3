# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there as a whole or not at all, and checkpoints fetched from the hub.
Imports neither torch nor transformers."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_nvium.errors import UserError, first_line

# What a checkpoint on the hub is used for; other formats of its weights are left there.
HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    ".hydra/config.yaml",
]


def from_hub(name: str) -> Path:
    """The folder of a hub id, fetched when it is not there yet.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # noqa: BLE001 - the client's errors share no base class
        raise UserError(
            f"{name} is no local folder and cannot be fetched from the hub ({first_line(error)})."
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """What a command noted in a JSON file.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}).") from error
    return found


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then give it that name: a file that is there already
    is replaced as a whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = path.expanduser()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        # Without this a name may be on disk before the bytes are, when a machine crashes.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged_folder(
    out: Path, force: bool, size: int, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    Args:
        force: replace a checkpoint that is already there.
        size: bytes that will be written.
        sources: files and folders that must survive.

    Raises:
        UserError: `out` is not free, would swallow a source, or there is no room for it.
    """
    from safetensors import SafetensorError

    out = Path(os.path.abspath(out))
    _check_target(out, force, sources)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and not in /tmp, because only a rename within a filesystem is atomic.
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    try:
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise UserError(
                f"{out.parent} has {free / 1e9:.2f} GB free, and the checkpoint needs "
                f"{size / 1e9:.2f} GB."
            )
        yield stage
        _open_to_others(stage)
        _take_place(stage, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{out} could not be written ({reason}).") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_target(out: Path, force: bool, sources: Sequence[Path]) -> None:
    for source in sources:
        here, there = out.resolve(), source.resolve()
        if here == there or here in there.parents:
            raise UserError(f"{out} contains {source}, which is read, so choose another OUT.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file, and OUT must be a folder.")
    if not any(out.iterdir()):
        return
    if not force:
        raise UserError(f"{out} is not empty; pass --force to replace it.")
    if not (out / "config.json").is_file():
        raise UserError(
            f"{out} is not empty and has no config.json, so --force does not replace it."
        )


def _take_place(stage: Path, out: Path) -> None:
    """Put `stage` at `out`. A folder cannot be renamed onto a full one, so that one steps aside."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(stage, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    os.replace(out, aside)
    try:
        os.replace(stage, out)
    except OSError:
        os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _open_to_others(stage: Path) -> None:
    """The usual modes: `mkdtemp` and safetensors keep everyone else out, a server's user too."""
    mask = _umask()
    for path in (stage, *stage.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
