# SPDX-License-Identifier: Apache-2.0
"""The folder of a job: what was written is found again whatever was cut off, nothing is written
twice, and another job's folder is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_nvium.batch.journal import Journal, claim, folder_of, has_results, remove
from vllm_nvium.batch.results import answered, encoded, failed, tokens_of, write_output
from vllm_nvium.errors import UserError

ABOUT = {"INPUT": "a" * 64, "--model": "m", "row seeds": 0}


def result(index: int) -> bytes:
    return encoded({"index": index, "text": "é\n\t\ud800"})


def begin(output: Path, about: dict[str, Any] = ABOUT, rows: int = 5) -> tuple[Journal, Any]:
    lock = claim(folder_of(output), about, output)
    return Journal(folder_of(output), rows), lock


def end(journal: Journal, lock: Any) -> None:
    journal.close()
    lock.close()


def test_a_job_finds_what_it_wrote(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)
    assert journal.add([(3, result(3)), (0, result(0))]) == 2
    end(journal, lock)
    journal, lock = begin(output)
    assert journal.done == 2 and journal.has(3) and not journal.has(1)
    assert journal.add([(3, b"{}"), (1, result(1))]) == 1
    assert [journal.result(index) for index in (0, 1, 3)] == [result(0), result(1), result(3)]
    end(journal, lock)
    journal, lock = begin(output)
    assert journal.done == 3 and journal.result(3) == result(3)
    end(journal, lock)


@settings(deadline=None)  # it waits for the disk
@given(st.data())
def test_whatever_is_cut_off_only_what_is_whole_counts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    output = tmp_path_factory.mktemp("journal") / "out.jsonl"
    rows, written = 8, set()
    for _ in range(3):
        journal, lock = begin(output, rows=rows)
        assert journal.done == len(written)
        assert all(journal.has(index) == (index in written) for index in range(rows))
        assert all(journal.result(index) == result(index) for index in written)
        new = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
        journal.add((index, result(index)) for index in new)
        end(journal, lock)
        shard = max(folder_of(output).glob("rows-*.jsonl"))
        whole = shard.read_bytes()
        kept = data.draw(st.integers(0, len(whole)))
        shard.write_bytes(whole[:kept])
        lines = whole[:kept].split(b"\n")[:-1]
        written |= {int(line.partition(b"\t")[0]) for line in lines}


def test_other_jobs_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)
    with pytest.raises(UserError, match="another process"):
        begin(output)
    journal.add([(0, result(0))])
    end(journal, lock)
    for changed in ({"--model": "n"}, {"row seeds": None}, {"--top": 1}):
        with pytest.raises(UserError, match=f"another job: {next(iter(changed))} is"):
            begin(output, {**ABOUT, **changed})
    with pytest.raises(UserError, match="--model is 'not given'"):
        begin(output, {key: value for key, value in ABOUT.items() if key != "--model"})
    assert has_results(folder_of(output))
    journal, lock = begin(output)
    assert journal.done == 1
    end(journal, lock)


def test_a_job_without_results_may_become_another(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    end(*begin(output))
    assert not has_results(folder_of(output))
    journal, lock = begin(output, {"--model": "n"}, rows=2)
    assert json.loads((folder_of(output) / "manifest.json").read_text()) == {"--model": "n"}
    end(journal, lock)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        begin(output)
    output.unlink()
    folder_of(output).mkdir()
    (folder_of(output) / "mine").touch()
    with pytest.raises(UserError, match="not the folder of a job"):
        begin(output)
    assert (folder_of(output) / "mine").exists()


BODY = {
    "id": "cmpl-1",
    "choices": [{"index": 0, "text": "w4", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1},
}
CHAT_BODY = BODY | {"choices": [{"message": {"content": "w5"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_the_output_is_in_the_order_of_the_input(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    journal, lock = begin(output, rows=3)
    results = [answered(0, "a", BODY), failed(1, None, "a bad row."), answered(2, None, CHAT_BODY)]
    journal.add((index, encoded(results[index])) for index in (2, 0, 1))
    write_output(journal, 3, output)
    end(journal, lock)
    remove(folder_of(output))
    assert list(tmp_path.iterdir()) == [output]
    if output.suffix == ".jsonl":
        assert [json.loads(line) for line in output.read_text().splitlines()] == results
        return
    rows = parquet.read_table(output).to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["text"] for row in rows] == ["w4", None, "w5"]
    assert [row["finish_reason"] for row in rows] == ["length", None, "stop"]
    assert [row["error"] for row in rows] == [None, "a bad row.", None]
    assert [row["status_code"] for row in rows] == [200, 400, 200]
    assert rows[0]["custom_id"] == "a" and rows[0]["completion_tokens"] == 1
    assert json.loads(rows[2]["response"]) == CHAT_BODY


def test_tokens_are_those_that_were_generated() -> None:
    assert tokens_of(answered(0, None, BODY)) == 1
    assert tokens_of(failed(0, None, "bad.")) == 0
