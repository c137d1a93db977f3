# SPDX-License-Identifier: Apache-2.0
"""With routing switched off an N-vium model is the dense model it was made from: greedy tokens are
those of stock vLLM and of transformers on the same weights, eager and compiled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from generate_greedy import NEW_TOKENS, greedy_tokens, prompts
from transformers import PreTrainedModel

from tiny_models import DENSE_KINDS, make_dense
from vllm_nvium.checkpoints.convert import convert
from vllm_nvium.checkpoints.convert.dense import DenseOptions

SCRIPT = Path(__file__).parents[2] / "helpers" / "generate_greedy.py"


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_eager(kind: str, tmp_path: Path) -> None:
    model = make_dense(tmp_path / "dense", kind)
    convert(tmp_path / "dense", tmp_path / "nvium", DenseOptions(exit_layers=[1, 2, 3]))
    dense = greedy_tokens(str(tmp_path / "dense"), enforce_eager=True)
    nvium = greedy_tokens(str(tmp_path / "nvium"), enforce_eager=True)
    assert nvium == dense
    assert all(len(tokens) == NEW_TOKENS for tokens in dense["together"])
    # A model that repeats one token would agree with anything.
    assert len({token for tokens in dense["together"] for token in tokens}) > 30
    for prompt, answer in zip(prompts(), nvium["together"], strict=True):
        assert_greedy_in_transformers(model, prompt, answer)


@torch.no_grad()
def assert_greedy_in_transformers(
    model: PreTrainedModel, prompt: list[int], answer: list[int]
) -> None:
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    taken = logits.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
    assert (logits.max(dim=1).values - taken < 1e-4).all()


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 3}


# Some minutes each; NVIUM_COMPILED=all runs the other family too.
other = pytest.mark.skipif(
    os.environ.get("NVIUM_COMPILED") != "all", reason="takes long: NVIUM_COMPILED=all runs it"
)


@pytest.mark.parametrize(
    ("kind", "length", "fields"),
    [("llama", 1, {}), pytest.param("gemma3", 2, WINDOWS, marks=other)],
)
def test_compiled_segments_do_not_load_each_others_artefacts(
    tmp_path: Path, kind: str, length: int, fields: dict[str, Any]
) -> None:
    # Segments of equal length have equal graphs, up to the names of their layers.
    make_dense(tmp_path / "dense", kind, num_hidden_layers=3 * length, **fields)
    exits = DenseOptions(exit_layers=[length, 2 * length])
    convert(tmp_path / "dense", tmp_path / "nvium", exits)
    expected = greedy_tokens(str(tmp_path / "dense"), enforce_eager=True)
    cache = tmp_path / "cache"
    environment = os.environ | {"VLLM_CACHE_ROOT": str(cache), "VLLM_LOGGING_LEVEL": "INFO"}
    artefacts: list[set[str]] = []
    for run in ("first", "second"):
        out = tmp_path / f"{run}.json"
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path / "nvium"), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert json.loads(out.read_text()) == expected, run
        artefacts.append(set(re.findall(r"AOT compil\S+ .*?(/\S+)", done.stdout + done.stderr)))
    # One artefact per segment, in places of their own. Whether the second run loads them or makes
    # them again is vLLM's affair (its CPU build makes them again); the tokens must be the same.
    assert len(artefacts[0]) == 3
    assert artefacts[1] <= artefacts[0]
