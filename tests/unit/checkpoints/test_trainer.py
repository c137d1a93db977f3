# SPDX-License-Identifier: Apache-2.0
"""What a run asks of transformers' Trainer, and of the machine, before its first step."""

from pathlib import Path

import pytest
import torch

from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.run import train
from vllm_nvium.checkpoints.train.trainer import training_arguments
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
        train(NEEDED.model_copy(update={"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
