# SPDX-License-Identifier: Apache-2.0
"""Whole runs of `vllm-nvium train` on tiny models: what they start from, what a kill costs them,
what they leave behind, and what they refuse."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiny_models import SIZES, make_dense, make_nvium
from vllm_nvium.checkpoints.text import load_blocks
from vllm_nvium.checkpoints.train import run
from vllm_nvium.checkpoints.train.folder import claim
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.validation import losses_of
from vllm_nvium.cli import main
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

COMMON = ["--block-size", "32", "--batch-size", "4", "--dtype", "float32"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and validation text with something to learn: every word is followed by the next."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)

    def write(path: Path, words: int) -> Path:
        word, lines = 3, []
        for _ in range(words):
            word = word + 1 if draw.random() < 0.8 else draw.randrange(3, 250)
            lines.append(f"w{3 + (word - 3) % 250}")
        path.write_text(" ".join(lines))
        return path

    return write(folder / "train.txt", 6000), write(folder / "valid.txt", 700)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense"
    make_dense(path)
    return path


def arguments(model: Path | str, out: Path, texts: tuple[Path, Path], *more: str) -> list[str]:
    text, validation = map(str, texts)
    return ["train", str(model), "--out", str(out), "--text", text, "--validation", validation,
            *COMMON, *more]  # fmt: skip


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["exits", "lora", "full"])
def test_retrofit(method: str, dense: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [
        "--method",
        method,
        "--exit-layers",
        "1,3",
        "--learning-rate",
        "3e-3",
        "--controller",
        "off",
        "--beta",
        "0.1",
    ]
    assert main(arguments(dense, out, texts, *flags)) == 0
    model = NviumForCausalLM.from_pretrained(out / "model")
    assert model.config.exit_layers == [1, 3]
    lines = history(out)
    # Before any training the mixture is the dense parent.
    assert lines[0]["val_loss"] == lines[0]["parent_loss"]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.1, "it learned something"
    assert 0.2 < lines[-1]["mean_depth"] < 1.0

    parent = AutoModelForCausalLM.from_pretrained(dense)
    changed = {
        name
        for name, tensor in parent.state_dict().items()
        if not torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))
    }
    if method == "exits":
        assert not changed, "the backbone is the parent's, bit for bit"
    elif method == "lora":
        assert changed and all(".self_attn." in name or ".mlp." in name for name in changed)
    if method != "full":
        stored = load_file(out / "exits" / "exits.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
        name = "model.layers.2.mlp.up_proj.weight"
        if method == "lora":
            change = 2 * stored[f"lora.{name}.B"].float() @ stored[f"lora.{name}.A"].float()
            torch.testing.assert_close(model.state_dict()[name], parent.state_dict()[name] + change)
        # Parent and exits make the same checkpoint again.
        again = tmp_path / "again"
        assert main(["convert", str(dense), str(again), "--exits", str(out / "exits")]) == 0
        ours, theirs = load_file(again / "model.safetensors"), model.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("method", ["exits", "lora"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma2", "gemma3"])
def test_other_families(kind: str, method: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """A few steps: they start from the parent's loss, and parent and exits make the checkpoint."""
    parent, out, again = tmp_path / "parent", tmp_path / "run", tmp_path / "again"
    make_dense(parent, kind)
    flags = ["--method", method, "--exit-layers", "1,3", "--tokens", "512"]
    assert main(arguments(parent, out, texts, *flags)) == 0
    first = history(out)[0]
    assert first["val_loss"] == pytest.approx(first["parent_loss"], rel=1e-6)
    model = NviumForCausalLM.from_pretrained(out / "model")
    assert model.config.text_config.model_type == AutoConfig.from_pretrained(parent).model_type
    assert main(["convert", str(parent), str(again), "--exits", str(out / "exits")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, out / "model"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_step_0_has_the_parents_loss(dense: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(dense, out, texts, "--tokens", "128", "--exit-layers", "2")) == 0
    blocks = load_blocks(
        [str(texts[1])], AutoTokenizer.from_pretrained(dense), 32, max_tokens=32768, labels=True
    )
    model = AutoModelForCausalLM.from_pretrained(dense)
    parent = losses_of(model, {"text": blocks}, 4, is_dense=True).mean
    assert history(out)[0]["val_loss"] == pytest.approx(parent, rel=1e-6)


@pytest.mark.parametrize("method", ["exits", "lora"])
def test_killed_and_resumed_equals_unbroken(
    method: str, dense: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--method", method, "--exit-layers", "2", "--save-every", "4", "--tokens", "5120"]
    flags += ["--evaluate-every", "5"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(arguments(dense, unbroken, texts, *flags)) == 0

    command = [sys.executable, "-m", "vllm_nvium.cli", *arguments(dense, broken, texts, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for = f"checkpoint-{4 * random.Random(method).randrange(2, 6)}"
    deadline = time.monotonic() + 120
    while not (broken / wait_for).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "model").exists(), "it was killed before its end"

    assert main(arguments(dense, broken, texts, *flags, "--resume")) == 0
    ours = load_file(broken / "exits" / "exits.safetensors")
    theirs = load_file(unbroken / "exits" / "exits.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history(broken) == history(unbroken)


def test_killed_after_its_last_step_and_resumed_takes_no_more(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A kill while the finished model is calibrated or written."""
    flags = ["--exit-layers", "2", "--save-every", "4", "--tokens", "2560"]
    out = tmp_path / "run"
    assert main(arguments(dense, out, texts, *flags)) == 0
    before = load_file(out / "exits" / "exits.safetensors")
    lines = history(out)
    for folder in ("model", "exits"):
        shutil.rmtree(out / folder)
    assert main(arguments(dense, out, texts, *flags, "--resume")) == 0
    after = load_file(out / "exits" / "exits.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert history(out) == lines
    assert max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")) == 20


def test_a_calibration_on_more_text_measures_the_parent_on_it_too(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--exit-layers", "2", "--tokens", "1280"]
    few, many = ["--calibration-tokens", "128"], ["--calibration-tokens", "512"]
    out, other = tmp_path / "run", tmp_path / "other"
    assert main(arguments(dense, out, texts, *flags, *few)) == 0
    assert main(arguments(dense, out, texts, *flags, *many, "--resume")) == 0
    assert main(arguments(dense, other, texts, *flags, *many)) == 0
    found, expected = (
        json.loads((folder / "exits" / "training.json").read_text()) for folder in (out, other)
    )
    assert found["calibration"] == expected["calibration"]
    assert found["calibration"]["tokens"] == 512


def test_a_checkpoint_cut_by_a_crash_is_passed_over(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--exit-layers", "2", "--save-every", "4", "--tokens", "2560"]
    out = tmp_path / "run"
    assert main(arguments(dense, out, texts, *flags)) == 0
    before = load_file(out / "exits" / "exits.safetensors")
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / "trainer_state.json").unlink()
    (newest / "trained.safetensors").write_bytes(b"cut")
    assert main(arguments(dense, out, texts, *flags, "--resume")) == 0
    after = load_file(out / "exits" / "exits.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_from_scratch_against_a_dense_twin(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "twin"
    scratch = ["--method", "scratch", "--tokenizer", str(dense), "--tokens", "5120"]
    assert main(arguments(dense / "config.json", twin, texts, *scratch)) == 0
    assert json.loads((twin / "model" / "config.json").read_text())["model_type"] == "llama"
    curve = twin / "history.jsonl"
    assert history(twin)[-1]["val_loss"] < history(twin)[0]["val_loss"]

    shape = tmp_path / "nvium.json"
    fields = SIZES | {"exit_layers": [1, 2, 3], "intermediate_size": 64}
    shape.write_text(json.dumps(NviumConfig(**fields).to_dict()))
    out = tmp_path / "nvium"
    assert main(arguments(shape, out, texts, *scratch, "--controller", str(curve))) == 0
    lines = history(out)
    assert lines[-1]["parent_loss"] == pytest.approx(history(twin)[-1]["val_loss"])
    assert len({line["beta"] for line in lines}) > 1, "the controller moved beta"
    # 40 steps, of which the first 2 are the hazard warm-up, measured every 2: it does not steer.
    assert [line["step"] for line in lines[:2]] == [2, 4]
    assert lines[0]["beta"] == lines[1]["beta"]
    NviumForCausalLM.from_pretrained(out / "model")

    def error(*more: str) -> str:
        given = arguments(shape, tmp_path / "refused", texts, *scratch, *more)
        assert main(given) == 2
        return capfd.readouterr().err

    capfd.readouterr()
    twins = ["--controller", str(curve)]
    assert "--block-size is 16, and the twin" in error(*twins, "--block-size", "16")
    assert "--exit-layers is [1], and --method scratch" in error("--exit-layers", "1")
    assert not (tmp_path / "refused").exists()


def test_config_file(dense: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {dense}\nout: {tmp_path / 'run'}\ntext: {texts[0]}\nvalidation: [{texts[1]}]\n"
        "exit-layers: [2]\nblock_size: 32\nbatch_size: 4\nlearning_rate: 1e-3\ntokens: 256\n"
        "dtype: float32\ntrainer: {max_grad_norm: 0.5}\n"
    )
    assert main(["train", "--config", str(config)]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["learning_rate"] == 1e-3


BAD = {
    "no text": (["--text", "{missing}"], "missing.txt"),
    "empty text": (["--text", "{empty}"], "empty.txt"),
    "exit too deep": (["--exit-layers", "4"], "exit_layers contains 4"),
    "block too long": (["--block-size", "1024"], "--block-size is 1024"),
    "negative beta": (["--beta", "-1"], "--beta is '-1'"),
    "share": (["--head-loss", "1.5"], "--head-loss is '1.5'"),
    "tokenizer": (["--tokenizer", "x"], "--tokenizer is 'x'"),
    "curve": (["--controller", "{missing}"], "--controller names"),
    "no such logger": (
        ["--trainer", '{{"report_to": "wandb"}}'],
        "no Trainer can be made with --trainer",
    ),
    "little text": (["--batch-size", "4000"], "one step needs 4000"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(
    case: str,
    dense: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags, expected = BAD[case]
    (tmp_path / "empty.txt").write_text("")
    paths = {"missing": str(tmp_path / "missing.txt"), "empty": str(tmp_path / "empty.txt")}
    given = [flag.format(**paths) for flag in flags]
    out = tmp_path / "run"
    assert main(arguments(dense, out, texts, *given)) == 2
    error = capfd.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("vllm-nvium train: error:"))
    assert expected in line
    assert "Traceback" not in error
    assert not out.exists()


def test_refused_runs(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def error(arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capfd.readouterr().err

    out = tmp_path / "run"
    more = ["--exit-layers", "2", "--tokens", "256"]
    assert "--resume needs a run" in error(arguments(dense, out, texts, *more, "--resume"))
    assert main(arguments(dense, out, texts, *more)) == 0
    capfd.readouterr()
    assert "holds a run already" in error(arguments(dense, out, texts, *more))
    other = ["--exit-layers", "3", "--tokens", "256", "--resume"]
    assert "--exit-layers is [3]" in error(arguments(dense, out, texts, *other))
    record = (out / "run.json").read_text()
    (out / "run.json").write_text("")
    assert "run.json is damaged (" in error(arguments(dense, out, texts, *more, "--resume"))
    (out / "run.json").write_text(record)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert "new or an empty folder" in error(arguments(dense, full, texts, *more))
    assert (full / "thesis.txt").read_text() == "mine"
    nvium = tmp_path / "nvium"
    make_nvium(nvium)
    parent = arguments(nvium, tmp_path / "a", texts, "--controller", "parent")
    assert "--controller is 'parent'" in error(parent)
    exits = arguments(nvium, tmp_path / "b", texts, "--exit-layers", "1")
    assert "has its exits already" in error(exits)
    own = arguments(dense, tmp_path / "c", texts, "--dense", str(dense))
    assert "is dense itself" in error(own)
    other = arguments(nvium, tmp_path / "d", texts, "--dense", str(full))
    assert "--dense is" in error(other)
    strange = tmp_path / "strange"
    make_dense(strange, vocab_size=SIZES["vocab_size"] + 64)
    other = arguments(nvium, tmp_path / "e", texts, "--dense", str(strange))
    assert "with a vocabulary of" in error(other)
    state = load_file(nvium / "model.safetensors")
    del state["exits.0.norm.weight"]
    save_file(state, nvium / "model.safetensors", {"format": "pt"})
    assert "exits.0.norm.weight" in error(arguments(nvium, tmp_path / "f", texts))
    expected = ["full", "nvium", "run", "strange"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_a_run_that_ends_before_its_first_step(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error nothing is left, so that the same command can be given again. One that was
    interrupted goes on with --resume, and so does one that another process has gone on with."""
    out = tmp_path / "run"
    error: type[BaseException] = RuntimeError
    command = arguments(dense, out, texts, "--exit-layers", "2", "--tokens", "256")

    def end(*_: Any) -> None:
        assert (out / "run.json").exists()
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(run, "_fit_exits", end)
        with pytest.raises(error):
            main(command)
        assert not out.exists()
        error = KeyboardInterrupt
        assert main(command) == 130
    assert main([*command, "--resume"]) == 0
    assert (out / "model").exists()
    run.unclaim(out)
    assert (out / "model").exists()
    # Somebody needed the room.
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = sorted(out.rglob("*"))
    assert main([*command, "--resume"]) == 2
    run.unclaim(out)
    assert sorted(out.rglob("*")) == before


def test_a_run_has_one_process(tmp_path: Path) -> None:
    """Another one would go on with it, or remove it when it is refused."""
    out = tmp_path / "run"
    new, resumed = (TrainOptions(out=str(out), resume=resume) for resume in (False, True))
    with (
        claim(out, new),
        pytest.raises(UserError, match="whose run another process has"),
        claim(out, resumed),
    ):
        pass
    with claim(out, resumed):
        assert (out / "run.json").exists()


def test_training_goes_on_from_an_nvium_checkpoint(
    dense: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its parent is told by --dense, and steers."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(dense, first, texts, "--exit-layers", "2", "--tokens", "512")) == 0
    flags = ["--dense", str(dense), "--tokens", "512"]
    assert main(arguments(first / "model", second, texts, *flags)) == 0
    parent_loss = history(first)[0]["parent_loss"]
    assert history(second)[0]["parent_loss"] == pytest.approx(parent_loss, rel=1e-6)
    NviumForCausalLM.from_pretrained(second / "model")


def test_missing_package(
    dense: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "vllm_nvium.checkpoints.find_spec",
        lambda name: None if name == "peft" else found(name),
    )
    assert main(arguments(dense, tmp_path / "run", texts, "--method", "lora")) == 2
    assert "pip install 'vllm-nvium[train]'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("free", "what"), [(10_000, "GB"), (3_000_000, "the checkpoints of this run needs about")]
)
def test_no_room_on_the_disk(
    free: int,
    what: str,
    dense: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    usage = type("Usage", (), {"total": 1, "used": 1, "free": free})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    flags = ["--exit-layers", "2", "--method", "full"]
    assert main(arguments(dense, tmp_path / "run", texts, *flags)) == 2
    assert what in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
