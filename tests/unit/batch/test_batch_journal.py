# SPDX-License-Identifier: Apache-2.0
"""The folder of a job: what was written is found again whatever was cut off, nothing is written
twice, and another job's folder is refused."""

import fcntl
import json
import os
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_nvium.batch.inputs import parquet_to_lines
from vllm_nvium.batch.journal import (
    WEIGHTS,
    Journal,
    claim,
    folder_of,
    has_results,
    on_disk,
    remove,
)
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


def test_weights_are_compared_where_they_are_known(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output, {**ABOUT, WEIGHTS: "one"})
    journal.add([(0, result(0))])
    end(journal, lock)
    with pytest.raises(UserError, match="the weights or configurations of --model are others"):
        begin(output, {**ABOUT, WEIGHTS: "two"})
    for known in ("one", None):
        end(*begin(output, {**ABOUT, WEIGHTS: known}))
    end(*begin(output))  # a job of an earlier version


def test_a_job_without_results_may_become_another(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    end(*begin(output))
    assert not has_results(folder_of(output))
    journal, lock = begin(output, {"--model": "n"}, rows=2)
    assert json.loads((folder_of(output) / "manifest.json").read_text()) == {"--model": "n"}
    end(journal, lock)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, text: str) -> None:
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)
    journal.add([(0, result(0))])
    end(journal, lock)
    (folder_of(output) / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged, .*move the folder away"):
        begin(output)
    assert has_results(folder_of(output))


def test_rows_of_a_parquet_file_are_there_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that goes on takes what it finds for all of them."""
    rows = pyarrow.table({"prompt": ["w3"] * 3000})
    parquet.write_table(rows, tmp_path / "in.parquet")
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        assert not (tmp_path / "input.jsonl").exists()

    monkeypatch.setattr(os, "fsync", sync)
    parquet_to_lines(tmp_path / "in.parquet", tmp_path / "input.jsonl")
    assert synced == [(tmp_path / "input.jsonl").stat().st_size]
    assert len((tmp_path / "input.jsonl").read_bytes().splitlines()) == 3000


def test_what_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    end(*begin(output))
    (folder_of(output) / ".input.jsonl.7.partial").write_text("{")
    end(*begin(output))
    assert not [*folder_of(output).glob(".*")]


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


def test_an_output_that_came_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """A job without results, whose folder may be all that a killed one has left, is refused at
    once; one that is complete, when it would write."""
    output = tmp_path / "out.jsonl"
    end(*begin(output))
    output.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        begin(output, {"--model": "n"})
    output.unlink()
    journal, lock = begin(output, rows=1)
    journal.add([(0, result(0))])
    output.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_output(journal, 1, output)
    assert output.read_text() == "mine" and journal.has(0)
    assert sorted(tmp_path.iterdir()) == [output, folder_of(output)]
    end(journal, lock)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_job_that_was_killed_while_it_wrote_its_output_writes_it(
    tmp_path: Path, name: str
) -> None:
    output, other = tmp_path / name, tmp_path / f".{name}.b{Path(name).suffix}.7.partial"
    partial = tmp_path / f".{name}.4711.partial"
    partial.write_text("half")
    other.write_text("of another job")
    for _ in range(2):  # before the output had its name, and after
        journal, lock = begin(output, rows=1)
        journal.add([(0, encoded(answered(0, "a", BODY)))])
        write_output(journal, 1, output)
        end(journal, lock)
        assert output.exists() and other.exists() and not partial.exists()


def test_a_folder_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of it, there is no folder that could be taken for a job's."""
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)
    journal.add([(0, result(0))])
    end(journal, lock)

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "lock").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        remove(folder_of(output))
    assert not folder_of(output).exists()
    end(*begin(output))
    remove(folder_of(output))
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_folder_that_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has ended its job between this one's look and its lock."""
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)

    def ends_first(*args: Any) -> None:
        end(journal, lock)
        remove(folder_of(output))
        monkeypatch.undo()
        fcntl.flock(*args)

    monkeypatch.setattr("fcntl.flock", ends_first)
    with pytest.raises(UserError, match="another process"):
        begin(output)


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    journal, lock = begin(output)
    journal.add([(1, result(1))])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        with pytest.raises(UserError, match="results cannot be kept in"), on_disk(journal.folder):
            journal.add([(0, b"{" + b" " * 99 + b"}")])
        end(journal, lock)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal, lock = begin(output)
    assert journal.done == 1 and journal.result(1) == result(1)
    end(journal, lock)


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    folder_of(output).write_text("mine")
    with pytest.raises(UserError, match="results cannot be kept in"), on_disk(folder_of(output)):
        begin(output)


def test_what_parquet_has_no_text_for_is_spelt_out(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    journal, lock = begin(output, rows=1)
    journal.add([(0, encoded(failed(0, "a\ud800", "bad \udfff.")))])
    write_output(journal, 1, output)
    end(journal, lock)
    [row] = parquet.read_table(output).to_pylist()
    assert row["custom_id"] == "a\\ud800" and row["error"] == "bad \\udfff."
