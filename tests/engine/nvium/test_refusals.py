# SPDX-License-Identifier: Apache-2.0
"""What an N-vium model cannot run with is refused at start, with one sentence that names the flag,
the value and the remedy; what it can run with starts with the right worker."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starts import refusal, start

from tiny_models import dense_config, make_nvium
from vllm_nvium.nvium.cuda_graphs import ASKED
from vllm_nvium.nvium.refusals import UNSUPPORTED
from vllm_nvium.nvium.start import CPU_WORKER

pytestmark = pytest.mark.usefixtures("read_environment")


def test_v1_on_cpu_gets_its_worker(nvium_checkpoint: Path) -> None:
    config = start(nvium_checkpoint)
    assert config.parallel_config.worker_cls == CPU_WORKER
    assert config.scheduler_config.async_scheduling is False


def test_v2_keeps_vllms_worker(nvium_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # Only the configuration is made here; nothing runs on the device.
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    assert start(nvium_checkpoint).parallel_config.worker_cls.startswith("vllm.")


SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
NGRAM = SPECULATION
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["--pipeline-parallel-size is 2", "set it to 1"]),
        ({"speculative_config": SPECULATION}, ["--speculative-config is 'ngram'", "remove it"]),
        ({"enable_lora": True}, ["--enable-lora is True", "leave it off"]),
        ({"enable_prompt_embeds": True}, ["--enable-prompt-embeds is True", "leave it off"]),
        ({"enable_dbo": True}, ["--enable-dbo is True", "leave it off"]),
        ({"kv_offloading_size": 1.0}, ["--kv-offloading-size is 1.0", "remove it"]),
        ({"async_scheduling": True}, ["--async-scheduling is True", "leave it off"]),
        ({"quantization": "experts_int8"}, ["--quantization is 'experts_int8'", "leave it out"]),
        (
            {"quantization": "int8_per_channel_weight_only"},
            ["--quantization is 'int8_per_channel_weight_only'", "experts", "leave it out"],
        ),
        (
            {"watermark_config": {"algorithm": "gumbel", "key": 1234567}},
            ["--watermark-config is 'gumbel'", "remove it"],
        ),
        (
            {"disable_hybrid_kv_cache_manager": False},
            ["--no-disable-hybrid-kv-cache-manager is True", "one block table", "leave it out"],
        ),
        ({"cpu_offload_gb": 1.0}, ["--cpu-offload-gb is 1.0", "leave it at 0"]),
        ({"offload_group_size": 2}, ["--offload-group-size is 2", "leave it at 0"]),
        (
            {"offload_group_size": 2, "offload_backend": "prefetch"},
            ["--offload-group-size is 2", "leave it at 0"],
        ),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, ["--worker-cls is", CPU_WORKER]),
        ({"worker_cls": "no.such.Class"}, ["--worker-cls is 'no.such.Class'", CPU_WORKER]),
        ({"additional_config": {"nvium_sampling": "x"}}, ["--nvium-sampling", "'x'", "'mixture'"]),
        ({"additional_config": {"nvium_max_deferred": -1}}, ["--nvium-max-deferred", "-1"]),
        ({"additional_config": {"nvium_depth": 1}}, ["'nvium_depth'", "nvium_max_deferred"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_at_start(
    nvium_checkpoint: Path, options: dict[str, Any], words: list[str]
) -> None:
    message = refusal(nvium_checkpoint, **options)
    assert all(word in message for word in words), message


def test_experts_in_several_engines(tmp_path: Path, nvium_checkpoint: Path) -> None:
    make_nvium(tmp_path, parent=dense_config("qwen3_moe"))
    message = refusal(tmp_path, data_parallel_size=2)
    assert "--data-parallel-size is 2" in message and "experts" in message
    start(nvium_checkpoint, data_parallel_size=2)
    assert "--enable-return-routed-experts is True" in refusal(
        tmp_path, enable_return_routed_experts=True
    )


def test_kv_connector(nvium_checkpoint: Path) -> None:
    from vllm.config import KVTransferConfig

    message = refusal(nvium_checkpoint, kv_transfer_config=KVTransferConfig(**CONNECTOR))
    assert "--kv-transfer-config is 'ExampleConnector'" in message


def test_rust_front_end(nvium_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in refusal(nvium_checkpoint)


def test_every_flag_in_the_table_exists_in_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = EngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions
    flags = [option.flag for option in UNSUPPORTED if option.flag.startswith("--")]
    assert [flag for flag in flags if flag not in known] == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("exit_layers", [3, 1], ["exit_layers", "[3, 1]", "strictly increasing"]),
        ("exit_layers", [1, 9], ["exit_layers", "9", "1..3"]),
        ("exit_head", "none", ["exit_head", "'none'", "'final'"]),
        ("text_config", {"model_type": "gpt2"}, ["model_type of text_config is 'gpt2'", "qwen3"]),
    ],
)
def test_bad_checkpoint(
    nvium_checkpoint: Path, tmp_path: Path, field: str, value: Any, words: list[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(nvium_checkpoint, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {field: value}))
    message = refusal(bad)
    assert all(word in message for word in words), message


def test_other_models_are_not_checked(dense_checkpoint: Path) -> None:
    config = start(dense_checkpoint, speculative_config=SPECULATION)
    assert config.parallel_config.worker_cls.startswith("vllm.")


# ----------------------------------------------------------------------------- N-vium as a drafter

DRAFTER = {"method": "draft_model", "num_speculative_tokens": 3}


@pytest.mark.parametrize("via_sd", [{}, {"via_sd": True}], ids=["plain", "via_sd"])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp", None])
def test_an_nvium_drafter_is_refused_where_the_start_is_asked_for(
    dense_checkpoint: Path, nvium_checkpoint: Path, method: str | None, via_sd: dict[str, Any]
) -> None:
    spec = {"method": method, "model": str(nvium_checkpoint), "num_speculative_tokens": 3}
    message = refusal(dense_checkpoint, speculative_config=spec, additional_config=via_sd)
    assert message.startswith(f"--speculative-config names {str(nvium_checkpoint)!r}"), message
    assert "N-vium" in message and "name a dense model" in message
    assert "--via-sd" not in message


def test_an_nvium_drafter_of_another_vocabulary(dense_checkpoint: Path, tmp_path: Path) -> None:
    """vLLM would speak of the vocabularies, and whoever mended them would be refused then."""
    from tiny_models import make_nvium

    make_nvium(tmp_path / "nvium", vocab_size=128)
    spec = DRAFTER | {"model": str(tmp_path / "nvium")}
    assert "is an N-vium model" in refusal(dense_checkpoint, speculative_config=spec)


def test_vllms_short_flags_name_an_nvium_drafter(
    dense_checkpoint: Path, nvium_checkpoint: Path
) -> None:
    short = {"spec_method": "draft_model", "spec_model": str(nvium_checkpoint), "spec_tokens": 3}
    assert "is an N-vium model" in refusal(dense_checkpoint, **short)


@pytest.mark.parametrize("fields", [{"model_type": "llama"}, {"architectures": None}], ids=str)
def test_what_names_nvium_in_a_drafter(
    dense_checkpoint: Path, nvium_checkpoint: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(nvium_checkpoint, drafter)
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(config | fields))
    spec = DRAFTER | {"model": str(drafter)}
    assert "is an N-vium model" in refusal(dense_checkpoint, speculative_config=spec)


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_a_drafter_that_vllm_had_to_fetch(
    dense_checkpoint: Path, nvium_checkpoint: Path, method: str, monkeypatch
) -> None:
    """It is known only when vLLM has made its configuration, or failed to."""
    from vllm_nvium.nvium import as_drafter as drafter

    seen: list[str] = []
    found = drafter._config_file

    def later(model: str, revision: str | None) -> Path | None:
        seen.append(model)
        return found(model, revision) if seen.count(model) > 1 else None

    monkeypatch.setattr(drafter, "_config_file", later)
    spec = DRAFTER | {"method": method, "model": str(nvium_checkpoint)}
    assert "is an N-vium model" in refusal(dense_checkpoint, speculative_config=spec)


def test_an_nvium_model_with_an_nvium_drafter_is_told_about_the_model(
    nvium_checkpoint: Path,
) -> None:
    spec = DRAFTER | {"model": str(nvium_checkpoint)}
    message = refusal(nvium_checkpoint, speculative_config=spec)
    assert message.startswith("--speculative-config is 'draft_model'") and "remove it" in message


def test_what_a_worker_derives_for_a_drafter_is_not_checked(
    dense_checkpoint: Path, nvium_checkpoint: Path
) -> None:
    """All options in it but the model are the target's."""
    from vllm.config import ModelConfig
    from vllm.config.utils import replace

    config = start(dense_checkpoint, additional_config={"via_sd": True}, speculative_config=NGRAM)
    draft = ModelConfig(model=str(nvium_checkpoint), runner="draft")
    assert replace(config, model_config=draft).model_config is draft


def test_dense_drafters_are_let_through(dense_checkpoint: Path, tmp_path: Path) -> None:
    spec = DRAFTER | {"model": str(dense_checkpoint)}
    assert start(dense_checkpoint, speculative_config=spec).speculative_config.model == str(
        dense_checkpoint
    )


# ------------------------------------------------------------------------------------- CUDA graphs


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, nvium_log: pytest.LogCaptureFixture) -> Any:
    """The start-up check's answer to a CUDA platform, and what vLLM had chosen when it ran."""
    from vllm_nvium.nvium import cuda_graphs

    seen: list[Any] = []
    switch_off = cuda_graphs.switch_off

    def watched(vllm_config: Any) -> None:
        seen.append(vllm_config.compilation_config.cudagraph_mode)
        switch_off(vllm_config)
        seen.append(vllm_config.compilation_config.cudagraph_mode)

    def possible(config: Any) -> bool:
        return not config.model_config.enforce_eager

    monkeypatch.setattr(cuda_graphs, "_are_possible", possible)
    monkeypatch.setattr(cuda_graphs, "switch_off", watched)
    return seen


def test_cuda_graphs_are_off_unless_asked_for(
    nvium_checkpoint: Path, on_cuda: list[Any], nvium_log
) -> None:
    """And vLLM has not filled its own choice in by then, which would look like the user's."""
    from vllm.config import CUDAGraphMode

    config = start(nvium_checkpoint)
    assert on_cuda == [None, CUDAGraphMode.NONE]
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    said = [record for record in nvium_log.records if "CUDA graphs are off" in record.getMessage()]
    # Two handlers may have seen the same record.
    assert len({id(record) for record in said}) == 1


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"compilation_config": {"cudagraph_mode": "NONE"}}],
    ids=["eager", "none"],
)
def test_nothing_is_said_where_cuda_graphs_are_off_anyway(
    nvium_checkpoint: Path, on_cuda: list[Any], nvium_log, options: dict[str, Any]
) -> None:
    start(nvium_checkpoint, **options)
    assert on_cuda and "CUDA graphs" not in nvium_log.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
            ["--compilation-config is 'cudagraph_mode FULL_AND_PIECEWISE'", "set it to NONE"],
        ),
        (
            {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
            ["--compilation-config is 'cudagraph_mode PIECEWISE'", "set it to NONE"],
        ),
        ({"cudagraph_capture_sizes": [1, 2]}, ["--cudagraph-capture-sizes is [1, 2]", "leave it"]),
        ({"max_cudagraph_capture_size": 8}, ["--max-cudagraph-capture-size is 8", "leave it out"]),
    ],
    ids=["full", "piecewise", "sizes", "largest"],
)
def test_cuda_graphs_that_were_asked_for_are_refused(
    nvium_checkpoint: Path, on_cuda: list[Any], options: dict[str, Any], words: list[str]
) -> None:
    message = refusal(nvium_checkpoint, **options)
    assert all(word in message for word in words), message
    assert "have not been run on a GPU" in message


@pytest.mark.parametrize(
    ("cuda_alike", "eager", "possible"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_where_cuda_graphs_are_possible(
    monkeypatch, cuda_alike: bool, eager: bool, possible: bool
) -> None:
    from vllm.platforms import current_platform

    from vllm_nvium.nvium import cuda_graphs

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: cuda_alike)
    config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager))
    assert cuda_graphs._are_possible(config) is possible


def test_every_flag_for_cuda_graphs_exists_in_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = EngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions
    assert [option.flag for option in ASKED if option.flag not in known] == []
