# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through a real vLLM engine: a run that was cut gives the file of an unbroken
one, and a file that was made in another way is refused before an engine starts."""

import json
import subprocess
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_models import BOS, EOS, make_nvium
from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.checkpoints.text import load_blocks
from vllm_nvium.checkpoints.train import distill
from vllm_nvium.checkpoints.train.distill import Files, recover, schedule, self_distill
from vllm_nvium.checkpoints.train.prompts import read_prompts
from vllm_nvium.errors import UserError

PROMPTS = ["w5 w6", "w7", "w8 w9 w10"]
OPTIONS: dict[str, Any] = {
    "prompts": PROMPTS,
    "max_new_tokens": 24,
    "max_num_seqs": 4,
    "enforce_eager": True,
    # Rounding differs between batches; in float32 too little to change a draw.
    "dtype": "float32",
}
TOKENS = 900


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, Any]]:
    """Replaces the process that samples by one that ends with a status; returns its request."""
    request: dict[str, Any] = {}

    def end_with(status: int) -> dict[str, Any]:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
            request.update(json.loads(Path(command[-1]).read_text()))
            if not status:
                Path(request["out"]).write_text("")
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(subprocess, "run", run)
        return request

    return end_with


def test_resumed_file_equals_unbroken(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Files(self_distill(dense_checkpoint, tmp_path / "a.jsonl", TOKENS, **OPTIONS))
    lines = [json.loads(line) for line in whole.out.read_text().splitlines()]
    assert not whole.partial.exists()

    # A process that died while writing the line after the fifth.
    cut = Files(tmp_path / "b.jsonl")
    data_written = whole.out.read_bytes()
    fifth = sum(len(line) for line in data_written.splitlines(keepends=True)[:5])
    cut.partial.write_bytes(data_written[: fifth + 20])
    cut.header.write_bytes(whole.header.read_bytes())
    # Another batch size, so that every sample but the first five is drawn in other company.
    self_distill(dense_checkpoint, cut.out, TOKENS, **(OPTIONS | {"max_num_seqs": 3}))
    assert cut.out.read_bytes() == data_written

    answers = [line["input_ids"][line["prompt_tokens"] :] for line in lines]
    counts = [len(answer) for answer in answers]
    assert sum(counts) >= TOKENS > sum(counts[:-1])
    assert all(n == 24 or answer[-1] == EOS for n, answer in zip(counts, answers, strict=True))
    assert all(EOS not in answer[:-1] for answer in answers)
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    given = {tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert {tuple(line["input_ids"][: line["prompt_tokens"]]) for line in lines} == given
    # Seeds differ: the same prompt is answered in different ways.
    assert len({tuple(answer) for answer in answers}) > 0.9 * len(answers)

    blocks = load_blocks([str(whole.out)], tokenizer, 32, labels=True)
    assert len(blocks) == sum(len(line["input_ids"]) for line in lines) // 32
    assert (blocks["labels"][:] == IGNORED).any()

    monkeypatch.setattr(subprocess, "run", None)  # a finished file is used as it is
    assert self_distill(dense_checkpoint, whole.out, TOKENS, **OPTIONS) == whole.out


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 11},
        {"seed": 1},
        {"temperature": 0.5},
        {"max_new_tokens": 5},
        {"prompts": ["w5 w6"]},
        {"prompts": ["w5 w6", "w7", "w8 w9 w11"]},
    ],
)
def test_file_of_another_run_is_refused(
    dense_checkpoint: Path,
    tmp_path: Path,
    child: Callable[[int], dict[str, Any]],
    change: dict[str, Any],
) -> None:
    child(0)
    out = tmp_path / "a.jsonl"
    options = {"tokens": 10} | OPTIONS
    self_distill(dense_checkpoint, out, **options)
    before = out.stat().st_mtime_ns
    with pytest.raises(UserError, match=rf"a.jsonl was sampled with {next(iter(change))}"):
        self_distill(dense_checkpoint, out, **(options | change))
    assert out.stat().st_mtime_ns == before


def test_samples_of_another_model_are_refused(
    dense_checkpoint: Path, tmp_path: Path, child: Callable[[int], dict[str, Any]]
) -> None:
    child(0)
    out = self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, **OPTIONS)
    header = Files(out).header
    header.write_text(header.read_text().replace(str(dense_checkpoint.resolve()), "/other"))
    with pytest.raises(UserError, match="was sampled with parent = /other"):
        self_distill(dense_checkpoint, out, 10, **OPTIONS)


def test_file_without_header_is_refused(
    dense_checkpoint: Path, tmp_path: Path, no_engine: None
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("precious\n")
    with pytest.raises(UserError, match=r"exists without a.jsonl.header.json"):
        self_distill(dense_checkpoint, out, 10, **OPTIONS)
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 0}, "tokens of self-distillation is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs of self-distillation is 0"),
        ({"temperature": 0.0}, "temperature of self-distillation is 0.0"),
        ({"out": "a.txt"}, "a.txt must end in .jsonl"),
        ({"parent": "missing"}, "missing has no config.json"),
        ({"max_new_tokens": 512}, "No prompt leaves room for max_new_tokens=512 .* 512 tokens"),
        ({"prompts": None, "max_new_tokens": 512}, "No prompt leaves room"),
        ({"prompt_files": ["missing.jsonl"]}, "'missing.jsonl' does not exist"),
        ({"tokens": 2**50}, "The file of samples needs about .* free"),
    ],
)
def test_refused_arguments(
    dense_checkpoint: Path,
    tmp_path: Path,
    no_engine: None,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"parent": dense_checkpoint, "out": "a.jsonl", "tokens": 10} | OPTIONS | change
    with pytest.raises(UserError, match=sentence):
        self_distill(**options)
    assert not list(tmp_path.iterdir())


def test_nvium_parent_is_refused(tmp_path: Path, no_engine: None) -> None:
    make_nvium(tmp_path / "nvium")
    with pytest.raises(UserError, match="is an N-vium checkpoint"):
        self_distill(tmp_path / "nvium", tmp_path / "a.jsonl", 10, **OPTIONS)


def test_engine_that_fails(
    dense_checkpoint: Path, tmp_path: Path, child: Callable[[int], dict[str, Any]]
) -> None:
    child(3)
    with pytest.raises(UserError, match="stopped with status 3 .* the same command goes on"):
        self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, **OPTIONS)
    assert not (tmp_path / "a.jsonl").exists()


# --- prompts --------------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path) -> None:
    rows = {
        "question.jsonl": {"question": "a", "answer": "b"},
        "prompt.jsonl": {"task_id": 1, "prompt": "a"},
        "turns.jsonl": {"question_id": 1, "turns": ["a", "b"]},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        assert read_prompts([str(tmp_path / name)]) == ["a"]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "messages.json").write_text(json.dumps([{"messages": talk}]))
    (tmp_path / "lines.txt").write_text("a\n\nb c\n")
    both = [str(tmp_path / "messages.json"), str(tmp_path / "lines.txt")]
    assert read_prompts(both) == [talk[:1], "a", "b c"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"text": "a"}', r"line 1 has no prompt .* only text"),
        ("a.jsonl", '{"turns": [], "prompt": 3}', "line 1 has no prompt"),
        ("a.jsonl", "3", "line 1 has no prompt .* only int"),
        ("a.jsonl", "", "has no prompts"),
        ("a.txt", "\n", "has no prompts"),
    ],
)
def test_refused_prompt_files(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_prompts([str(tmp_path / name)])


def test_prompts_are_rendered(
    dense_checkpoint: Path, tmp_path: Path, child: Callable[[int], dict[str, Any]]
) -> None:
    request = child(0)
    self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, prompts=["w5 w6"])
    assert request["prompt_ids"] == [[5, 6]]  # the tiny template adds nothing
    self_distill(dense_checkpoint, tmp_path / "b.jsonl", 10)
    assert request["prompt_ids"] == [[BOS]]


def test_long_prompts_are_left_out(
    dense_checkpoint: Path,
    tmp_path: Path,
    child: Callable[[int], dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = child(0)
    long = " ".join(["w5"] * 500)
    self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, prompts=[long, "w6"])
    assert request["prompt_ids"] == [[6]]
    assert "1 of 2 prompts are left out" in caplog.text


# --- the schedule and the file --------------------------------------------------------------------


def test_schedule_repeats_prompts_with_other_seeds() -> None:
    prompts = [[3], [4], [5]]
    first = list(islice(schedule(prompts, 0), 9))
    assert sorted(first[:3])[0][0] == [3]
    assert [ids for ids, _ in first[:3]] == [ids for ids, _ in first[3:6]]
    assert {tuple(ids) for ids, _ in first[:3]} == {(3,), (4,), (5,)}
    seeds = [seed for _, seed in first]
    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert not set(seeds) & {seed for _, seed in islice(schedule(prompts, 1), 9)}


def test_recover_cuts_an_unfinished_line() -> None:
    line = b'{"input_ids":[3,4,5],"prompt_tokens":1}\n'
    for rest in (b"", b'{"inp', line[:-1]):
        file = BytesIO(line * 2 + rest)
        assert recover(file) == (2, 4)
        assert file.getvalue() == line * 2
        assert file.tell() == len(line) * 2


def test_two_processes_do_not_write_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    out = tmp_path / "a.jsonl"
    with Files(out).partial.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert distill.sample({"out": str(out)}) == 1
    assert "another process is writing" in capsys.readouterr().err
