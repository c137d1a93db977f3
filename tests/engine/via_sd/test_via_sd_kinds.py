# SPDX-License-Identifier: Apache-2.0
"""Kinds of slim verifiers that cannot be had are refused with one sentence: before any process is
started where the configuration tells, and otherwise by the worker that finds it out."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starts import refusal, start
from torch import nn

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense
from vllm_nvium import plugin
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.layers.low_precision_linear import KINDS
from vllm_nvium.model_executor.via_sd.slim_timing import Windows
from vllm_nvium.via_sd import kinds, loading
from vllm_nvium.via_sd.kinds import candidates_for, check_copies, shapes_of_config
from vllm_nvium.via_sd.options import ViaSDOptions

pytestmark = pytest.mark.usefixtures("read_environment")
plugin.register()


def via_sd(slim: str, **options: Any) -> dict[str, Any]:
    given = {f"via_sd_{name}": value for name, value in options.items()}
    return {"additional_config": {"via_sd": True, "via_sd_slim": slim, **given}}


def test_what_the_configuration_tells_is_refused_at_once(dense_checkpoint: Path) -> None:
    """Its inner layers have 96 units."""
    assert refusal(dense_checkpoint, **via_sd("int4")) == (
        "--via-sd-slim is 'int4', but 96 inputs do not divide into groups of 128 or 64; "
        "here int8, skip work."
    )
    assert refusal(dense_checkpoint, **via_sd("fp8")) == (
        "--via-sd-slim is 'fp8', but this machine has no kernel for it; here int8, skip work."
    )
    for slim in ("int8", "auto", "skip"):
        start(dense_checkpoint, **via_sd(slim))
    # Nobody would make copies.
    start(dense_checkpoint, **via_sd("int4", rounds=0))
    # vLLM asks of such a head that it is its own.
    override = {"hf_overrides": {"head_dtype": "float32"}, "dtype": "bfloat16"}
    assert refusal(dense_checkpoint, **via_sd("auto"), **override) == (
        "--hf-overrides sets head_dtype float32, but --via-sd-slim auto multiplies with a copy of "
        "the head; leave it out, or give skip."
    )
    start(dense_checkpoint, **via_sd("skip"), **override)


def test_kernels_of_gpus_are_not_tried(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only which kinds there are for them at all is known."""
    config = start(dense_checkpoint, **via_sd("int8"))
    config.device_config.device_type = "cuda"
    monkeypatch.setattr(kinds, "layers_for", None)
    monkeypatch.setattr(
        kinds, "shapes_of_config", lambda *_: {(192, 128), (128, 128), (256, 128), (128, 256)}
    )
    for kind in ("int4", "int8", "fp8"):
        check_copies(kind, config, False)
    monkeypatch.setattr(kinds, "shapes_of_config", lambda *_: {(24, 128)})
    with pytest.raises(UserError, match="'int8', but 24 x 128 are .* of 16; here int4, skip work"):
        check_copies("int8", config, False)
    with pytest.raises(UserError, match="'fp8', but .*; here skip works"):
        candidates_for("fp8", KINDS, {(8, 8)}, 1, lambda _: [])


def test_sizes_of_a_ranks_parts() -> None:
    class Model:
        hf_text_config = SimpleNamespace(intermediate_size=8960)

        def get_hidden_size(self) -> int:
            return 1536

        def get_head_size(self) -> int:
            return 128

        def get_num_attention_heads(self, parallel: Any) -> int:
            return 12 // int(parallel.tensor_parallel_size)

        def get_num_kv_heads(self, parallel: Any) -> int:
            return max(2 // int(parallel.tensor_parallel_size), 1)

        def get_vocab_size(self) -> int:
            return 151930

    model: Any = Model()
    for ranks, wanted in (
        (1, {(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536)}),
        (2, {(1024, 1536), (1536, 768), (8960, 1536), (1536, 4480), (75968, 1536)}),
        (4, {(640, 1536), (1536, 384), (4480, 1536), (1536, 2240), (37984, 1536)}),
    ):
        parallel: Any = SimpleNamespace(tensor_parallel_size=ranks)
        assert shapes_of_config(model, parallel) == wanted


def test_weights_that_layers_fetch_by_themselves_are_refused(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM offloads so where a GPU cannot read the host's memory, or shall not."""
    config = start(dense_checkpoint, **via_sd("auto"), cpu_offload_gb=1.0)

    def refused(kind: str) -> str:
        with pytest.raises(UserError) as error:
            check_copies(kind, config, False)
        return str(error.value)

    off = "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA"
    monkeypatch.setenv(off, "1")
    check_copies("auto", config, False)  # on CPU nothing is offloaded
    config.device_config.device_type = "cuda"
    check_copies("skip", config, False)
    for kind in ("int4", "auto"):
        message = refused(kind)
        assert message.startswith("--cpu-offload-gb is 1.0, but") and f"slim {kind} has" in message
        assert message.endswith(f"; unset {off}, or give --via-sd-slim skip.")
    monkeypatch.delenv(off)
    monkeypatch.setattr(kinds, "is_uva_available", lambda: True)
    check_copies("auto", config, False)
    monkeypatch.setattr(kinds, "is_uva_available", lambda: False)
    assert refused("auto").endswith("auto has copies of them; give --via-sd-slim skip.")
    config.offload_config.uva.cpu_offload_gb = 0
    check_copies("auto", config, False)


def test_what_a_worker_refuses_is_a_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a process of vLLM's, which shows what is raised there inside stack traces only."""
    make_dense(tmp_path, seed=1, intermediate_size=128)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="--via-sd-slim is 'int8', whose copies need"):
        ViaSDEngine(str(tmp_path), NGRAM, {"slim": "int8"})
    monkeypatch.setattr(loading.multiprocessing.current_process(), "_name", "EngineCore_DP0")
    loading.logger.addHandler(caplog.handler)
    try:
        with pytest.raises(SystemExit) as end:
            ViaSDEngine(str(tmp_path), NGRAM, {"slim": "int8"})
    finally:
        loading.logger.removeHandler(caplog.handler)
    assert end.value.code == 1
    # Perhaps twice: the handler is that of the root logger too.
    said = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert said.exc_info is None
    assert said.getMessage().startswith("--via-sd-slim is 'int8', whose copies need")
    assert said.getMessage().endswith("give --via-sd-slim skip, which needs none.")


@pytest.mark.parametrize(
    "given,windows",
    [
        ({}, Windows(shortest=0, longest=16, most_requests=64, most_rows=512)),
        ({"rounds": 3, "window": 12}, Windows(3, 3, 64, 512)),
        ({"max_batch": 4}, Windows(0, 16, 4, 512)),
    ],
)
def test_what_an_engine_may_have_decides_about_its_kind(
    given: dict[str, Any], windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(Exception):
        pass

    def note(*args: Any) -> None:
        raise Noted(args[-1])

    monkeypatch.setattr(loading, "candidates_for", lambda *_: [])
    monkeypatch.setattr(loading, "number_of_ranks", lambda: 1)
    monkeypatch.setattr(loading, "shapes_of", lambda *_: set())
    monkeypatch.setattr(loading, "Copies", note)
    runner = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=64, max_num_tokens=512)
    with pytest.raises(Noted) as noted:
        loading._copies_of(nn.Module(), [], ViaSDOptions(drafts=4, **given), runner)
    assert noted.value.args == (windows,)
