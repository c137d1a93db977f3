# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what a run that goes on must agree with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from tiny_models import make_dense
from vllm_nvium.checkpoints.train.folder import DIGESTS, check_model, claim
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.errors import UserError


def begin(text: str, out: Path) -> TrainOptions:
    """Starts a run and returns the options that go on with it."""
    options = TrainOptions(out=str(out), text=[text])
    with claim(out, options):
        pass
    return options.model_copy(update={"resume": True})


def test_a_run_goes_on_with_its_own_text_only(tmp_path: Path) -> None:
    out, folder = tmp_path / "run", tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    resumed = begin(str(folder), out)
    with claim(out, resumed):
        pass
    (folder / "b.txt").write_text("tow")
    with (
        pytest.raises(UserError, match="--text is .*, which has changed since"),
        claim(out, resumed),
    ):
        pass
    # As runs of before the text was noted.
    record = json.loads((out / "run.json").read_text())
    del record[DIGESTS]
    (out / "run.json").write_text(json.dumps(record))
    with claim(out, resumed):
        pass


@pytest.mark.parametrize("text", ["~", "~/**/*.txt"])
def test_what_a_run_writes_is_no_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match="--out is .*, where --text .* would find what the run"):
        begin(text, tmp_path / "runs" / "first")
    assert not (tmp_path / "runs").exists()
    begin("~/*.txt", tmp_path / "runs" / "first")


def test_a_run_goes_on_with_its_own_model_only(dense_checkpoint: Path, tmp_path: Path) -> None:
    """And does not write what it trained beside the weights of another."""
    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(dense_checkpoint, model)
    options = TrainOptions(out=str(out), model=str(model), resume=True)
    with claim(out, options.model_copy(update={"resume": False})):
        check_model(out, options)
        make_dense(model, seed=5)
        with pytest.raises(UserError, match="^MODEL is .*, whose weights or configurations have"):
            check_model(out, options)
    with pytest.raises(UserError, match="have changed since"), claim(out, options):
        pass
    shutil.rmtree(model)
    with pytest.raises(UserError, match="cannot be read any more"), claim(out, options):
        pass
    # All weights are trained, and what they began as is in the run's own folder.
    record = json.loads((out / "run.json").read_text()) | {"method": "full"}
    (out / "run.json").write_text(json.dumps(record))
    (out / "start").mkdir()
    with claim(out, options.model_copy(update={"method": "full"})):
        pass


def test_datasets_are_told_apart_by_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def builder(name: str, config: str | None) -> SimpleNamespace:
        asked.append((name, config))
        return SimpleNamespace(hash=version)

    version = "first"
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    resumed = begin("owner/name:config", tmp_path / "run")
    assert asked == [("owner/name", "config")]
    with claim(tmp_path / "run", resumed):
        pass
    version = "second"
    with (
        pytest.raises(UserError, match="has changed since .* HF_HUB_OFFLINE=1 goes on"),
        claim(tmp_path / "run", resumed),
    ):
        pass
    # The hub cannot be asked.
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    with claim(tmp_path / "run", resumed):
        pass
