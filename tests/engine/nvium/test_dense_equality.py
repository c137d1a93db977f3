# SPDX-License-Identifier: Apache-2.0
"""With routing switched off an N-vium model is the dense model it was made from: greedy tokens are
those of stock vLLM on the same weights, eager and compiled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from generate_greedy import NEW_TOKENS, greedy_tokens

from tiny_models import DENSE_KINDS, make_dense
from vllm_nvium.checkpoints.convert import convert
from vllm_nvium.checkpoints.convert.dense import DenseOptions

SCRIPT = Path(__file__).parents[2] / "helpers" / "generate_greedy.py"


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_eager(kind: str, tmp_path: Path) -> None:
    make_dense(tmp_path / "dense", kind)
    convert(tmp_path / "dense", tmp_path / "nvium", DenseOptions(exit_layers=[1, 2, 3]))
    dense = greedy_tokens(str(tmp_path / "dense"), enforce_eager=True)
    nvium = greedy_tokens(str(tmp_path / "nvium"), enforce_eager=True)
    assert nvium == dense
    assert all(len(tokens) == NEW_TOKENS for tokens in dense["together"])
    # A model that repeats one token would agree with anything.
    assert len({token for tokens in dense["together"] for token in tokens}) > 30


def test_compiled_segments_do_not_load_each_others_artefacts(tmp_path: Path) -> None:
    # Segments of equal length have equal graphs, up to the names of their layers.
    make_dense(tmp_path / "dense", num_hidden_layers=6)
    convert(tmp_path / "dense", tmp_path / "nvium", DenseOptions(exit_layers=[2, 4]))
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
