# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium batch` refuses what cannot work before anything starts, in one sentence, and leaves
nothing behind."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from vllm_nvium.batch.engine import SECRET, SPEED_ONLY, _with_absolute_paths, engine_of
from vllm_nvium.batch.job import rows_per_block
from vllm_nvium.batch.journal import WEIGHTS
from vllm_nvium.cli import batch, main
from vllm_nvium.errors import UserError
from vllm_nvium.weights import digest


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return batch.make_parser(prog="vllm-nvium batch")


def arguments(parser: Any, folder: Path, *words: str) -> argparse.Namespace:
    source = folder / "in.jsonl"
    source.write_text('{"prompt": "w3"}\n')
    return parser.parse_args([str(source), str(folder / "out.jsonl"), "--model", "m", *words])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--replicas", "0"], "--replicas is 0"),
        (["--cpus-per-replica", "0"], "--cpus-per-replica is 0.0"),
        (["--address", "ray://head:10001"], "--address auto"),
        (["--model", "/nowhere/at/all"], "--model is '/nowhere/at/all', which does not exist"),
    ],
)
def test_flags_that_cannot_work(
    parser: argparse.ArgumentParser, tmp_path: Path, words: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        batch.check(arguments(parser, tmp_path, *words))


@pytest.mark.parametrize(
    ("field", "name", "reason"),
    [
        ("input", "missing.jsonl", "INPUT .* is not a file"),
        ("input", "rows.csv", "INPUT .* must end in"),
        ("output", "rows.txt", "OUTPUT .* must end in"),
        ("output", "missing/out.jsonl", "does not exist"),
    ],
)
def test_files_that_cannot_be_used(
    parser: argparse.ArgumentParser, tmp_path: Path, field: str, name: str, reason: str
) -> None:
    args = arguments(parser, tmp_path)
    setattr(args, field, tmp_path / name)
    with pytest.raises(UserError, match=reason):
        batch.check(args)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data-parallel-size", "2"], "--data-parallel-size is 2; a batch job has --replicas"),
        (["--distributed-executor-backend", "ray"], "vLLM's CPU build does not have"),
        (["--nvium-sampling", "mixture"], "--nvium-sampling"),
        (["--max-model-len", "100000"], "max_model_len"),
    ],
)
def test_engines_that_are_refused(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    dense_checkpoint: Path,
    words: list[str],
    reason: str,
) -> None:
    model = ["--model", str(dense_checkpoint)]
    args = arguments(parser, tmp_path, *words, *model)
    with pytest.raises(UserError, match=reason) as refused:
        engine_of(args, arguments(parser, tmp_path, *model))
    assert "\n" not in str(refused.value)


def test_an_engine_is_what_was_given_and_nothing_else(
    parser: argparse.ArgumentParser, tmp_path: Path, nvium_checkpoint: Path
) -> None:
    model = ["--model", str(nvium_checkpoint)]
    words = ["--nvium-sampling", "mixture", "--max-num-seqs", "3", "--hf-token", "secret"]
    words += ["--dtype", "float32"]
    engine = engine_of(
        arguments(parser, tmp_path, *model, *words), arguments(parser, tmp_path, *model)
    )
    assert engine.arguments == {
        "dtype": "float32",
        "max_num_seqs": 3,
        "hf_token": "secret",
        "additional_config": {"nvium_sampling": "mixture"},
    }
    assert engine.about == {
        "--model": str(nvium_checkpoint),
        WEIGHTS: digest(str(nvium_checkpoint)),
        "--dtype": "float32",
        "--nvium-sampling": "mixture",
    }
    assert engine.max_num_seqs == 3 and engine.workers == 1 and engine.is_cpu


def test_rows_name_the_model_as_the_command_does(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    nvium_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replicas get its whole path: they may stand in another folder."""
    monkeypatch.chdir(nvium_checkpoint.parent)
    model = ["--model", nvium_checkpoint.name]
    usual = arguments(parser, tmp_path, *model)
    engine = engine_of(arguments(parser, tmp_path, *model), usual)
    assert engine.frontend["served_model_name"] == [nvium_checkpoint.name]
    assert engine.frontend["model"] == engine.model == str(nvium_checkpoint)
    engine = engine_of(arguments(parser, tmp_path, *model, "--served-model-name", "a", "b"), usual)
    assert engine.frontend["served_model_name"] == ["a", "b"]


def test_flags_that_do_not_count_are_flags(parser: argparse.ArgumentParser) -> None:
    known = {action.dest for action in parser._actions}
    assert known >= SPEED_ONLY | SECRET


def test_dense_models_on_cpu_compute_prompts_at_once(
    parser: argparse.ArgumentParser, tmp_path: Path, dense_checkpoint: Path
) -> None:
    model = ["--model", str(dense_checkpoint)]
    args, usual = (arguments(parser, tmp_path, *model) for _ in range(2))
    assert engine_of(args, usual).arguments == {"enable_chunked_prefill": False}
    # vLLM takes it with prompts in chunks, which is not what the replica would have.
    args = arguments(parser, tmp_path, *model, "--max-num-batched-tokens", "64")
    with pytest.raises(UserError, match="max_num_batched_tokens .64. is smaller"):
        engine_of(args, usual)


def test_files_are_found_wherever_a_replica_stands(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    dense_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(dense_checkpoint)
    (tmp_path / "mask.json").write_text('{"layers": [1]}')
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    model = ["--model", "model", "--tokenizer", "model"]
    args = arguments(
        parser, tmp_path, *model, "--chat-template", "chat.jinja", "--via-sd-mask", "mask.json"
    )
    found = _with_absolute_paths(args)
    assert found.model == found.tokenizer == str(tmp_path / "model")
    assert (
        found.via_sd_mask == found.additional_config["via_sd_mask"] == str(tmp_path / "mask.json")
    )
    assert args.model == "model"
    usual = arguments(parser, tmp_path, *model)
    args = arguments(parser, tmp_path, *model, "--chat-template", "chat.jinja")
    engine = engine_of(args, usual)
    assert engine.frontend["chat_template"] == "{{ messages }}"
    # A job goes on with the same template only.
    assert engine.about["--chat-template"] == "{{ messages }}"
    assert engine.about["--model"] == "model"
    args = arguments(parser, tmp_path, *model, "--chat-template", "none/of.jinja")
    with pytest.raises(UserError, match="--chat-template is 'none/of.jinja', which is neither"):
        engine_of(args, usual)


def test_a_model_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's flag has a default, which would be downloaded."""
    source = tmp_path / "in.jsonl"
    source.write_text("")
    assert main(["batch", str(source), str(tmp_path / "out.jsonl")]) == 2
    assert "--model is not given" in capsys.readouterr().err


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_nvium.cli.eval.run", interrupted)
    assert main(["eval", str(tmp_path), "--text", "a"]) == 130
    assert capsys.readouterr().err == "vllm-nvium eval: interrupted.\n"


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "vllm_nvium.checkpoints.find_spec", lambda name: None if name == "ray" else find(name)
    )
    assert main(["batch", "in.jsonl", "out.jsonl", "--model", "m"]) == 2
    assert "pip install 'vllm-nvium[ray]'" in capsys.readouterr().err


def test_small_jobs_have_a_block_for_every_replica_and_large_ones_few_blocks() -> None:
    assert rows_per_block(1, 4) == 1
    assert rows_per_block(200, 2) == 4
    assert rows_per_block(10_000, 8) == 16
    assert rows_per_block(1_000_000, 8) == 122
    assert rows_per_block(10**9, 8) == 128


def test_adapters_can_be_written_down(
    parser: argparse.ArgumentParser, tmp_path: Path, dense_checkpoint: Path
) -> None:
    """What a job depends on goes into a file, and vLLM's parser makes records of these."""
    model = ["--model", str(dense_checkpoint)]
    args = arguments(parser, tmp_path, *model, "--lora-modules", "a=b")
    engine = engine_of(args, arguments(parser, tmp_path, *model))
    assert "name='a', path='b'" in json.dumps(engine.about)
