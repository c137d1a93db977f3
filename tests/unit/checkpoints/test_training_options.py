# SPDX-License-Identifier: Apache-2.0
"""Flags and configuration files of `vllm-nvium train`: flags win over the file, the file over the
defaults, and a value of the wrong kind is refused in one sentence wherever it stands."""

import argparse
import json
from pathlib import Path

import pytest

from vllm_nvium.checkpoints.train.folder import RECORD, check_twin
from vllm_nvium.checkpoints.train.options import TrainOptions, check
from vllm_nvium.cli import main
from vllm_nvium.cli.train import add_arguments, options_of
from vllm_nvium.errors import UserError

NEEDED = ["MODEL", "--out", "run", "--text", "a.txt", "b", "--validation", "c.txt"]


def parsed(*words: str) -> TrainOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = options_of(parser.parse_args(words))
    check(options)
    return options


def config(folder: Path, text: str, name: str = "run.yaml") -> list[str]:
    (folder / name).write_text(text)
    return ["--config", str(folder / name)]


def test_flags() -> None:
    options = parsed(*NEEDED, "--exit-layers", "1,3", "--learning-rate", "1e-3")
    assert options == TrainOptions(
        model="MODEL",
        out="run",
        text=["a.txt", "b"],
        validation=["c.txt"],
        exit_layers=[1, 3],
        learning_rate=1e-3,
    )
    # The word after a switch is not the switch's.
    assert parsed("--resume", *NEEDED) == parsed(*NEEDED, "--resume")
    assert parsed(*NEEDED[1:], "--model", "MODEL") == parsed(*NEEDED)
    assert parsed(*NEEDED, "--trainer", '{"max_grad_norm": 0.5}').trainer == {"max_grad_norm": 0.5}


def test_flags_over_file_over_defaults(tmp_path: Path) -> None:
    file = config(
        tmp_path,
        "model: other\ntext: other.txt\nexit-layers: [2, 3]\nblock_size: 32\nbatch_size: 4\n"
        "learning_rate: 1e-3\nresume: true\nprompts: []\ncontroller: off\n"
        "trainer: {max_grad_norm: 0.5}\n",
    )
    options = parsed(*NEEDED, *file, "--batch-size", "2", "--beta", "0")
    assert (options.model, options.text) == ("MODEL", ["a.txt", "b"])
    assert (options.block_size, options.batch_size, options.beta) == (32, 2, 0.0)
    assert (options.exit_layers, options.learning_rate) == ([2, 3], 1e-3)
    assert options.resume and options.controller == "off" and options.prompts == []
    assert options.trainer == {"max_grad_norm": 0.5}
    assert options.seed == TrainOptions().seed


def test_a_file_alone(tmp_path: Path) -> None:
    text = (
        '{"model": "m", "out": "-run", "text": "a.txt", "validation": ["b c", "d"], '
        '"exit_layers": 2, "beta": 1e-3, "resume": false}'
    )
    assert parsed(*config(tmp_path, text, "run.json")) == TrainOptions(
        model="m", out="-run", text=["a.txt"], validation=["b c", "d"], exit_layers=[2], beta=1e-3
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "many"], "--tokens is 'many': input should be a valid integer"),
        (["--exit-layers", "1,x"], "--exit-layers is 'x': input should be a valid integer"),
        (["--method", "all"], "--method is 'all': input should be 'exits', 'lora'"),
        (["--dtype", "int8"], "--dtype is 'int8': input should be 'bfloat16' or 'float32'"),
        (["--trainer", "[3]"], "--trainer is [3]: input should be a valid dictionary"),
        (["--trainer", "{"], "--trainer is '{': expecting property name"),
        (["--trainer", '{"max_steps": 3}'], "max_steps is what --tokens is for"),
        (["--no-such-flag", "3"], "unrecognized arguments: --no-such-flag 3"),
        (["--block-size", "1"], "--block-size is '1': input should be greater than or"),
        (["--learning-rate", "0"], "--learning-rate is '0': input should be greater than 0"),
        (["--seed", "-1"], "--seed is '-1': input should be greater than or equal to 0"),
        (["--seed", str(2**32)], "--seed is '4294967296': input should be less than or"),
        (["--prompts", "p.txt"], "--prompts is ['p.txt'], but nothing is sampled"),
        (["--hazard-warm-up", "2"], "--hazard-warm-up is '2': input should be less than or"),
    ],
)
def test_refused_flags(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *NEEDED, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-nvium train: error: ") and error.count("\n") == 1
    assert sentence in error


def test_a_twin_is_measured_as_the_run_is(tmp_path: Path) -> None:
    """A run that goes on with a trained model names no tokenizer, and its twin's had to."""
    history, given = tmp_path / "history.jsonl", {"validation": ["a.txt"]}
    twin = TrainOptions(method="scratch", tokenizer="words", **given)
    (tmp_path / RECORD).write_text(json.dumps(twin.record()))
    check_twin(history, twin)
    check_twin(history, TrainOptions(method="full", **given))
    with pytest.raises(UserError, match="--tokenizer is 'other', and the twin"):
        check_twin(history, TrainOptions(method="scratch", tokenizer="other", **given))
    with pytest.raises(UserError, match="--block-size is 16, and the twin"):
        check_twin(history, TrainOptions(method="full", block_size=16, **given))


@pytest.mark.parametrize("name", ["model", "out", "text", "validation"])
def test_what_every_run_needs(name: str, tmp_path: Path) -> None:
    lines = {"model": "m", "out": "o", "text": "t", "validation": "v"}
    text = "".join(f"{key}: {value}\n" for key, value in lines.items() if key != name)
    with pytest.raises(UserError, match="is missing, and a run needs it") as refusal:
        parsed(*config(tmp_path, text))
    assert str(refusal.value).startswith("MODEL" if name == "model" else f"--{name}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tokens: many", "--tokens is 'many': input should be a valid integer"),
        ("tokens: 1.5", "--tokens is '1.5': input should be a valid integer"),
        ("tokens: true", "--tokens is 'true': input should be a valid integer"),
        ("tokens:", "--tokens has no value"),
        ("text: ~", "--text has no value"),
        ("tokens: [3]", "--tokens is ['3']: input should be a valid integer"),
        ("out: {a: b}", "--out is {'a': 'b'}: input should be a valid string"),
        ("trainer: 3", "--trainer is 3: input should be a valid dictionary"),
        ("method: all", "--method is 'all': input should be 'exits'"),
        ("resume: 3", "--resume is '3': input should be a valid boolean"),
        ("blocksize: 3", "--blocksize is '3': extra inputs are not permitted"),
        ("config: other.yaml", "--config is 'other.yaml': extra inputs are not permitted"),
        ("no: 1", "--no is '1': extra inputs are not permitted"),
        ("yes: 1\ntrue: 2", "YAML reads names of it in another way"),
        ("!!set {seed, tokens}", "it holds no options by name"),
        ("trainer: {run_name: 2026-11-30}", "'run_name': datetime.date(2026, 11, 30)}: object of"),
        ("- a", "it holds no options by name"),
        ("a: [", "it cannot be read (while parsing"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, sentence: str) -> None:
    file = config(tmp_path, text)
    with pytest.raises(UserError) as refusal:
        parsed(*NEEDED, *file)
    assert str(refusal.value).startswith(f"--config {file[1]}: ")
    assert sentence in str(refusal.value)


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match="--config no.yaml: it cannot be read .* No such file"):
        parsed(*NEEDED, "--config", "no.yaml")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--block-size BLOCK_SIZE context length in training, tokens (default: 512)" in text
    assert "--exit-layers L1,L2,... of a dense start" in text
