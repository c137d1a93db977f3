# SPDX-License-Identifier: Apache-2.0
"""Text to blocks: nothing but the tail is lost and nothing repeated, the same arguments give the
same blocks, `max_tokens` takes from every source its share, and what cannot be used is refused."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tiny_models import BOS, EOS, save_tokenizer
from vllm_nvium.checkpoints import text as reading
from vllm_nvium.checkpoints.documents import cut, documents_of
from vllm_nvium.checkpoints.text import (
    LARGEST_PIECE,
    check_disk_space,
    check_tokenizer,
    load_blocks,
    pack,
)
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.run import _validation_blocks
from vllm_nvium.errors import UserError

VOCABULARY = 256
WORDS = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whole words `w3 w4 ...`; no bos is added."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, VOCABULARY)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same, and bos is added."""
    folder = tmp_path_factory.mktemp("bos-tokenizer")
    save_tokenizer(folder, VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def words(ids: list[int] | range) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(blocks: datasets.Dataset) -> list[int]:
    return [int(i) for block in blocks["input_ids"] for i in block]


def documents(ids: list[int]) -> list[tuple[int, ...]]:
    """What stands between two eos tokens; the last may be cut."""
    found: list[list[int]] = [[]]
    for i in ids:
        found[-1].append(i)
        if i == EOS:
            found.append([])
    return [tuple(document) for document in found]


# --- packing --------------------------------------------------------------------------------------


@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(2, 50))
def test_pack_keeps_all_but_the_tail(lists: list[list[int]], block_size: int) -> None:
    blocks, targets = pack([np.array(ids, np.int32) for ids in lists], block_size, EOS)
    joined = [i for ids in lists for i in ids]
    kept = len(joined) // block_size * block_size
    assert blocks.shape == targets.shape == (kept // block_size, block_size)
    assert blocks.dtype == targets.dtype == np.int64
    assert blocks.ravel().tolist() == joined[:kept]
    assert ((targets == blocks) | (targets == -100)).all()


def test_labels_leave_out_what_follows_an_unfinished_document() -> None:
    lists = [[3, 4, EOS], [5, 6], [7, 8, 9]]
    blocks, targets = pack([np.array(ids, np.int32) for ids in lists], 4, EOS)
    assert blocks.tolist() == [[3, 4, EOS, 5], [6, 7, 8, 9]]
    assert targets.tolist() == [[3, 4, EOS, 5], [6, -100, 8, 9]]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(WORDS, min_size=1, max_size=12),
    st.lists(WORDS, min_size=1, max_size=12),
    st.integers(2, 24),
    st.integers(0, 3),
)
def test_blocks_hold_every_document_once(
    tokenizer: Any,
    tmp_path: Path,
    text: list[list[int]],
    tokenised: list[list[int]],
    block_size: int,
    seed: int,
) -> None:
    first = write_rows(tmp_path / "text.jsonl", [{"text": words(ids)} for ids in text])
    second = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [*ids, EOS]} for ids in tokenised])
    whole = Counter((*ids, EOS) for ids in text + tokenised)
    total = sum(len(ids) * count for ids, count in whole.items())
    if total < block_size:
        return
    found = stream(load_blocks([first, second], tokenizer, block_size, seed=seed))
    assert len(found) == total // block_size * block_size
    *finished, last = documents(found)
    left = whole - Counter(finished)
    assert sum(left.values()) == sum(whole.values()) - len(finished)
    assert not last or any(ids[: len(last)] == last for ids in left)


def test_format_and_determinism(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": words(range(3, 3 + n))} for n in range(1, 60)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    blocks = load_blocks([source], tokenizer, 16, seed=1)
    assert blocks.column_names == ["input_ids"]
    assert blocks[0]["input_ids"].dtype == torch.int64
    assert blocks[0]["input_ids"].shape == (16,)
    assert stream(blocks) == stream(load_blocks([source], tokenizer, 16, seed=1))
    assert stream(blocks) != stream(load_blocks([source], tokenizer, 16, seed=2))
    with_labels = load_blocks([source], tokenizer, 16, seed=1, labels=True)
    assert with_labels["labels"][:].tolist() == with_labels["input_ids"][:].tolist()


# --- sources --------------------------------------------------------------------------------------


def test_text_file_is_one_document(tokenizer: Any, bos_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w3 w4\nw5\n\nw6\n")
    assert stream(load_blocks([str(path)], tokenizer, 5)) == [3, 4, 5, 6, EOS]
    assert stream(load_blocks([str(path)], bos_tokenizer, 6)) == [BOS, 3, 4, 5, 6, EOS]


def test_folder_and_glob(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("w3")
    (tmp_path / "deep" / "b.py").write_text("w4")
    (tmp_path / "deep" / ".git" / "c.txt").write_text("w5")
    (tmp_path / "d.bin").write_text("w6")
    (tmp_path / "e.txt").write_bytes(b"w7 \xff")
    assert sorted(stream(load_blocks([str(tmp_path)], tokenizer, 4))) == [EOS, EOS, 3, 4]
    assert "1 files are not UTF-8" in caplog.text
    assert stream(load_blocks([str(tmp_path / "**" / "*.py")], tokenizer, 2)) == [4, EOS]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "w3 w4", "content": "w9"}, [3, 4, EOS]),
        ({"id": 1, "content": "w3"}, [3, EOS]),
        ({"prompt": "w3", "response": "w4"}, [3, 4, EOS]),
        ({"question": "w3", "answer": "w4"}, [3, 4, EOS]),
        ({"input_ids": [BOS, 3, 4], "prompt_tokens": 1}, [BOS, 3, 4]),
        ({"messages": [{"role": "user", "content": "w3"}]}, [3, EOS]),
        (
            {"messages": [{"role": "u", "content": "w3"}, {"role": "a", "content": "w4 </s>"}]},
            [3, 4, EOS],
        ),
    ],
)
def test_kinds_of_rows(
    bos_tokenizer: Any, tmp_path: Path, row: dict[str, Any], expected: list[int]
) -> None:
    if not {"messages", "input_ids"} & set(row):
        expected = [BOS, *expected]
    for name in ("a.jsonl", "b.json"):
        source = write_rows(tmp_path / name, [row])
        assert stream(load_blocks([source], bos_tokenizer, len(expected))) == expected
    (tmp_path / "c.json").write_text(json.dumps([row], indent=1))
    found = load_blocks([str(tmp_path / "c.json")], bos_tokenizer, len(expected))
    assert stream(found) == expected


def test_pairs_are_joined_with_a_blank_line(tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    found = documents_of(source, tokenizer, None, "train", LARGEST_PIECE, VOCABULARY)
    assert found == ["a\n\nb"]


def test_byte_order_mark(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w3"}\n{"text": "w4"}\n', "utf-8-sig")
    assert sorted(stream(load_blocks([str(path)], tokenizer, 4))) == [EOS, EOS, 3, 4]


def test_text_field(tokenizer: Any, tmp_path: Path) -> None:
    row = {"text": "w9", "body": "w3", "talk": [{"role": "user", "content": "w4"}], "ids": [5, 6]}
    source = write_rows(tmp_path / "a.jsonl", [row])
    assert stream(load_blocks([source], tokenizer, 2, text_field="body")) == [3, EOS]
    assert stream(load_blocks([source], tokenizer, 2, text_field="talk")) == [4, EOS]
    assert stream(load_blocks([source], tokenizer, 2, text_field="ids")) == [5, 6]


def test_dataset_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["w3", "", "w4"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    blocks = load_blocks(["owner/name:part"], tokenizer, 4, split="test")
    assert sorted(stream(blocks)) == [EOS, EOS, 3, 4]
    load_blocks(["name"], tokenizer, 4)
    assert asked == [("owner/name", "part", "test"), ("name", None, "train")]
    asked.clear()
    config = SimpleNamespace(vocab_size=VOCABULARY)
    start: Any = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(config=config))
    options = TrainOptions(validation=["name", "name:part:test", "name::test"], block_size=4)
    _validation_blocks(options, start, 12)
    assert asked == [("name", None, "validation"), ("name", "part", "test"), ("name", None, "test")]


# --- long documents and max_tokens ----------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["a", "é", "漢", "😀", "\n", " "]), max_size=300).map("".join),
    st.integers(8, 60),
)
def test_cutting_loses_nothing(text: str, largest: int) -> None:
    pieces = list(cut(text, largest))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= largest for piece in pieces)
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece


def test_huge_file_is_cut_at_lines(tokenizer: Any, tmp_path: Path) -> None:
    line = words(range(3, 100)) + "\n"
    path = tmp_path / "huge.txt"
    path.write_text(line * 600)  # 228 KB
    texts = documents_of(str(path), tokenizer, None, "train", LARGEST_PIECE, VOCABULARY)
    assert all(len(text) <= LARGEST_PIECE for text in texts)
    assert "".join(texts) == line * 600
    assert all(text.endswith("\n") for text in texts)
    found = stream(load_blocks([str(path)], tokenizer, 7))
    assert Counter(found)[5] in (599, 600)


@pytest.mark.slow
def test_long_row_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    text = (words(range(3, 100)) + "\n") * 600
    source = write_rows(tmp_path / "a.jsonl", [{"text": text}, {"text": "w200"}])
    found = documents(stream(load_blocks([source], tokenizer, 2)))
    assert len([document for document in found if len(document) > 2]) == 4
    assert (200, EOS) in found


def test_max_tokens_is_shared_by_size(tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for number, count in enumerate((1000, 2000, 5000)):
        row = {"text": words([10 + number] * 9)}
        sources.append(write_rows(tmp_path / f"{number}.jsonl", [row] * count))
    blocks = load_blocks(sources, tokenizer, 16, max_tokens=8003)
    assert len(blocks) == 500
    found = Counter(stream(blocks))
    words_found = 8000 * 9 / 10
    for word, share in ((10, 1 / 8), (11, 2 / 8), (12, 5 / 8)):
        assert abs(found[word] - share * words_found) < 30


def test_few_tokens_still_come_from_every_file(tokenizer: Any, tmp_path: Path) -> None:
    for word in (10, 11, 12):
        (tmp_path / f"{word}.txt").write_text((words([word] * 40) + "\n") * 2000)  # 320 KB
    sources = [str(tmp_path / f"{word}.txt") for word in (10, 11, 12)]
    found = Counter(stream(load_blocks(sources, tokenizer, 32, max_tokens=6400)))
    assert sum(found.values()) == 6400
    assert all(found[word] > 1000 for word in (10, 11, 12))


def test_max_tokens_bounds_what_is_tokenised(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    path.write_text((words(range(3, 100)) + "\n") * 50_000)  # 19 MB
    tokenised = []
    encode = reading.encode

    def counted(documents: Any, tokenizer: Any) -> Any:
        tokenised.extend(map(len, documents))
        return encode(documents, tokenizer)

    monkeypatch.setattr(reading, "encode", counted)
    assert len(load_blocks([str(path)], tokenizer, 100, max_tokens=50_000)) == 500
    # 4 bytes a token.
    assert 190_000 <= sum(tokenised) < 300_000


def test_max_tokens_beyond_what_there_is(tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "w3 w4 w5"}] * 10)
    assert len(stream(load_blocks([source], tokenizer, 8, max_tokens=1000))) == 40


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words_of_it"),
    [
        ("missing.txt", "'{}' does not exist"),
        ("missing/*.txt", "No file matches '{}'"),
        ("empty.txt", "'{}' has no text"),
        ("blank.jsonl", "'{}' has no text"),
        ("no_text", "'{}' is a folder without text files"),
        ("binary.txt", "'{}' is not UTF-8 text"),
        ("zeros.txt", "'{}' is not UTF-8 text"),
        ("fields.jsonl", "{}, line 2 has no usable field (text, content, prompt and response"),
        ("list.jsonl", "{}, line 1 is 3, and an object of fields is needed"),
        ("broken.jsonl", "{}, line 2 is not JSON"),
        ("broken.json", "{} is not JSON"),
        ("others.jsonl", "{}, line 1 has token ids from 3 to 256, and the vocabulary has 256"),
        ("short.txt", "'{}' gave 2 tokens in 1 documents, and one block needs 8"),
    ],
)
def test_refused_sources(tokenizer: Any, tmp_path: Path, source: str, words_of_it: str) -> None:
    (tmp_path / "no_text").mkdir()
    (tmp_path / "no_text" / "a.bin").write_text("w3")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "blank.jsonl").write_text('\n{"text": " "}\n{"messages": []}\n')
    (tmp_path / "binary.txt").write_bytes(b"\x80\x81")
    (tmp_path / "zeros.txt").write_bytes(b"w3\0w4")
    (tmp_path / "fields.jsonl").write_text('{"text": "w3"}\n{"title": "w3"}\n')
    (tmp_path / "list.jsonl").write_text(" 3\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "w3"}\n{"text":\n')
    (tmp_path / "broken.json").write_text('[{"text": "w3"}')
    (tmp_path / "others.jsonl").write_text('{"input_ids": [3, 256]}\n')
    (tmp_path / "short.txt").write_text("w3")
    path = str(tmp_path / source)
    with pytest.raises(UserError) as refusal:
        load_blocks([path], tokenizer, 8)
    assert str(refusal.value).startswith(words_of_it.format(path))


def test_refused_dataset(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        raise FileNotFoundError("no such dataset\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot load its split 'train' \(no such dataset\)"):
        load_blocks(["owner/name"], tokenizer, 8)


def test_refused_arguments(tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "w3 w4"}])
    with pytest.raises(UserError, match="No text was given"):
        load_blocks([], tokenizer, 8)
    with pytest.raises(UserError, match="block size is 1"):
        load_blocks([source], tokenizer, 1)
    with pytest.raises(UserError, match="At most 4 tokens .* one block of 8"):
        load_blocks([source], tokenizer, 8, max_tokens=4)
    with pytest.raises(UserError, match=r"no usable field \(body\), only text"):
        load_blocks([source], tokenizer, 8, text_field="body")


def test_refused_tokenizers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user"}]}])
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(UserError, match="line 1 holds messages that .* not take .only users"):
        load_blocks([chat], tokenizer, 8)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="line 1 holds messages and .* no chat template"):
        load_blocks([chat], tokenizer, 8)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        load_blocks([chat], tokenizer, 8)


def test_tokenizer_must_fit_the_model(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, VOCABULARY)
    check_tokenizer(tokenizer, VOCABULARY + 20)
    # Gemma 3: the tokenizer has a token of pictures that a model for text alone has not.
    check_tokenizer(tokenizer, VOCABULARY - 1)
    with pytest.raises(UserError, match="256 tokens and the model's vocab_size is 512"):
        check_tokenizer(tokenizer, 2 * VOCABULARY)


def test_tokens_must_be_the_models(tokenizer: Any, tmp_path: Path) -> None:
    """Those that occur: a tokenizer may know more, and padding ids of a model may be sampled."""
    (tmp_path / "a.txt").write_text("w3 w254")
    source = str(tmp_path / "a.txt")
    assert stream(load_blocks([source], tokenizer, 3, vocab_size=255)) == [3, 254, EOS]
    with pytest.raises(UserError, match="the token 'w254' of id 254 and .* vocab_size is 254: use"):
        load_blocks([source], tokenizer, 3, vocab_size=254)
    sampled = write_rows(tmp_path / "b.jsonl", [{"input_ids": [3, 259]}])
    assert stream(load_blocks([sampled], tokenizer, 2, vocab_size=260)) == [3, 259]
    with pytest.raises(UserError, match="ids from 3 to 259, and the vocabulary has 259 tokens"):
        load_blocks([sampled], tokenizer, 2, vocab_size=259)


def test_disk_space(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "there", 1, "A checkpoint")
    with pytest.raises(UserError, match=r"A checkpoint needs about 1048576.00 GiB in .* free"):
        check_disk_space(tmp_path / "not" / "there", 2**50, "A checkpoint")
