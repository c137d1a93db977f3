# SPDX-License-Identifier: Apache-2.0
"""Inputs: each block read alone gives the rows of the whole, and bad files are refused."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_nvium.batch.inputs import (
    check_suffix,
    check_unchanged,
    digest_of,
    parquet_to_lines,
    scan,
)
from vllm_nvium.batch.rows import read_fields
from vllm_nvium.errors import UserError


@given(
    st.lists(st.sampled_from([b"", b"  ", b"\r", b"{}", b'{"a": 1}', b"x" * 70]), min_size=1),
    st.integers(1, 5),
    st.booleans(),
)
def test_blocks_are_the_lines_that_are_not_empty(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("inputs") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    rows = [line.strip() for line in lines if line.strip()]
    if not rows:
        with pytest.raises(UserError, match="no rows"):
            scan(path, block)
        return
    found = scan(path, block)
    assert found.rows == len(rows)
    read = [row for number in found.blocks() for row in found.read(number)]
    assert read == list(enumerate(rows))
    assert all(len(found.indices(number)) <= block for number in found.blocks())


def test_parquet_becomes_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "w3", "vllm_xargs": {"a": 1}, "messages": None},
        {"prompt": None, "vllm_xargs": {"b": 2.5}, "messages": [{"role": "user", "content": "é"}]},
        {"prompt": "w4", "stop": ["w5", "w6"]},
    ]
    keys = ["prompt", "vllm_xargs", "messages", "stop"]
    table = pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    parquet_to_lines(tmp_path / "rows.parquet", tmp_path / "rows.jsonl")
    lines = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines == [
        {"prompt": "w3", "vllm_xargs": {"a": 1}},
        {"vllm_xargs": {"b": 2.5}, "messages": [{"role": "user", "content": "é"}]},
        {"prompt": "w4", "stop": ["w5", "w6"]},
    ]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    missing, bad = tmp_path / "missing.jsonl", tmp_path / "bad.parquet"
    bad.write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        digest_of(missing)
    with pytest.raises(UserError, match="cannot be read"):
        scan(missing, 4)
    with pytest.raises(UserError, match="not a readable Parquet file"):
        parquet_to_lines(bad, tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="must end in"):
        check_suffix("INPUT", tmp_path / "rows.csv")
    check_suffix("OUTPUT", tmp_path / "rows.parquet")


def test_text_of_parquet_that_is_not_marked_as_such(tmp_path: Path) -> None:
    """Some writers mark no column as text; what is none is an error of its row."""
    names = pa.array([b"a", b"b", b"c"], pa.binary())
    prompts = pa.Array.from_buffers(
        pa.string(), 3, pa.array([b"w3", b"w\xff", b"w5"], pa.binary()).buffers()
    )
    stops = pa.array([[b"w6"], None, [b"w7"]], pa.list_(pa.binary()))
    table = pa.table({"custom_id": names, "prompt": prompts, "stop": stops})
    parquet.write_table(table, tmp_path / "rows.parquet")
    parquet_to_lines(tmp_path / "rows.parquet", tmp_path / "rows.jsonl")
    first, second, third = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    assert read_fields(first) == {"custom_id": "a", "prompt": "w3", "stop": ["w6"]}
    with pytest.raises(UserError, match="not UTF-8"):
        read_fields(second)
    assert read_fields(third) == {"custom_id": "c", "prompt": "w5", "stop": ["w7"]}


def test_dates_beyond_pythons_are_one_sentence(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["w3"], "day": pa.array([2**30], pa.int32()).cast(pa.date32())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        parquet_to_lines(tmp_path / "rows.parquet", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, change: str) -> None:
    """Its rows would be answered as those of the file that it was."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "w3"}\n{"prompt": "w4"}\n')
    _, state = digest_of(path)
    found = scan(path, 1)
    check_unchanged(path, state)
    if change == "append":
        with path.open("a") as file:
            file.write('{"prompt": "w5"}\n')
    else:
        path.unlink()
    if change == "replace":
        path.write_text('{"prompt": "w5"}\n{"prompt": "w4"}\n')
    with pytest.raises(UserError, match="was changed while the job ran"):
        list(found.read(0))
    with pytest.raises(UserError, match="was changed while the job ran"):
        check_unchanged(path, state)
