# SPDX-License-Identifier: Apache-2.0
"""Self-distillation by batch jobs: a run that was cut gives the file of an unbroken one, and a file
that was made in another way is refused before an engine starts."""

import json
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_models import BOS, EOS, make_nvium
from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.checkpoints.text import load_blocks
from vllm_nvium.checkpoints.train import distill
from vllm_nvium.checkpoints.train.distill import schedule, self_distill
from vllm_nvium.checkpoints.train.prompts import prompt_ids, read_prompts
from vllm_nvium.errors import UserError

PROMPTS = ["w5 w6", "w7", "w8 w9 w10"]
OPTIONS: dict[str, Any] = {
    "prompts": PROMPTS,
    "max_new_tokens": 24,
    # Rounding differs between batches; in float32 too little to change a draw.
    "engine": ["--max-num-seqs", "4", "--enforce-eager", "--dtype", "float32"],
}
TOKENS = 900


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(subprocess, "run", refuse)


class Batch:
    """Stands in for `vllm-nvium batch`: answers are made up of a row's seed, and the process can
    end with another status before it has any.

    Attributes:
        rows: of all jobs, in their order; jobs: their commands.
        status: of the next job.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.jobs: list[list[str]] = []
        self.status = 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.jobs.append(command)
        source, out = map(Path, command[command.index("batch") + 1 :][:2])
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        if not self.status:
            self.rows += rows
            out.write_text("".join(json.dumps(self.answered(row)) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, self.status)

    @staticmethod
    def answered(row: dict[str, Any]) -> dict[str, Any]:
        count = 1 + row["seed"] % row["max_tokens"]
        choice = {"token_ids": [20 + (row["seed"] + i) % 50 for i in range(count)]}
        return {"id": "row-0", "error": None, "response": {"body": {"choices": [choice]}}}


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    batch = Batch()
    monkeypatch.setattr(subprocess, "run", batch)
    return batch


def samples_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.engine
def test_samples_of_a_real_engine(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a real batch job: prompts, lengths and ends of the samples. So few tokens are there
    after one round; the tests below have several."""
    # No process of its own for the worker of the engine: one start less to wait for.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tokens = 100
    out = self_distill(dense_checkpoint, tmp_path / "a.jsonl", tokens, **OPTIONS)
    lines = samples_of(out)
    answers = [line["input_ids"][line["prompt_tokens"] :] for line in lines]
    counts = [len(answer) for answer in answers]
    assert sum(counts) >= tokens > sum(counts[:-1])
    assert all(n == 24 or answer[-1] == EOS for n, answer in zip(counts, answers, strict=True))
    assert all(EOS not in answer[:-1] for answer in answers)
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    given = {tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert {tuple(line["input_ids"][: line["prompt_tokens"]]) for line in lines} == given
    # Seeds differ: the same prompt is answered in different ways.
    assert len({tuple(answer) for answer in answers}) > 0.9 * len(answers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.header.json"]

    blocks = load_blocks([str(out)], tokenizer, 32, labels=True)
    assert len(blocks) == sum(len(line["input_ids"]) for line in lines) // 32
    assert (blocks["labels"][:] == IGNORED).any()


def test_a_run_that_was_stopped_goes_on(
    dense_checkpoint: Path, tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = self_distill(dense_checkpoint, tmp_path / "a.jsonl", TOKENS, **OPTIONS)
    rounds, rows = len(batch.jobs), len(batch.rows)
    assert rounds > 1, "answers are shorter than they may be"
    out, write, say = tmp_path / "b.jsonl", distill._write, distill.say
    batch.rows.clear()
    for _ in range(rounds):  # each may be stopped before it has answers, and just after
        batch.status = 3
        with pytest.raises(UserError, match="stopped with status 3 .* the same command goes on"):
            self_distill(dense_checkpoint, out, TOKENS, **OPTIONS)
        batch.status, before = 0, len(batch.jobs)

        def kill(line: str, before: int = before) -> None:
            if len(batch.jobs) > before:
                raise ZeroDivisionError

        monkeypatch.setattr(distill, "say", kill)
        with pytest.raises(ZeroDivisionError):
            self_distill(dense_checkpoint, out, TOKENS, **OPTIONS)
        monkeypatch.setattr(distill, "say", say)
    monkeypatch.setattr(distill, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # all rounds are there, and the file is not
        self_distill(dense_checkpoint, out, TOKENS, **OPTIONS)
    monkeypatch.setattr(distill, "_write", write)
    assert self_distill(dense_checkpoint, out, TOKENS, **OPTIONS) == out
    assert out.read_bytes() == whole.read_bytes()
    assert len(batch.rows) == rows, "no sample is drawn twice"
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{name}.jsonl{more}" for name in "ab" for more in ("", ".header.json")}
    monkeypatch.setattr(subprocess, "run", None)  # a finished file is used as it is
    assert self_distill(dense_checkpoint, whole, TOKENS, **OPTIONS) == whole


def test_what_a_job_is_asked(dense_checkpoint: Path, tmp_path: Path, batch: Batch) -> None:
    self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, replicas=2, **OPTIONS)
    [command] = batch.jobs
    told = dict(zip(command, command[1:], strict=False))
    assert told["--replicas"] == "2" and told["--max-num-seqs"] == "4"
    assert told["--max-model-len"] == str(3 + 24)
    assert told["--generation-config"] == "vllm", "the checkpoint's must not change the sampling"
    assert "--enforce-eager" in command
    assert {row["temperature"] for row in batch.rows} == {1.0}
    assert {row["max_tokens"] for row in batch.rows} == {24}


def test_a_sample_without_an_answer(
    dense_checkpoint: Path, tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"id": "row-7", "error": {"message": "no room"}, "response": None}
    monkeypatch.setattr(Batch, "answered", staticmethod(lambda row: bad))
    with pytest.raises(UserError, match=r"row-7 of self-distillation has no answer \(no room\)"):
        self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, **OPTIONS)
    assert not (tmp_path / "a.jsonl").exists()


def test_ray_is_needed(
    dense_checkpoint: Path, tmp_path: Path, no_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_nvium.checkpoints.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'ray' is not installed: pip install"):
        self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, **OPTIONS)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 11},
        {"seed": 1},
        {"max_new_tokens": 5},
        {"prompts": ["w5 w6"]},
        {"prompts": ["w5 w6", "w7", "w8 w9 w11"]},
    ],
)
def test_file_of_another_run_is_refused(
    dense_checkpoint: Path,
    tmp_path: Path,
    batch: Batch,
    change: dict[str, Any],
) -> None:
    out = tmp_path / "a.jsonl"
    options = {"tokens": 10} | OPTIONS
    self_distill(dense_checkpoint, out, **options)
    before = out.stat().st_mtime_ns
    with pytest.raises(UserError, match=rf"a.jsonl was sampled with {next(iter(change))}"):
        self_distill(dense_checkpoint, out, **(options | change))
    assert out.stat().st_mtime_ns == before


def test_samples_of_another_model_are_refused(
    dense_checkpoint: Path, tmp_path: Path, batch: Batch
) -> None:
    out = self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, **OPTIONS)
    header = distill._header_of(out)
    written = header.read_text()
    header.write_text(written.replace(str(dense_checkpoint.resolve()), "/other"))
    with pytest.raises(UserError, match="was sampled with parent = /other"):
        self_distill(dense_checkpoint, out, 10, **OPTIONS)
    # Of other weights under the same name, and by an earlier version, which wrote no digest.
    digest = json.loads(written)[distill.WEIGHTS]
    header.write_text(written.replace(digest, "0" * 64))
    with pytest.raises(UserError, match="was sampled with weights_digest = 000"):
        self_distill(dense_checkpoint, out, 10, **OPTIONS)
    header.write_text(written.replace(f'"{digest}"', "null"))
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
        ({"replicas": 0}, "replicas of self-distillation is 0"),
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


# --- prompts --------------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path) -> None:
    rows = {
        "question.jsonl": {"question": "a", "answer": "b"},
        "prompt.jsonl": {"task_id": 1, "prompt": "a"},
        "turns.jsonl": {"question_id": 1, "turns": ["a", "b"]},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        assert read_prompts([str(tmp_path / name)]) == [(f"{tmp_path / name}, line 1", "a")]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "messages.json").write_text(json.dumps([{"messages": talk}]))
    (tmp_path / "lines.txt").write_text("a\n\nb c\n")
    both = [str(tmp_path / "messages.json"), str(tmp_path / "lines.txt")]
    assert read_prompts(both) == [
        (f"{tmp_path / 'messages.json'}, element 0", talk[:1]),
        (f"{tmp_path / 'lines.txt'}, line 1", "a"),
        (f"{tmp_path / 'lines.txt'}, line 3", "b c"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"text": "a"}', r"line 1 has no prompt .* only text"),
        ("a.jsonl", '{"turns": [], "prompt": 3}', "line 1 has no prompt"),
        ("a.jsonl", '{"messages": ["a"]}', "line 1 has 'a' among its messages"),
        ("a.jsonl", "3", "line 1 is 3, and an object of fields is needed"),
        ("a.jsonl", "", "has no prompts"),
        ("a.txt", "\n", "has no prompts"),
    ],
)
def test_refused_prompt_files(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_prompts([str(tmp_path / name)])


def test_a_template_that_refuses_a_row(dense_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0].content }}"
    )
    tokenizer.save_pretrained(tmp_path)
    rows = [("a, line 1", "w5"), ("a, line 2", [{"role": "system", "content": "w5"}])]
    with pytest.raises(UserError, match=r"^a, line 2 holds .* \(System role not supported\)"):
        prompt_ids(tmp_path, rows, 1, 512)


def test_prompts_are_rendered(dense_checkpoint: Path, tmp_path: Path, batch: Batch) -> None:
    self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, prompts=["w5 w6"])
    assert {tuple(row["prompt"]) for row in batch.rows} == {(5, 6)}  # the template adds nothing
    batch.rows.clear()
    self_distill(dense_checkpoint, tmp_path / "b.jsonl", 10)
    assert {tuple(row["prompt"]) for row in batch.rows} == {(BOS,)}


def test_long_prompts_are_left_out(
    dense_checkpoint: Path,
    tmp_path: Path,
    batch: Batch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = " ".join(["w5"] * 500)
    self_distill(dense_checkpoint, tmp_path / "a.jsonl", 10, prompts=[long, "w6"])
    assert {tuple(row["prompt"]) for row in batch.rows} == {(6,)}
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
