# SPDX-License-Identifier: Apache-2.0
"""Text as blocks of tokens: files, JSONL and `datasets` names are tokenised, joined and cut to one
length. Training, evaluation and self-distillation read their text through this module.
"""

import glob
import json
import logging
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# What counts as text in a folder; a file or a glob that is named is tried whatever its suffix.
PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".toml", ".yaml")
CODE = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
)
TEXT_SUFFIXES = frozenset((*PROSE, *CODE, ".rb", ".php", ".sh", ".sql", ".yml", ".ini", ".cfg"))
RECORD_SUFFIXES = frozenset((".jsonl", ".json"))
TEXT_FIELDS = ("text", "content")
PAIRED_FIELDS = (("prompt", "response"), ("question", "answer"))
LIST_FIELDS = ("messages", "input_ids")

LARGEST_PIECE = 64 * 1024  # bytes
# No tokenizer of ordinary text needs fewer bytes a token, so a first round never reads too much.
FEWEST_BYTES_PER_TOKEN = 2.0
# Weighs documents that are tokens already against text.
BYTES_PER_TOKEN = 4
# Pieces at a time: at most 16 MiB of text in memory.
TOKENISED_AT_ONCE = 256
# Vocabularies are padded to round sizes, but never by a tenth.
LEAST_VOCABULARY_USE = 0.9


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


class NotText(Exception):
    """A file that is not UTF-8 text."""


# --- what callers use -----------------------------------------------------------------------------


def load_blocks(
    sources: Sequence[str],
    tokenizer: Any,
    block_size: int,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    text_field: str | None = None,
    split: str = "train",
    labels: bool = False,
) -> "Dataset":
    """Tokenise text and pack it into blocks.

    Documents are shuffled, each source's evenly between the others', then joined and cut without
    regard to where one ends. A document of text has the tokenizer's bos in front, if it adds one,
    and eos behind; rows of `input_ids` are taken as they are. A document of more than 64 KiB
    (less, if `max_tokens` is so small that a source would otherwise be left out) is cut at line
    ends into pieces that are treated as documents. The same arguments give the same blocks.

    Args:
        sources: each a file, a folder, a glob or, if nothing local has that name, a name of the
            `datasets` library (`name` or `name:config`). A text file is one document, whatever its
            lines. In `.json` and `.jsonl` files and datasets every row is one: its `text`, its
            `content`, `prompt` and `response`, `question` and `answer` (with a blank line
            between), `messages` in the tokenizer's chat template, or `input_ids`.
        tokenizer: a `transformers` tokenizer with an eos token.
        block_size: tokens in a block.
        max_tokens: no more than this many tokens in all; sources share it by their sizes.
        seed: of the order of documents.
        text_field: the field to take instead; text, a list of messages or of token ids.
        split: of sources from the `datasets` library.
        labels: add a column `labels`, which is `input_ids` with -100 at the first token of every
            document that comes after one without eos at its end: it cannot be predicted.

    Returns:
        A dataset in torch format, `input_ids` (and `labels`) [block_size] int64. A last block that
        is not full is left out.

    Raises:
        UserError: nothing usable is there.
    """
    _check_arguments(sources, tokenizer, block_size, max_tokens)
    form = Form(tokenizer, text_field, _largest_piece(len(sources), block_size, max_tokens))
    groups = [_scan(source, form, split) for source in sources]
    documents = _tokenise_until(_interleave(groups, seed), Encoder(tokenizer), max_tokens)
    blocks, targets = pack(documents, block_size, tokenizer.eos_token_id)
    if not len(blocks):
        raise UserError(
            f"{', '.join(map(repr, sources))} gave {sum(map(len, documents))} tokens in "
            f"{len(documents)} documents, and one block needs {block_size}: give more text or a "
            "smaller block size."
        )
    count = len(blocks) if max_tokens is None else max_tokens // block_size
    return _as_dataset(blocks[:count], targets[:count] if labels else None)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that was not made for a model with this vocabulary.

    Raises:
        UserError: it has ids that the model has not, or leaves over a tenth of the model's
            unused.
    """
    size = len(tokenizer)
    if size > vocab_size:
        raise UserError(
            f"The tokenizer has ids up to {size - 1} and the model's vocab_size is {vocab_size}: "
            "use the tokenizer that the model was trained with."
        )
    if size < LEAST_VOCABULARY_USE * vocab_size:
        raise UserError(
            f"The tokenizer has {size} tokens and the model's vocab_size is {vocab_size}, so they "
            "do not belong together: use the tokenizer that the model was trained with."
        )


def check_disk_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Refuse when the file system of `folder` (which need not exist yet) has not that much left.

    Raises:
        UserError: it says how much `what` needs and how much there is.
    """
    existing = Path(folder).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{what} needs about {_gigabytes(needed_bytes)} in {folder}, where "
            f"{_gigabytes(free)} are free: make room or name another folder."
        )


def pack(
    documents: Sequence[np.ndarray], block_size: int, eos_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents and cut the result into blocks; the tokens after the last full one are lost.

    Args:
        documents: [T_i] int, none empty.
        eos_token_id: what the last token of a finished document is.

    Returns:
        blocks: [n, block_size] int64.
        targets: [n, block_size] int64, the same with -100 where a document starts after one that
            is not finished.
    """
    if not documents:
        empty = np.zeros((0, block_size), np.int64)
        return empty, empty
    stream = np.concatenate(documents).astype(np.int64)  # [T]
    targets = stream.copy()
    starts = np.cumsum([len(document) for document in documents])[:-1]
    targets[starts[stream[starts - 1] != eos_token_id]] = IGNORED
    count = len(stream) // block_size
    shape = (count, block_size)
    return (
        stream[: count * block_size].reshape(shape),
        targets[: count * block_size].reshape(shape),
    )


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
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise UserError(
            f"{source!r} is no file or folder, and the datasets library cannot load its split "
            f"{split!r} ({reason.rstrip('.')}): give a file, a folder, a glob or a dataset's name."
        ) from error
    for number in range(len(rows)):
        yield Record(f"{source}, row {number}", rows[number], partial(rows.__getitem__, number))


# --- finding documents ----------------------------------------------------------------------------


def _scan(source: str, form: Form, split: str) -> list[Piece]:
    """Every piece of one source, in the order of its files and rows."""
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
            continue
        try:
            pieces += _file_pieces(path, form.largest_piece)
        except NotText:
            not_text.append(path)
    # Large folders have a few such files, and they should not stop everything.
    if len(not_text) == len(files):
        raise UserError(f"{str(not_text[0])!r} is not UTF-8 text: give text, JSON or JSONL.")
    if not_text:
        logger.warning("%s: %d files are not UTF-8 text and are left out", source, len(not_text))
    return pieces


def _file_pieces(path: Path, largest: int) -> list[Piece]:
    pieces = []
    with path.open("rb") as file:
        for start, data in _cut(file, largest):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                raise NotText from None
            if "\0" in text:
                raise NotText
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


def _largest_piece(num_sources: int, block_size: int, max_tokens: int | None) -> int:
    """Bytes; with few tokens to take, pieces are smaller, so that each source gives about four."""
    if max_tokens is None:
        return LARGEST_PIECE
    share = int(max_tokens * FEWEST_BYTES_PER_TOKEN) // (4 * num_sources)
    return min(LARGEST_PIECE, max(2 * BYTES_PER_TOKEN * block_size, share))


def _cut(file: BinaryIO, largest: int) -> Iterator[tuple[int, bytes]]:
    """Start and bytes of consecutive pieces that cover the file."""
    start = 0
    while window := _read_at(file, start, largest + 1):
        piece = window if len(window) <= largest else window[: _cut_point(window[:largest])]
        yield start, piece
        start += len(piece)


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


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _read_text(path: Path, start: int, length: int) -> str:
    with path.open("rb") as file:
        return _read_at(file, start, length).decode()


def _read_json(path: Path, start: int, length: int) -> Any:
    with path.open("rb") as file:
        return json.loads(_read_at(file, start, length))


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


# --- from documents to blocks ---------------------------------------------------------------------


class Encoder:
    """Contents to documents, with bos and eos where they belong."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
        self.bos = [int(bos)] if adds_bos else []

    def __call__(self, contents: Sequence[Content]) -> list[np.ndarray]:
        """Token ids of each content: [T] int32."""
        texts = [str(content) for content in contents if isinstance(content, str)]
        ids = iter(self._ids(texts))
        return [
            self._document(content, next(ids)) if isinstance(content, str) else content
            for content in contents
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # tokenizers do not take an empty batch
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options).input_ids

    def _document(self, text: str, ids: list[int]) -> np.ndarray:
        front = [] if isinstance(text, Rendered) else self.bos
        back = [] if ids[-1:] == [self.eos] else [self.eos]
        return np.asarray([*front, *ids, *back], np.int32)


def _interleave(groups: Sequence[Sequence[Piece]], seed: int) -> list[Piece]:
    """One order of all pieces: each group shuffled, and every stretch of the result has bytes of
    each group in proportion to the group's size."""
    placed: list[tuple[float, int, Piece]] = []
    for number, pieces in enumerate(groups):
        shuffled = list(pieces)
        random.Random(f"{seed}/{number}").shuffle(shuffled)
        total = sum(piece.size for piece in shuffled)
        before = 0
        for piece in shuffled:
            placed.append(((before + piece.size / 2) / total, number, piece))
            before += piece.size
    placed.sort(key=lambda entry: entry[:2])
    return [piece for _, _, piece in placed]


def _tokenise_until(
    pieces: Sequence[Piece], encode: Encoder, max_tokens: int | None
) -> list[np.ndarray]:
    """Documents of the first pieces that together have `max_tokens`, or of all."""
    if max_tokens is None:
        return _tokenise(pieces, encode)
    documents: list[np.ndarray] = []
    tokens = size = 0
    ratio = FEWEST_BYTES_PER_TOKEN
    while tokens < max_tokens and len(documents) < len(pieces):
        batch = _first_bytes(pieces[len(documents) :], (max_tokens - tokens) * ratio)
        found = _tokenise(batch, encode)
        documents += found
        tokens += sum(map(len, found))
        size += sum(piece.size for piece in batch)
        ratio = size / tokens
    return documents


def _first_bytes(pieces: Sequence[Piece], wanted: float) -> Sequence[Piece]:
    """The fewest first pieces with that many bytes; at least one."""
    ends = np.cumsum([piece.size for piece in pieces])
    return pieces[: int(np.searchsorted(ends, wanted)) + 1]


def _tokenise(pieces: Sequence[Piece], encode: Encoder) -> list[np.ndarray]:
    """Documents of pieces, in their order: [T_i] int32."""
    from datasets import Dataset

    def encode_rows(rows: Mapping[str, list[int]]) -> dict[str, list[np.ndarray]]:
        return {"input_ids": encode([pieces[index].read() for index in rows["piece"]])}

    encoded = Dataset.from_dict({"piece": list(range(len(pieces)))}).map(
        encode_rows,
        batched=True,
        batch_size=TOKENISED_AT_ONCE,
        remove_columns=["piece"],
        keep_in_memory=True,
        load_from_cache_file=False,
        # Given, because otherwise everything that the function refers to is hashed for one.
        new_fingerprint=uuid.uuid4().hex,
        desc="Tokenising",
    )
    chunks = encoded.data.column("input_ids").chunks
    stream = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    return np.split(stream, np.cumsum(lengths)[:-1])


def _as_dataset(blocks: np.ndarray, targets: np.ndarray | None) -> "Dataset":
    from datasets import Dataset

    columns = {"input_ids": blocks} | ({} if targets is None else {"labels": targets})
    return Dataset.from_dict(columns).with_format("torch")


def _check_arguments(
    sources: Sequence[str], tokenizer: Any, block_size: int, max_tokens: int | None
) -> None:
    if not sources:
        raise UserError("No text was given: name at least one file, folder or dataset.")
    if block_size < 2:
        raise UserError(f"The block size is {block_size}, and at least 2 tokens are needed.")
    if max_tokens is not None and max_tokens < block_size:
        raise UserError(
            f"At most {max_tokens} tokens are asked for, which is less than one block of "
            f"{block_size}: ask for more or make blocks smaller."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no eos token, which documents are joined with: set its eos_token."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
