# SPDX-License-Identifier: Apache-2.0
"""What a run asks of transformers' Trainer, and of the machine, before its first step."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from vllm_nvium.checkpoints.train import run
from vllm_nvium.checkpoints.train.controller import BetaController
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import open_start
from vllm_nvium.checkpoints.train.trainer import NviumTrainer, training_arguments
from vllm_nvium.errors import UserError

NEEDED = TrainOptions(model="m", out="run", text=["a.txt"], validation=["b.txt"])


def test_one_device_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more, Trainer wraps the model in DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = NEEDED.model_copy(update={"trainer": {"use_cpu": False}})
    arguments = training_arguments(tmp_path, 10, options)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == NEEDED.batch_size


def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and training runs in one process"):
        run.train(NEEDED.model_copy(update={"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_parent_and_linear_start_are_where_training_is(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that every machine has beside its CPU."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i % 250}" for i in range(400)))
    where: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda _, model, *more, **named: where.update({name: model.device.type})

    arguments = SimpleNamespace(max_steps=1, device=torch.device("meta"))
    monkeypatch.setattr(run, "training_arguments", lambda *_: arguments)
    monkeypatch.setattr(run, "_losses", note("parent"))
    monkeypatch.setattr(run, "_fit_exits", note("linear start"))
    monkeypatch.setattr(run, "_trained_model", lambda _, start, steps: start.model)
    monkeypatch.setattr(run, "NviumTrainer", lambda **_: None)
    options = TrainOptions(
        model=str(dense_checkpoint), text=[str(text)], validation=[str(text)], block_size=16
    )
    start = open_start(options, tmp_path)
    run._trainer(options, tmp_path, start, is_resumed=False)
    assert where == {"parent": "meta", "linear start": "meta"}


class OneWeight(NviumTrainer):
    """Anything that trains."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        return model.weight.sum() * inputs["input_ids"].float().mean()


def test_save_every_may_change_at_a_resume(tmp_path: Path) -> None:
    def train(save_every: int, resume: str | None) -> set[str]:
        options = NEEDED.model_copy(update={"save_every": save_every, "batch_size": 1})
        model = torch.nn.Linear(1, 1)
        OneWeight(
            model=model,
            args=training_arguments(tmp_path, 6, options),
            train_dataset=Dataset.from_dict({"input_ids": [[1]] * 6}).with_format("torch"),
            plain=model,
            is_dense=True,
            warm_up_steps=0,
            head_loss_steps=0,
            controller=BetaController(0.0),
            autocast=nullcontext,
        ).train(resume_from_checkpoint=resume)
        return {path.name for path in tmp_path.glob("checkpoint-*")}

    assert train(3, None) == {"checkpoint-3", "checkpoint-6"}
    assert train(5, str(tmp_path / "checkpoint-3")) == {"checkpoint-5", "checkpoint-6"}
