# SPDX-License-Identifier: Apache-2.0
"""Inputs: each block read alone gives the rows of the whole, and bad files are refused."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_nvium.batch.inputs import check_suffix, digest_of, parquet_to_lines, scan
from vllm_nvium.errors import UserError


@settings(deadline=None)  # it waits for the disk
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
