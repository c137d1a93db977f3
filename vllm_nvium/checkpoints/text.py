# SPDX-License-Identifier: Apache-2.0
"""Text as blocks of tokens: documents are tokenised, joined and cut to one length. Training,
evaluation and the mask search read their text through this module.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.checkpoints.documents import Content, Rendered, documents_of
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST_PIECE = 64 * 1024  # bytes
# Weighs documents that are tokens already against text.
BYTES_PER_TOKEN = 4
# No tokenizer of ordinary text needs fewer bytes a token.
FEWEST_BYTES_PER_TOKEN = 2.0
# Documents, where all are tokenised; where tokens are counted, it is one at a time.
TOKENISED_AT_ONCE = 256
# Vocabularies are padded to round sizes, but never by a tenth.
LEAST_VOCABULARY_USE = 0.9


def load_blocks(
    sources: Sequence[str],
    tokenizer: Any,
    block_size: int,
    *,
    vocab_size: int | None = None,
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
    ends into pieces that are treated as documents. The same arguments give the same blocks. All of
    the text is held in memory.

    Args:
        sources: each a file, a folder, a glob or, if nothing local has that name, a name of the
            `datasets` library (`name`, `name:config` or `name:config:split`). A text file is one
            document, whatever its lines. In `.json` and `.jsonl` files and datasets every row is
            one: its `text`, its `content`, `prompt` and `response`, `question` and `answer` (with a
            blank line between), `messages` in the tokenizer's chat template, or `input_ids`.
        tokenizer: a `transformers` tokenizer with an eos token.
        block_size: tokens in a block.
        vocab_size: of the model that reads the blocks (default: the tokenizer's). Either may have
            more tokens than the other: models are padded, and a tokenizer has tokens that a model
            for text alone never sees.
        max_tokens: no more than this many tokens in all; sources share it by their sizes.
        seed: of the order of documents.
        text_field: the field to take instead; text, a list of messages or of token ids.
        split: of sources from the `datasets` library that name none.
        labels: add a column `labels`, which is `input_ids` with -100 at the first token of every
            document that comes after one without eos at its end: it cannot be predicted.

    Returns:
        A dataset in torch format, `input_ids` (and `labels`) [block_size] int64. A last block that
        is not full is left out.

    Raises:
        UserError: nothing usable is there, or a token that the model has not.
    """
    from datasets import Dataset

    _check_arguments(sources, tokenizer, block_size, max_tokens)
    largest = _largest_piece(len(sources), block_size, max_tokens)
    known = len(tokenizer) if vocab_size is None else vocab_size
    groups = [documents_of(name, tokenizer, text_field, split, largest, known) for name in sources]
    documents = list(_tokenised(_interleave(groups, seed), tokenizer, known, max_tokens))
    blocks, targets = pack(documents, block_size, tokenizer.eos_token_id)
    if not len(blocks):
        raise UserError(
            f"{', '.join(map(repr, sources))} gave {sum(map(len, documents))} tokens in "
            f"{len(documents)} documents, and one block needs {block_size}: give more text or a "
            "smaller block size."
        )
    count = len(blocks) if max_tokens is None else max_tokens // block_size
    columns = {"input_ids": blocks[:count]} | ({"labels": targets[:count]} if labels else {})
    return Dataset.from_dict(columns).with_format("torch")


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that was not made for a model with this vocabulary: it leaves over a tenth
    of the model's unused. That no token is beyond the model's, `load_blocks` sees to."""
    size = len(tokenizer)
    if size < LEAST_VOCABULARY_USE * vocab_size:
        raise UserError(
            f"The tokenizer has {size} tokens and the model's vocab_size is {vocab_size}, so they "
            "do not belong together: use the tokenizer that the model was trained with."
        )


def check_disk_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Refuse when the file system of `folder` (which need not exist yet) has not that much left."""
    existing = Path(folder).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{what} needs about {needed_bytes / 2**30:.2f} GiB in {folder}, where "
            f"{free / 2**30:.2f} GiB are free: make room or name another folder."
        )


def pack(
    documents: Sequence[np.ndarray], block_size: int, eos_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents and cut the result into blocks; the tokens after the last full one are lost.

    Args:
        documents: [T_i] int, at least one and none empty.
        eos_token_id: what the last token of a finished document is.

    Returns:
        blocks: [n, block_size] int64.
        targets: [n, block_size] int64, the same with -100 where a document starts after one that
            is not finished.
    """
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


def _largest_piece(num_sources: int, block_size: int, max_tokens: int | None) -> int:
    """Bytes; with few tokens to take, pieces are smaller, so that each source gives about four."""
    if max_tokens is None:
        return LARGEST_PIECE
    share = int(max_tokens * FEWEST_BYTES_PER_TOKEN) // (4 * num_sources)
    return min(LARGEST_PIECE, max(2 * BYTES_PER_TOKEN * block_size, share))


def encode(documents: Sequence[Content], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of each, with bos and eos where they belong: [T] int32."""
    bos, eos = tokenizer.bos_token_id, int(tokenizer.eos_token_id)
    adds_bos = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
    texts = [str(document) for document in documents if isinstance(document, str)]
    # Tokenizers do not take an empty batch.
    found = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    upcoming, result = iter(found), []
    for document in documents:
        if isinstance(document, str):
            ids = next(upcoming)
            front = [bos] if adds_bos and not isinstance(document, Rendered) else []
            document = np.asarray([*front, *ids, *([] if ids[-1:] == [eos] else [eos])], np.int32)
        result.append(document)
    return result


def _interleave(groups: Sequence[Sequence[Content]], seed: int) -> list[Content]:
    """One order of all documents: each group shuffled, and every stretch of the result has bytes of
    each group in proportion to the group's size."""
    placed: list[tuple[float, int, Content]] = []
    for number, group in enumerate(groups):
        sized = [(_size(document), document) for document in group]
        random.Random(f"{seed}/{number}").shuffle(sized)
        total, before = sum(size for size, _ in sized), 0
        for size, document in sized:
            placed.append(((before + size / 2) / total, number, document))
            before += size
    placed.sort(key=lambda entry: entry[:2])
    return [document for _, _, document in placed]


def _size(document: Content) -> int:
    """Bytes of UTF-8."""
    if isinstance(document, str):
        return len(document.encode())
    return BYTES_PER_TOKEN * len(document)


def _tokenised(
    documents: Sequence[Content], tokenizer: Any, vocab_size: int, max_tokens: int | None
) -> Iterator[np.ndarray]:
    """The first documents that together have `max_tokens`, or all: [T_i] int32."""
    from datasets.utils import tqdm

    at_once, tokens = (TOKENISED_AT_ONCE if max_tokens is None else 1), 0
    for first in tqdm(range(0, len(documents), at_once), desc="Tokenising"):
        for ids in encode(documents[first : first + at_once], tokenizer):
            if (largest := int(ids.max())) >= vocab_size:
                raise UserError(
                    f"The text has the token {tokenizer.convert_ids_to_tokens(largest)!r} of id "
                    f"{largest} and the model's vocab_size is {vocab_size}: use the tokenizer that "
                    "the model was trained with, or text without that token."
                )
            yield ids
            tokens += len(ids)
        if max_tokens is not None and tokens >= max_tokens:
            return


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
