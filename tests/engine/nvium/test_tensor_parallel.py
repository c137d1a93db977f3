# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks give the tokens that one gives, and none decides for itself who leaves
at an exit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import make_nvium

NEW_TOKENS = 24


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and sampling parameters, all in one batch. Long parts in common, more than a block
    of the KV cache, so that prefix caching has hits."""
    shared = [3 + 7 * n % 250 for n in range(70)]
    mixture = {"extra_args": {"nvium_sampling": "mixture"}}
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 12},
        {"temperature": 0.7, "seed": 13, "top_k": 20},
        {"temperature": 0.0, **mixture},
        {"temperature": 1.0, "seed": 14, **mixture},
        {"temperature": 0.8, "seed": 15, "top_p": 0.9, **mixture},
        {"temperature": 1.0},
    ]
    return [([*shared[: 70 - 9 * (n % 3)], 5 + n], kind) for n, kind in enumerate(kinds)]


def run(model: str, ranks: int) -> dict[str, Any]:
    """Tokens of two rounds of the same requests: the second finds its prompts in the cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        num_gpu_blocks_override=64,
        block_size=32,
        enforce_eager=True,
        enable_prefix_caching=True,
        tensor_parallel_size=ranks,
        disable_log_stats=False,
        seed=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests()]
    params = [
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **kind) for _, kind in requests()
    ]
    rounds = []
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        rounds.append([list(output.outputs[0].token_ids) for output in outputs])
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "rounds": rounds,
        "hits": values["vllm:prefix_cache_hits"],
    }


HELPERS = Path(__file__).parents[2] / "helpers"


def in_a_process(model: Path, ranks: int, out: Path) -> dict[str, Any]:
    own = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(ranks), str(out)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvium")
    make_nvium(path, num_key_value_heads=2, seed=3)
    return path


def test_two_ranks_give_the_tokens_of_one(checkpoint: Path, tmp_path: Path) -> None:
    one = in_a_process(checkpoint, 1, tmp_path / "1.json")
    two = in_a_process(checkpoint, 2, tmp_path / "2.json")
    assert one["hits"] > 0
    assert two == one
    # Requests without a seed draw anew in the second round; those with one repeat.
    first, second = one["rounds"]
    assert first[:-1] == second[:-1] and first[-1] != second[-1]


class Ranks:
    """vLLM's group as one rank sees it, of which the first has these values."""

    def __init__(self, world_size: int, first: torch.Tensor | None = None) -> None:
        self.world_size, self.first, self.calls = world_size, first, 0

    def broadcast(self, values: torch.Tensor, src: int) -> torch.Tensor:
        self.calls += 1
        assert src == 0 and values.is_contiguous()
        return values if self.first is None else values.copy_(self.first)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_last_bit_decides_nothing_alone(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    from vllm_nvium.model_executor import ranks
    from vllm_nvium.model_executor.layers.exit_head import Exit

    threshold = np.float32(0.3)
    # One rank is a last bit above the threshold where the other is below, and vice versa.
    below, above = (float(np.nextafter(threshold, np.float32(to))) for to in (-1.0, 1.0))
    own = torch.tensor([above, below, 1.0, torch.nan])
    first = torch.tensor([below, above, 1.0, torch.nan])
    seen = []
    for group in (Ranks(world_size), Ranks(world_size, first)):
        monkeypatch.setattr(ranks, "get_tp_group", lambda group=group: group)
        exit_ = Exit.__new__(Exit)
        torch.nn.Module.__init__(exit_)
        exit_.router = torch.nn.Identity()
        exit_.router.constant_margin = None
        values = first if group.first is None else own
        seen.append((exit_.margins(values.clone()) > threshold).tolist())
        # What is the same for all tokens is the checkpoint's, and is not sent.
        exit_.router.constant_margin = 0.5
        assert exit_.margins(own).tolist() == [0.5] * 4
        assert group.calls == (world_size > 1)
    assert (seen[0] == seen[1]) == (world_size > 1)


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
