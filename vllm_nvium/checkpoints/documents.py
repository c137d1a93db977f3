# SPDX-License-Identifier: Apache-2.0
"""Documents in files, JSON rows and data sets: found, checked and cut into pieces that are read
again when they are needed, so that a corpus larger than memory can be trained on.

The loaders of the `datasets` library are not used for files: they say less about a row that cannot
be used, stop at one file that is not text, and keep a copy of everything on the disk.
"""

import glob
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllm_nvium.errors import UserError, first_line

logger = logging.getLogger(__name__)

# What counts as text in a folder; a file or a glob that is named is tried whatever its suffix.
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".toml", ".yaml",
    ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go",
    ".java", ".js", ".ts", ".rb", ".php", ".sh", ".sql",
))  # fmt: skip
RECORD_SUFFIXES = frozenset((".jsonl", ".json"))
TEXT_FIELDS = ("text", "content")
PAIRED_FIELDS = (("prompt", "response"), ("question", "answer"))
LIST_FIELDS = ("messages", "input_ids")
# Weighs documents that are tokens already against text.
BYTES_PER_TOKEN = 4


class Rendered(str):
    """Text with its special tokens in place: a chat template wrote it, so no bos is added."""


# Text, or a document's token ids: [T] int32.
Content = str | np.ndarray


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one, that is read only when it is needed.

    Attributes:
        size: bytes of UTF-8; 4 for each token of what is tokenised already.
    """

    size: int
    read: Callable[[], Content]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a JSON file or of a dataset.

    Attributes:
        where: file and line, for messages.
        fetch: reads `row` again, so that it need not be kept.
    """

    where: str
    row: Any
    fetch: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Form:
    """How rows become documents, and how long a piece may be in bytes."""

    tokenizer: Any
    text_field: str | None
    largest_piece: int


def pieces_of(source: str, form: Form, split: str) -> list[Piece]:
    """Every piece of one source, in the order of its files and rows.

    Args:
        split: of a source of the `datasets` library.

    Raises:
        UserError: there is no such source, or no text in it.
    """
    files = find_files(source)
    if files is None:
        pieces = _record_pieces(dataset_records(source, split), form)
        found = "its rows are empty"
    else:
        pieces = _pieces_of_files(files, source, form)
        found = f"{len(files)} empty file{'s' if len(files) > 1 else ''} found"
    if not pieces:
        raise UserError(f"{source!r} has no text ({found}): give a source with text in it.")
    return pieces


def find_files(source: str) -> list[Path] | None:
    """The files that a source means, sorted; `None` when it can only be a dataset's name.

    Raises:
        UserError: nothing has that name, or a folder or glob has no file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path, source)
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if files := [file for file in found if file.is_file()]:
            return files
        raise UserError(f"No file matches {source!r}: give a file, a folder or another glob.")
    is_file_name = path.suffix in TEXT_SUFFIXES | RECORD_SUFFIXES
    if is_file_name or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UserError(
            f"{source!r} does not exist: give a file, a folder, a glob or the name of a dataset."
        )
    return None


def file_records(path: Path) -> Iterator[Record]:
    """Rows of a `.jsonl` file, or of a `.json` file that holds a list or one object a line.

    Raises:
        UserError: it is not JSON.
    """
    with path.open("rb") as file:
        is_list = file.read(256).lstrip().startswith(b"[")
    if is_list:
        rows = _parse(path.read_bytes(), str(path))
        for number, row in enumerate(rows):
            yield Record(f"{path}, element {number}", row, partial(rows.__getitem__, number))
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                fetch = partial(_read_json, path, offset, len(line))
                yield Record(where, _parse(line, where), fetch)
            offset += len(line)


def dataset_records(source: str, split: str) -> Iterator[Record]:
    """Rows of a dataset of the `datasets` library, named `name` or `name:config`.

    Raises:
        UserError: the library cannot load it.
    """
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # noqa: BLE001 - the library's errors share no base class
        raise UserError(
            f"{source!r} is no file or folder, and the datasets library cannot load its split "
            f"{split!r} ({first_line(error)}): give a file, a folder, a glob or a dataset's name."
        ) from error
    for number in range(len(rows)):
        yield Record(f"{source}, row {number}", rows[number], partial(rows.__getitem__, number))


def _files_in(folder: Path, source: str) -> list[Path]:
    # Hidden folders hold what tools keep for themselves, such as .git.
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UserError(
            f"{source!r} is a folder without text files (.txt, .md, .py, ...): name its files with "
            f"a glob such as {str(folder / '*.jsonl')!r}."
        )
    return files


def _pieces_of_files(files: Sequence[Path], source: str, form: Form) -> list[Piece]:
    pieces: list[Piece] = []
    not_text = []
    for path in files:
        if path.suffix in RECORD_SUFFIXES:
            pieces += _record_pieces(file_records(path), form)
        elif (found := _file_pieces(path, form.largest_piece)) is None:
            not_text.append(path)
        else:
            pieces += found
    # Large folders have a few such files, and they should not stop everything.
    if len(not_text) == len(files):
        raise UserError(f"{str(not_text[0])!r} is not UTF-8 text: give text, JSON or JSONL.")
    if not_text:
        logger.warning("%s: %d files are not UTF-8 text and are left out", source, len(not_text))
    return pieces


def _file_pieces(path: Path, largest: int) -> list[Piece] | None:
    """`None` of a file that is not UTF-8 text."""
    pieces = []
    with path.open("rb") as file:
        for start, data in _cut(file, largest):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                return None
            if "\0" in text:
                return None
            if text.strip():
                pieces.append(Piece(len(data), partial(_read_text, path, start, len(data))))
    return pieces


def _record_pieces(records: Iterator[Record], form: Form) -> list[Piece]:
    pieces = []
    for record in records:
        content = _content(record.row, form, record.where)
        if isinstance(content, np.ndarray):
            sizes = [BYTES_PER_TOKEN * len(content)] if len(content) else []
        else:
            parts = _cut_text(content, form.largest_piece) if content.strip() else []
            sizes = [len(part.encode()) for part in parts]
        for index, size in enumerate(sizes):
            pieces.append(Piece(size, partial(_read_record, record.fetch, form, index)))
    return pieces


def _content(row: Any, form: Form, where: str = "") -> Content:
    """The document in a row."""
    found = _find(row, form.text_field) if isinstance(row, Mapping) else None
    if isinstance(found, str):
        return found
    if found == []:
        return ""
    if isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found):
        return _render(found, form.tokenizer, where)
    if isinstance(found, list) and all(isinstance(entry, int) for entry in found):
        return _checked_ids(found, form.tokenizer, where)
    fields = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
    wanted = form.text_field or "text, content, prompt and response, question and answer, " + (
        "messages, input_ids"
    )
    raise UserError(
        f"{where} has no usable field ({wanted}), only {fields or 'nothing'}: name the field of "
        "the text."
    )


def _find(row: Mapping[str, Any], text_field: str | None) -> Any:
    if text_field is not None:
        return row.get(text_field)
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return row[name]
    for first, second in PAIRED_FIELDS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return f"{row[first]}\n\n{row[second]}"
    return next((row[name] for name in LIST_FIELDS if isinstance(row.get(name), list)), None)


def _render(messages: list[Any], tokenizer: Any, where: str) -> Rendered:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} holds messages and the tokenizer has no chat template: give plain text or a "
            "chat model's tokenizer."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # noqa: BLE001 - templates raise whatever they like
        raise UserError(
            f"{where} holds messages that the chat template does not take ({error}): each must "
            "have a role and content as the model expects."
        ) from error
    # A template that ends a turn with eos and a newline has ended the document itself.
    ended = text.rstrip()
    return Rendered(ended if ended.endswith(tokenizer.eos_token) else text)


def _checked_ids(ids: list[int], tokenizer: Any, where: str) -> np.ndarray:
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise UserError(
            f"{where} has token ids from {min(ids)} to {max(ids)} and the tokenizer has "
            f"{len(tokenizer)} tokens: it was written with another tokenizer."
        )
    return np.asarray(ids, np.int32)


# --- cutting and reading --------------------------------------------------------------------------


def _cut(file: BinaryIO, largest: int) -> Iterator[tuple[int, bytes]]:
    """Start and bytes of consecutive pieces that cover the file."""
    start = 0
    window = file.read(largest + 1)
    while window:
        piece = window if len(window) <= largest else window[: _cut_point(window[:largest])]
        yield start, piece
        start += len(piece)
        window = window[len(piece) :]
        window += file.read(largest + 1 - len(window))


def _cut_point(window: bytes) -> int:
    """Where to end a piece: after a line, else after a word, else between two characters."""
    for separator in (b"\n", b" "):
        if end := window.rfind(separator) + 1:
            return end
    end = len(window)
    # A character of UTF-8 is at most four bytes: one other and up to three of 0b10xxxxxx.
    for start in range(end - 1, max(end - 5, 0), -1):
        if window[start] & 0xC0 != 0x80:
            return start
    return end


def _cut_text(text: str, largest: int) -> list[str]:
    # JSON can hold halves of surrogate pairs, which no tokenizer takes.
    data = text.encode("utf-8", "replace")
    return [type(text)(piece.decode()) for _, piece in _cut(BytesIO(data), largest)]


def _read_bytes(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _read_text(path: Path, start: int, length: int) -> str:
    return _read_bytes(path, start, length).decode()


def _read_json(path: Path, start: int, length: int) -> Any:
    # Of bytes, because a string may not begin with a byte order mark.
    return json.loads(_read_bytes(path, start, length))


def _read_record(fetch: Callable[[], Any], form: Form, index: int) -> Content:
    content = _content(fetch(), form)
    if isinstance(content, np.ndarray):
        return content
    return _cut_text(content, form.largest_piece)[index]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise UserError(
            f"{where} is not JSON ({error}): give one JSON object a line, or a list of them."
        ) from None
