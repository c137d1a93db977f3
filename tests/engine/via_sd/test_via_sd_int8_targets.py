# SPDX-License-Identifier: Apache-2.0
"""Targets whose weights have eight bits already: their slim verifier has copies in four, and the
tokens are those of plain decoding."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from starts import refusal, start
from trace_engine import Arrival, TraceEngine
from via_sd_engine import NGRAM, TARGET, ViaSDEngine

from tiny_models import make_dense, quantise_to_int8
from vllm_nvium.model_executor.layers.low_precision_linear import INT4, Int4Linear
from vllm_nvium.via_sd.options import options_of

# Whole prompts at once: plain vLLM ends on CPU where a seeded request's prompt comes in parts.
ROOM = {"num_gpu_blocks_override": 30, "max_num_batched_tokens": 512}


def arrivals(size: int = 6) -> list[Arrival]:
    """Greedy requests and ones with a seed, in one batch as far as they fit."""
    found = []
    for n in range(size):
        prompt = [3 + (7 * k + 11 * n) % 60 for k in range(10 + 9 * n)]
        sampled = {"temperature": 1.0, "seed": n} if n % 3 == 2 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=40, ignore_eos=True, **sampled)
        found.append(Arrival(n // 2, prompt, params))
    return found


def tokens_of(engine: TraceEngine) -> list[list[int]]:
    emitted = engine.run(arrivals())
    return [emitted[str(n)].tokens for n in range(len(emitted))]


def fused(meant: dict[str, torch.Tensor], layer: int, names: Sequence[str]) -> torch.Tensor:
    """What layers of a checkpoint stand for that are one in vLLM."""
    return torch.cat([meant[f"model.layers.{layer}.{name}.weight"] for name in names])


PARTS = {
    "self_attn.qkv_proj": [f"self_attn.{name}_proj" for name in "qkv"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


def check_copies(engine: ViaSDEngine, meant: dict[str, torch.Tensor]) -> None:
    """They are copies of what the levels of the target stand for."""
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(engine.runner.slim.layers.layers):
        for name, parts in PARTS.items():
            copy = layer.get_submodule(name).low_precision
            weight = fused(meant, number, parts)
            assert type(copy) is Int4Linear and copy.outputs == len(weight)
            x = torch.randn(3, weight.shape[1], generator=generator)
            due = x.to(torch.bfloat16).float() @ Int4Linear.meant(weight).t()
            torch.testing.assert_close(
                copy.multiply(x), due, rtol=0.03, atol=0.03 * float(due.abs().max())
            )


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_tokens_are_those_of_plain_decoding(tmp_path: Path, strategy: str) -> None:
    make_dense(tmp_path, "qwen2", seed=1, **TARGET)  # has biases
    meant = quantise_to_int8(tmp_path, strategy)
    plain = tokens_of(TraceEngine(str(tmp_path), **ROOM))
    options = {"slim": "int4", "window": 8, "rounds": 4}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, **ROOM)
    assert tokens_of(engine) == plain
    check_copies(engine, meant)
    counts = engine.runner.session.counts
    assert counts.slim_passes > 10
    assert counts.accepted / counts.window_tokens > 0.3


def test_what_is_left_to_choose_is_four_bits(tmp_path: Path) -> None:
    make_dense(tmp_path, seed=1, **TARGET)
    quantise_to_int8(tmp_path)
    engine = ViaSDEngine(str(tmp_path), None, {"rounds": 3}, **ROOM)
    runner = engine.runner
    assert runner.via_sd.kind == "auto"
    copies = {} if runner.slim is None else runner.slim.layers.layers[0].mlp._modules
    assert not copies or type(copies["down_proj"].low_precision).kind == INT4
    plain = tokens_of(TraceEngine(str(tmp_path), **ROOM))
    assert tokens_of(engine) == plain


def test_copies_follow_other_weights(tmp_path: Path) -> None:
    make_dense(tmp_path / "old", seed=1, **TARGET)
    make_dense(tmp_path / "new", seed=2, **TARGET)
    quantise_to_int8(tmp_path / "old")
    meant = quantise_to_int8(tmp_path / "new")
    options = {"slim": "int4", "window": 8, "rounds": 4}
    engine = ViaSDEngine(str(tmp_path / "old"), NGRAM, options, **ROOM)
    engine.runner.reload_weights(weights_path=str(tmp_path / "new"))
    check_copies(engine, meant)


def test_which_kinds_are_refused(tmp_path: Path) -> None:
    make_dense(tmp_path, seed=1, **TARGET)
    quantise_to_int8(tmp_path)

    def given(kind: str) -> dict[str, Any]:
        return {"additional_config": {"via_sd": True, "via_sd_slim": kind}}

    for kind in ("int8", "fp8"):
        message = refusal(tmp_path, **given(kind))
        assert f"--via-sd-slim is '{kind}', but the weights of" in message, message
        assert message.endswith("have eight bits already (compressed-tensors); give int4, which "
                                "has fewer, or skip."), message  # fmt: skip
    for kind in ("int4", "auto", "skip"):
        options = options_of(start(tmp_path, **given(kind)))
        assert options is not None and options.kind == kind
