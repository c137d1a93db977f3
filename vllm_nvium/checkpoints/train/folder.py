# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: made when a run begins, compared when it goes on, and as it was before when
the run was refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_nvium import weights
from vllm_nvium.checkpoints.documents import find_files, name_of_dataset
from vllm_nvium.checkpoints.inputs import refusing
from vllm_nvium.checkpoints.train.options import TrainOptions, flag_of
from vllm_nvium.errors import UserError
from vllm_nvium.files import read_record, write_atomically

RECORD = "run.json"
# In the record: source -> `digest`, and that of a start's weights. Runs that were started before
# there were any have none.
DIGESTS, MODEL_DIGEST = "text_digests", "model_digest"
SELF_DISTILLED = "self_distilled.jsonl"


@contextmanager
def claim(out: Path, options: TrainOptions) -> Iterator[None]:
    """Makes the run's folder, or checks that it is this run's, and has it for this process alone.

    Raises:
        UserError: the folder holds something else, or a run with other options, or is in use.
    """
    _begin(out, options)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(
            f"--out is {str(out)!r}, whose run another process has: wait for it, or give another "
            "folder."
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def _begin(out: Path, options: TrainOptions) -> None:
    record = out / RECORD
    wanted = json.loads(json.dumps(options.record()))
    if record.is_file():
        if not options.resume:
            raise UserError(
                f"--out is {str(out)!r}, which holds a run already: give --resume to go on with "
                "it, or another folder."
            )
        _check_same(out, wanted)
        _check_text(out)
        check_model(out, options)
        return
    if options.resume:
        raise UserError(f"--resume needs a run in --out, and {str(out)!r} holds none.")
    if out.exists() and (not out.is_dir() or any(_not_sampled(out))):
        raise UserError(f"--out is {str(out)!r}, and it must be a new or an empty folder.")
    for source in options.text:
        if _would_read(source, out):
            raise UserError(
                f"--out is {str(out)!r}, where --text {source!r} would find what the run writes, "
                "and that is no text: give a folder elsewhere."
            )
    wanted[DIGESTS] = {source: digest(source) for source in options.text}
    wanted[MODEL_DIGEST] = _digest_of_model(options)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(record, lambda path: path.write_text(json.dumps(wanted, indent=2) + "\n"))
    except OSError as error:
        raise UserError(
            f"--out is {str(out)!r}, and it cannot be written ({error.strerror})."
        ) from error


def unclaim(out: Path) -> None:
    """Leaves nothing of a run that was refused before it had a checkpoint, so that the corrected
    command can be given."""
    if any(out.glob("checkpoint-*")) or (out / "model").exists() or (out / "exits").exists():
        return
    for path in _not_sampled(out):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(out.iterdir()):
        with suppress(OSError):  # the working directory, or a mount point
            out.rmdir()


def check_twin(history: Path, options: TrainOptions) -> None:
    """Refuses a dense twin whose losses were measured on other text, or in other tokens."""
    record = history.with_name(RECORD)
    if not record.is_file():
        return  # another program wrote the history: only the user knows how
    found = read_record(record)
    # Only a run from scratch can be given a tokenizer: any other has its model's.
    named = ("tokenizer",) if options.method == "scratch" else ()
    for name in (*named, "validation", "validation_tokens", "block_size"):
        mine, theirs = getattr(options, name), found.get(name)
        if mine != theirs:
            raise UserError(
                f"{flag_of(name)} is {mine!r}, and the twin whose curve --controller "
                f"{str(history)!r} names was measured with {theirs!r}: give the same to both."
            )


def _check_same(out: Path, wanted: dict[str, Any]) -> None:
    found = read_record(out / RECORD)
    for name, value in wanted.items():
        if name != "out" and found.get(name) != value:
            raise UserError(
                f"{flag_of(name)} is {value!r}, and the run in {out} was started with "
                f"{found.get(name)!r}: use that, or another --out."
            )


def digest(source: str) -> str | None:
    """Tells texts of one name apart: SHA-256 of a source's files, each by its own; of a dataset,
    what the `datasets` library calls the version that it would load, or None if it cannot say."""
    files = find_files(source)
    if files is None:
        import datasets

        name, config, _ = name_of_dataset(source)
        with suppress(Exception):  # it says so itself, where the text is read
            return str(datasets.load_dataset_builder(name, config).hash)
        return None
    whole = hashlib.sha256()
    for path in files:
        with refusing(f"{str(path)!r} cannot be read"), path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _check_text(out: Path) -> None:
    """Refuses to go on with a run on text that is another by now."""
    for source, before in read_record(out / RECORD).get(DIGESTS, {}).items():
        now = digest(source)
        if before and now and before != now:
            remedy = (
                "HF_HUB_OFFLINE=1 goes on with the version that this machine has"
                if find_files(source) is None
                else "give what it was"
            )
            raise UserError(
                f"--text is {source!r}, which has changed since the run in {out} was started: "
                f"{remedy}, or another --out."
            )


def check_model(out: Path, options: TrainOptions) -> None:
    """Refuses to go on with a run, or to finish it, on weights that are others by now: those that
    were not trained are read again at the end."""
    # Where all are trained, what began with a dense model reads a conversion that is the run's own.
    is_read_no_more = options.method == "full" and (out / "start").exists()
    before, now = read_record(out / RECORD).get(MODEL_DIGEST), _digest_of_model(options)
    if not before or before == now or is_read_no_more:
        return
    what = "weights or configurations have changed" if now else "weights cannot be read any more"
    raise UserError(
        f"MODEL is {options.model!r}, whose {what} since the run in {out} was started: put back "
        "what was there and give --resume, or another --out."
    )


def _digest_of_model(options: TrainOptions) -> str | None:
    """Of a folder with weights that are read. What an id of the hub stands for, nobody changes in
    the middle of a run."""
    folder = Path(options.model).expanduser()
    if options.method == "scratch" or not folder.is_dir():
        return None
    return weights.digest(str(folder))


def _would_read(source: str, out: Path) -> bool:
    """Whether a folder or a glob of text reaches into a run's folder."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        above, deep, _ = source.partition("**")
        if not deep:
            return False
        folder = Path(above).expanduser()
    return out.resolve().is_relative_to(folder.resolve())


def _not_sampled(out: Path) -> list[Path]:
    """What is in a run's folder besides sampled text, which another run may use again."""
    stem = Path(SELF_DISTILLED).stem
    return [path for path in out.iterdir() if not path.name.startswith(stem)]
