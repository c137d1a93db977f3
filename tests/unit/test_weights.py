# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a checkpoint's weights: the same wherever and in however many files they lie,
another for other weights, and none where it cannot be computed. And a digest of all of it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import make_dense
from vllm_nvium import weights
from vllm_nvium.weights import TENSOR, checkpoint_name, digest, fingerprint

LAYERS = 4


@pytest.fixture(scope="module")
def known(dense_checkpoint: Path) -> str:
    found = fingerprint(str(dense_checkpoint), LAYERS)
    assert found is not None and len(found) == 64
    return found


def changed(path: Path, name: str, value: torch.Tensor | None) -> str | None:
    """The fingerprint with one tensor replaced, or left out; the file is put back."""
    file = path / "model.safetensors"
    before = file.read_bytes()
    state = load_file(file)
    state.pop(name)
    save_file(state if value is None else state | {name: value}, file)
    try:
        return fingerprint(str(path), LAYERS)
    finally:
        file.write_bytes(before)


def test_files_and_places_do_not_matter(known: str, tmp_path: Path) -> None:
    make_dense(tmp_path / "whole")
    make_dense(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for folder in ("whole", "parts"):
        assert fingerprint(str(tmp_path / folder), LAYERS) == known
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    assert fingerprint(str(tmp_path / "parts"), LAYERS) is None


def test_other_weights_have_another(known: str, tmp_path: Path) -> None:
    make_dense(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for layer in (0, 2, 3):
        name = TENSOR.format(layer)
        nudged = state[name].clone()
        nudged[7, 3] += 1e-6
        assert changed(tmp_path, name, nudged) not in (None, known)
    make_dense(tmp_path / "half", dtype=torch.bfloat16)
    assert fingerprint(str(tmp_path / "half"), LAYERS) not in (None, known)


def test_a_digest_is_of_all_tensors_and_configurations(tmp_path: Path) -> None:
    """A fingerprint does not tell N-vium checkpoints of one parent apart: this does."""
    make_dense(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = tmp_path / "two"
    known = digest(str(tmp_path / "one"))
    assert known is not None and digest(str(two)) == known
    file = two / "model.safetensors"
    before, state = file.read_bytes(), load_file(file)
    for name, tensor in state.items():
        for place in (0, -1):  # a fine-tune has changed all; added tokens stand at the end
            nudged = tensor.clone()
            nudged.view(-1)[place] += 1e-3
            save_file(state | {name: nudged}, file)
            assert digest(str(two)) not in (None, known), name
    file.write_bytes(before)
    assert digest(str(two)) == known
    (two / "generation_config.json").write_text('{"temperature": 0.5}')
    assert digest(str(two)) not in (None, known)
    for damaged in (before[:7], before[:100], b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(damaged)
        assert digest(str(two)) is None
    assert digest("no/model") is None
    assert digest(str(tmp_path / "nothing here")) is None


def test_none_where_nothing_can_be_told(tmp_path: Path) -> None:
    make_dense(tmp_path)
    name = TENSOR.format(2)
    assert changed(tmp_path, name, None) is None
    assert changed(tmp_path, name, torch.zeros(64, 64, dtype=torch.int8)) is None
    for model in ("no/model", "s3://bucket/model", str(tmp_path / "none"), "model.gguf"):
        assert fingerprint(model, LAYERS) is None
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert fingerprint(str(tmp_path), LAYERS) is None


def test_little_is_read(tmp_path: Path) -> None:
    """A start waits for it: of 400 MB less than one."""
    state = {TENSOR.format(i): torch.zeros(4096, 1024) for i in range(24)}
    save_file(state, tmp_path / "model.safetensors")
    files = weights.weight_files(str(tmp_path))
    parts = weights._first_rows(files, [TENSOR.format(i) for i in (0, 12, 23)])
    assert parts and sum(map(len, parts)) < 1 << 20
    assert fingerprint(str(tmp_path), 24) is not None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("name", "name"),
        ("some/name", "name"),
        ("/a/folder/name/", "name"),
        ("/hub/models--some--name-1.5/snapshots/0123", "name-1.5"),
        ("/hub/models--name/snapshots/0123", "name"),
        ("/models/snapshots/0123", "0123"),
    ],
)
def test_names(model: str, name: str) -> None:
    assert checkpoint_name(model) == name
