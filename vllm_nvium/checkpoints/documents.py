# SPDX-License-Identifier: Apache-2.0
"""Documents in files, JSON rows and data sets: found, checked and cut into pieces.

The loaders of the `datasets` library are not used for files: they say less about a row that cannot
be used, stop at one file that is not text, and keep a copy of everything on the disk.
"""

import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


class Rendered(str):
    """Text with its special tokens in place: a chat template wrote it, so no bos is added."""


# Text, or a document's token ids: [T] int32.
Content = str | np.ndarray


def documents_of(
    source: str,
    tokenizer: Any,
    text_field: str | None,
    split: str,
    largest: int,
    vocab_size: int,
) -> list[Content]:
    """Every document of one source, in the order of its files and rows; text of more than `largest`
    bytes in pieces of at most that.

    Raises:
        UserError: there is no such source, no text in it, or a row has token ids that are not
            below `vocab_size`.
    """
    found: list[Content] = []
    for where, row in entries(source, split):
        content = (
            row if isinstance(row, str) else _content(row, where, tokenizer, text_field, vocab_size)
        )
        if isinstance(content, np.ndarray):
            found += [content] if len(content) else []
        else:
            found += [piece for piece in cut(content, largest) if piece.strip()]
    if not found:
        raise UserError(f"{source!r} has no text: give a source with text in it.")
    return found


def entries(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Rows of JSON files and data sets, and other files as their text; each with where it is, for
    messages.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    files = find_files(source)
    if files is None:
        yield from _dataset_rows(source, split)
        return
    not_text = []
    for path in files:
        if path.suffix in RECORD_SUFFIXES:
            yield from _json_rows(path)
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            not_text.append(path)
        else:
            yield str(path), text
    # Large folders have a few such files, and they should not stop everything.
    if len(not_text) == len(files):
        raise UserError(f"{str(not_text[0])!r} is not UTF-8 text: give text, JSON or JSONL.")
    if not_text:
        logger.warning("%s: %d files are not UTF-8 text and are left out", source, len(not_text))


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
    if is_file_name or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+|:[\w.-]*:\w+)?", source):
        raise UserError(
            f"{source!r} does not exist: give a file, a folder, a glob or the name of a dataset."
        )
    return None


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


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of a file that holds a list, or one object a line."""
    data = path.read_bytes()  # bytes, because a string may not begin with a byte order mark
    if data[:256].lstrip().startswith(b"["):
        for number, row in enumerate(_parse(data, str(path))):
            yield _checked(row, f"{path}, element {number}")
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _checked(_parse(line, where), where)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise UserError(
            f"{where} is not JSON ({error}): give one JSON object a line, or a list of them."
        ) from None


def _checked(row: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {row!r}, and an object of fields is needed.")
    return where, row


def name_of_dataset(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a dataset that is given as `name`, `name:config` or
    `name:config:split` (`name::split`)."""
    name, config, split = [*source.split(":"), "", ""][:3]
    return name, config or None, split


def _dataset_rows(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of a dataset of the `datasets` library; `split` where it names none."""
    import datasets

    name, config, own_split = name_of_dataset(source)
    split = own_split or split
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - the library's errors share no base class
        raise UserError(
            f"{source!r} is no file or folder, and the datasets library cannot load its split "
            f"{split!r} ({first_line(error)}): give a file, a folder, a glob or a dataset "
            "as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT."
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}, row {number}", row


def _content(
    row: Mapping[str, Any], where: str, tokenizer: Any, text_field: str | None, vocab_size: int
) -> Content:
    """The document in a row."""
    found = row.get(text_field) if text_field is not None else _find(row)
    if isinstance(found, str):
        return found
    if found == []:
        return ""
    if isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found):
        return _render(found, tokenizer, where)
    if isinstance(found, list) and all(isinstance(entry, int) for entry in found):
        return _checked_ids(found, vocab_size, where)
    wanted = text_field or (
        "text, content, prompt and response, question and answer, messages, input_ids"
    )
    raise UserError(
        f"{where} has no usable field ({wanted}), only {', '.join(row) or 'nothing'}: name the "
        "field of the text."
    )


def _find(row: Mapping[str, Any]) -> Any:
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


def _checked_ids(ids: list[int], vocab_size: int, where: str) -> np.ndarray:
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"{where} has token ids from {min(ids)} to {max(ids)}, and the vocabulary has "
            f"{vocab_size} tokens: it was written with another tokenizer."
        )
    return np.asarray(ids, np.int32)


def cut(text: str, largest: int) -> Iterator[str]:
    """Consecutive pieces of at most so many bytes of UTF-8: each ends after a line, else after a
    word, else between two characters."""
    # JSON can hold halves of surrogate pairs, which no tokenizer takes.
    data, start = text.encode("utf-8", "replace"), 0
    while start < len(data):
        # Half a character at the end is left for the next piece.
        piece = data[start : start + largest].decode(errors="ignore")
        if start + largest < len(data):
            piece = piece[: piece.rfind("\n") + 1 or piece.rfind(" ") + 1 or len(piece)]
        yield type(text)(piece)
        start += len(piece.encode())
