# SPDX-License-Identifier: Apache-2.0
"""Options of VIA-SD: flags, refusals at start, overrides of one request, and vLLM's own sampling
options, whose greedy results are those of an engine without it.
"""

import copy
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from starts import from_command_line
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from mask_files import mask_file
from trace_engine import Arrival, TraceEngine
from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense, make_mimo, save_character_tokenizer
from vllm_nvium import plugin
from vllm_nvium.engine.patches.input_processor import check as check_request
from vllm_nvium.engine.patches.input_processor import check_seed
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd.mask import ModelIdentity, even_layers, write_mask_file
from vllm_nvium.via_sd import start
from vllm_nvium.via_sd.options import ViaSDOptions, ViaSDRequestOptions, options_of
from vllm_nvium.via_sd.refusals import UNSUPPORTED
from vllm_nvium.via_sd.start import CPU_WORKER, SCHEDULER, _kind_of_slim, check
from vllm_nvium.weights import fingerprint

pytestmark = pytest.mark.usefixtures("read_environment")

# ------------------------------------------------------------------------------------------- flags


FLAGS: dict[str, tuple[list[str], Any]] = {
    "via_sd": ([], True),
    "via_sd_slim": (["int8"], "int8"),
    "via_sd_mask": (["1,2"], "1,2"),
    "via_sd_mode": (["paper"], "paper"),
    "via_sd_accept": (["0.7"], 0.7),
    "via_sd_escalate": (["0.1"], 0.1),
    "via_sd_window": (["9"], 9),
    "via_sd_rounds": (["2"], 2),
    "via_sd_max_batch": (["3"], 3),
    "via_sd_allow_paper_mode": ([], True),
    "via_sd_request_metrics": (["summary"], "summary"),
}


def test_every_flag_reaches_additional_config(parser: Any, dense_checkpoint: Path) -> None:
    arguments: list[str] = []
    for key, (values, _) in FLAGS.items():
        arguments += ["--" + key.replace("_", "-"), *values]
    args = from_command_line(parser, dense_checkpoint, *arguments)
    assert args.additional_config == {key: value for key, (_, value) in FLAGS.items()}
    options = ViaSDOptions.from_config(args.additional_config)
    assert options == ViaSDOptions("int8", "1,2", "paper", 0.7, 0.1, 9, 2, 3, True, "summary")
    # No option is without a flag, but for the one that --speculative-config sets.
    assert {f"via_sd_{field.name}" for field in fields(ViaSDOptions)} == (
        {*FLAGS, "via_sd_drafts"} - {"via_sd"}
    )
    assert from_command_line(parser, dense_checkpoint).additional_config == {}


def test_rounds_may_be_auto(parser: Any, dense_checkpoint: Path) -> None:
    args = from_command_line(parser, dense_checkpoint, "--via-sd", "--via-sd-rounds", "auto")
    assert args.additional_config == {"via_sd": True, "via_sd_rounds": "auto"}


def test_help_has_a_group_with_every_flag(parser: Any) -> None:
    group = next(group for group in parser._action_groups if group.title == "VIA-SD")
    shown = {option for action in group._group_actions for option in action.option_strings}
    assert shown == {"--" + key.replace("_", "-") for key in FLAGS}
    assert all(action.help for action in group._group_actions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--via-sd-mode", "fast"], ["--via-sd-mode", "fast", "lossless", "paper"]),
        (["--via-sd-rounds", "many"], ["--via-sd-rounds", "many", "auto"]),
        (["--via-sd-window", "x"], ["--via-sd-window", "x"]),
        (["--via-sd-slim", "int2"], ["--via-sd-slim", "int2", "int4", "int8", "skip"]),
        (["--via-sd-accept", "x"], ["--via-sd-accept", "x"]),
    ],
)
def test_the_parser_names_the_flag(
    parser: Any, capsys: Any, arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed


# ------------------------------------------------------------------------------------------- start


def arguments(path: Path, via_sd: dict[str, Any] | None = None, **options: Any) -> Any:
    """EngineArgs with VIA-SD and n-grams, unless it is said otherwise."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    additional = {"via_sd": True} | {
        f"via_sd_{key}": value for key, value in (via_sd or {}).items()
    }
    defaults = {"speculative_config": dict(NGRAM), "additional_config": additional}
    return EngineArgs(model=str(path), **(defaults | options))


def refusal(path: Path, via_sd: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        arguments(path, via_sd, **options).create_engine_config()
    message = str(error.value)
    assert "\n" not in message and "validation error" not in message, message
    assert message.endswith("."), message
    return message


CHANGED = (
    "additional_config", "speculative_config", "scheduler_cls", "worker_cls", "async_scheduling"
)  # fmt: skip


def test_a_start_leaves_the_arguments_as_they_were(dense_checkpoint: Path) -> None:
    args = arguments(dense_checkpoint, {"window": 7, "mask": "1"})
    before = {name: getattr(args, name) for name in CHANGED}
    copies = json.loads(json.dumps([before["additional_config"], before["speculative_config"]]))
    for _ in range(2):
        config = args.create_engine_config()
        assert {name: getattr(args, name) for name in before} == before
        assert [args.additional_config, args.speculative_config] == copies
        assert config.parallel_config.worker_cls == CPU_WORKER
        assert config.scheduler_config.scheduler_cls == SCHEDULER
        assert config.scheduler_config.async_scheduling is False
        # vLLM's buffers follow the window, the drafter is asked for what the user said.
        assert config.speculative_config.num_speculative_tokens == 7
        options = ViaSDOptions.from_config(config.additional_config)
        assert options is not None and (options.window, options.drafts) == (7, 4)


def test_vllms_short_flags_name_the_drafter_too(dense_checkpoint: Path) -> None:
    short = {"spec_method": "ngram", "spec_tokens": 3, "speculative_config": None}
    args = arguments(dense_checkpoint, {"window": 7}, **short)
    for _ in range(2):
        config = args.create_engine_config()
        assert config.speculative_config.method == "ngram"
        assert config.speculative_config.num_speculative_tokens == 7
        assert ViaSDOptions.from_config(config.additional_config).drafts == 3
        assert (args.spec_method, args.spec_tokens, args.speculative_config) == ("ngram", 3, None)
    message = refusal(dense_checkpoint, spec_tokens=3)
    assert "--spec-tokens is 3 and --speculative-config has num_speculative_tokens 4" in message


def test_drafters_that_vllm_finds_out_about_are_refused(
    dense_checkpoint: Path, monkeypatch: Any
) -> None:
    config = arguments(dense_checkpoint).create_engine_config()
    for name, value, words in (
        ("parallel_drafting", True, "with parallel_drafting"),
        ("method", "dflash", "of method 'dflash'"),
    ):
        spec = copy.copy(config.speculative_config)
        object.__setattr__(spec, name, value)
        other = copy.copy(config)
        object.__setattr__(other, "speculative_config", spec)
        with pytest.raises(UserError, match=words):
            check(other)


def test_a_refused_start_leaves_the_arguments_as_they_were(dense_checkpoint: Path) -> None:
    args = arguments(dense_checkpoint, pipeline_parallel_size=2)
    before = {name: getattr(args, name) for name in CHANGED}
    with pytest.raises(ValueError):
        args.create_engine_config()
    assert {name: getattr(args, name) for name in CHANGED} == before


def test_without_the_flag_nothing_changes(dense_checkpoint: Path) -> None:
    config = arguments(dense_checkpoint, additional_config={}).create_engine_config()
    assert config.parallel_config.worker_cls.startswith("vllm.")
    assert config.scheduler_config.scheduler_cls is None
    assert config.speculative_config.num_speculative_tokens == 4
    off = arguments(dense_checkpoint, additional_config={"via_sd": False}).create_engine_config()
    assert off.parallel_config.worker_cls == config.parallel_config.worker_cls


DRAFTER = "--speculative-config"
NO_COUNT = {key: value for key, value in NGRAM.items() if key != "num_speculative_tokens"}


@pytest.mark.parametrize(
    ("via_sd", "words"),
    [
        (
            {"accept": 0.2, "escalate": 0.4},
            ["--via-sd-escalate is 0.4", "--via-sd-accept is 0.2", "must not exceed"],
        ),
        ({"accept": 0.7}, ["--via-sd-accept is 0.7", "lossless", "--via-sd-mode paper"]),
        ({"drafts": 3}, ["'via_sd_drafts' is 3", "num_speculative_tokens", "remove it"]),
        ({"accept": 1.5}, ["--via-sd-accept", "1.5", "0..1"]),
        ({"accept": True}, ["--via-sd-accept", "True", "0..1"]),
        ({"escalate": "0.1"}, ["--via-sd-escalate", "'0.1'", "0..1"]),
        ({"mode": "fast"}, ["--via-sd-mode", "'fast'", "'lossless' or 'paper'"]),
        ({"window": 0}, ["--via-sd-window", "0", "1..128"]),
        ({"window": 129}, ["--via-sd-window", "129", "1..128"]),
        ({"window": 4}, ["--via-sd-window is 4", "num_speculative_tokens is 4", "at least 5"]),
        ({"window": 3, "rounds": 0}, ["--via-sd-window is 3", "at least 4"]),
        ({"rounds": 0, "mode": "paper"}, ["--via-sd-mode is 'paper'", "--via-sd-rounds is 0"]),
        ({"rounds": 0, "max_batch": 3}, ["--via-sd-max-batch is 3", "--via-sd-rounds is 0"]),
        (
            {"rounds": 0, "allow_paper_mode": True},
            ["--via-sd-allow-paper-mode is True", "--via-sd-rounds is 0", "remove it"],
        ),
        (
            {"rounds": 0, "mode": "paper", "accept": 0.7},
            ["--via-sd-mode is 'paper'", "--via-sd-rounds is 0"],
        ),
        ({"rounds": -1}, ["--via-sd-rounds", "-1", "'auto'"]),
        ({"rounds": True}, ["--via-sd-rounds", "True"]),
        ({"rounds": 129}, ["--via-sd-rounds", "129", "0..128"]),
        ({"max_batch": 2**31}, ["--via-sd-max-batch", "2147483648", "1..2147483647"]),
        ({"max_batch": 0}, ["--via-sd-max-batch", "0", "1..2147483647"]),
        ({"allow_paper_mode": 1}, ["--via-sd-allow-paper-mode", "1", "a bool"]),
        ({"speed": 1}, ["'via_sd_speed'", "via_sd_window"]),
        ({"mask": "7"}, ["--via-sd-mask is '7'", "layers are 0 to 3"]),
        ({"mask": "0-3"}, ["--via-sd-mask is '0-3'", "keep at least one"]),
        ({"mask": "even:0"}, ["--via-sd-mask is 'even:0'", "greater than 0"]),
        ({"mask": "even:1.5"}, ["--via-sd-mask is 'even:1.5'", "less than 1"]),
        ({"mask": "no/such/file.json"}, ["--via-sd-mask is 'no/such/file.json'"]),
        ({"mask": ""}, ["--via-sd-mask", "''"]),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_at_start(
    dense_checkpoint: Path, via_sd: dict[str, Any], words: list[str]
) -> None:
    message = refusal(dense_checkpoint, via_sd)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_config": NGRAM | {"method": "medusa"}}, [DRAFTER, "'medusa'", "ngram"]),
        ({"speculative_config": NO_COUNT}, [DRAFTER, "num_speculative_tokens None", ">= 1"]),
        (
            {"speculative_config": NGRAM | {"num_speculative_tokens": 17}},
            ["--via-sd-window is 16", "num_speculative_tokens is 17", "at least 18"],
        ),
        (
            {"speculative_config": NGRAM | {"rejection_sample_method": "block"}},
            [DRAFTER, "rejection_sample_method 'block'", "leave it out"],
        ),
        (
            {"offload_group_size": 2},
            ["--offload-group-size is 2", "skips layers", "--cpu-offload-gb"],
        ),
        (
            {"speculative_config": NGRAM | {"num_speculative_tokens_per_batch_size": []}},
            [DRAFTER, "num_speculative_tokens_per_batch_size", "remove it"],
        ),
        ({"pipeline_parallel_size": 2}, ["--pipeline-parallel-size is 2", "set it to 1"]),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            ["--decode-context-parallel-size is 2", "KV cache", "set it to 1"],
        ),
        # Also where vLLM has no room for a window in each request of a batch.
        *(
            ({"enable_lora": True, "max_num_batched_tokens": tokens}, ["--enable-lora is True"])
            for tokens in (None, 600, 8192)
        ),
        ({"async_scheduling": True}, ["--async-scheduling is True", "leave it off"]),
        (
            {
                "speculative_config": NGRAM
                | {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5] * 4}
            },
            [DRAFTER, "rejection_sample_method 'synthetic'", "leave it out"],
        ),
        (
            {"prefill_context_parallel_size": 2},
            ["--prefill-context-parallel-size is 2", "set it to 1"],
        ),
        (
            {"watermark_config": {"algorithm": "gumbel", "key": 1234567}},
            ["--watermark-config is gumbel, but", "Model Runner V1", "remove it"],
        ),
        (
            {"structured_outputs_config": {"backend": "lm-format-enforcer"}},
            ["--structured-outputs-config is one with backend lm-format-enforcer", "use xgrammar"],
        ),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, ["--worker-cls is", CPU_WORKER]),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            ["--scheduler-cls is", "leave it out"],
        ),
        ({"additional_config": {"via_sd_window": 8}}, ["--via-sd-window is 8", "add --via-sd"]),
        ({"additional_config": {"via_sd": "yes"}}, ["--via-sd", "'yes'", "a bool"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_start_that_cannot_work_is_refused(
    dense_checkpoint: Path, options: dict[str, Any], words: list[str]
) -> None:
    message = refusal(dense_checkpoint, **options)
    assert all(word in message for word in words), message


def test_advice_of_vllm_about_the_window_names_its_flag(tmp_path: Path) -> None:
    """vLLM knows the window as num_speculative_tokens, a number that nobody gave."""
    make_mimo(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = config | {"num_nextn_predict_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mtp = {"method": "mtp", "num_speculative_tokens": 2}
    with_mtp = {"speculative_config": mtp, "trust_remote_code": True}
    message = refusal(tmp_path, {"window": 7}, **with_mtp)
    assert (
        message.startswith("--via-sd-window is 7") and "must be divisible by n_predict=2" in message
    )
    assert "give another window" in message
    arguments(tmp_path, {"window": 8}, **with_mtp).create_engine_config()
    # What is wrong in what was given is said as it was given.
    with pytest.raises(ValueError, match="num_speculative_tokens:3 must be divisible"):
        wrong = with_mtp | {"speculative_config": mtp | {"num_speculative_tokens": 3}}
        arguments(tmp_path, {"window": 7}, **wrong).create_engine_config()


def test_an_error_that_is_not_about_via_sd_stays_vllms(dense_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len") as error:
        arguments(dense_checkpoint, max_model_len=10**6).create_engine_config()
    assert "--via-sd" not in str(error.value)


def test_a_start_without_a_drafter_looks_up_ngrams(dense_checkpoint: Path) -> None:
    for window, drafts in ((16, 4), (3, 2)):
        args = arguments(dense_checkpoint, {"window": window}, speculative_config=None)
        config = args.create_engine_config()
        spec = config.speculative_config
        assert (spec.method, spec.num_speculative_tokens) == ("ngram", window)
        assert (spec.prompt_lookup_min, spec.prompt_lookup_max) == (3, 5)
        options = options_of(config)
        assert options is not None and options.drafts == drafts
        assert args.speculative_config is None, "as the user gave it"


def test_what_the_slim_verifier_is_by_default(dense_checkpoint: Path) -> None:
    for given, kind, mask in (
        ({}, "auto", None),
        ({"mask": "1,2"}, "skip", "1-2"),
        ({"slim": "skip"}, "skip", "2"),
        ({"slim": "int8"}, "int8", None),
        ({"slim": "int8", "mask": "1"}, "int8", "1"),
        ({"slim": "auto", "mask": "1"}, "auto", "1"),
    ):
        found = options_of(arguments(dense_checkpoint, given).create_engine_config())
        assert found is not None and (found.kind, found.mask) == (kind, mask), given


EIGHT = {"num_bits": 8, "type": "int"}


@pytest.mark.parametrize(
    ("quantization", "config", "is_int8"),
    [
        ("gptq", {"bits": 8}, False),
        ("compressed-tensors", {}, False),
        ("compressed-tensors", [{"weights": EIGHT, "input_activations": EIGHT}], True),
        ("compressed-tensors", [{"weights": {}, "input_activations": EIGHT}], False),
        ("compressed-tensors", [{"weights": EIGHT, "input_activations": None}], False),
        (
            "compressed-tensors",
            [{"weights": EIGHT | {"type": "float"}, "input_activations": EIGHT}],
            False,
        ),
        (
            "compressed-tensors",
            [
                {"weights": EIGHT, "input_activations": EIGHT},
                {"weights": EIGHT | {"num_bits": 4}, "input_activations": EIGHT},
            ],
            False,
        ),
        ("quark", [{"weights": EIGHT, "input_activations": EIGHT}], False),
    ],
)
def test_weights_that_are_quantised_already(quantization: str, config: Any, is_int8: bool) -> None:
    """Integers of eight bits leave room for copies of four."""
    if isinstance(config, list):
        config = {"config_groups": {str(n): group for n, group in enumerate(config)}}
    model = SimpleNamespace(
        quantization=quantization,
        model="folder/of-a-model",
        hf_config=SimpleNamespace(quantization_config=config),
    )
    assert _kind_of_slim(ViaSDOptions(), model) == ("auto" if is_int8 else "skip")
    refused = ("int8",) if is_int8 else ("int4", "int8")
    for kind in refused:
        words = f"--via-sd-slim is '{kind}', but the weights of folder/of-a-model .* already"
        with pytest.raises(UserError, match=words):
            _kind_of_slim(ViaSDOptions(slim=kind), model)
    if is_int8:
        assert _kind_of_slim(ViaSDOptions(slim="int4"), model) == "int4"
        config["transform_config"] = {"config_groups": {}}
        assert _kind_of_slim(ViaSDOptions(), model) == "skip"


def test_log_probabilities_that_the_papers_rule_has_not(dense_checkpoint: Path) -> None:
    processed = {"logprobs_mode": "processed_logprobs"}
    for via_sd in ({"mode": "paper"}, {"allow_paper_mode": True}):
        message = refusal(dense_checkpoint, via_sd, **processed)
        assert "--logprobs-mode is 'processed_logprobs'" in message and "raw_logprobs" in message
    arguments(
        dense_checkpoint, additional_config={"via_sd": True}, **processed
    ).create_engine_config()


HUB = "hub/models--some--dense/snapshots/" + "0" * 40


@pytest.mark.parametrize(
    ("folder", "searched_for", "mentioned"),
    [
        ("dense", "dense", False),
        ("dense", "elsewhere/dense", False),
        ("dense", "another", True),
        # A start without network makes such a path of a hub id.
        (HUB, "some/dense", False),
        (HUB, f"/elsewhere/{HUB}", False),
        (HUB, "0" * 40, True),
        (HUB, "some/another", True),
        ("dense", f"/elsewhere/{HUB}", False),
    ],
)
def test_a_mask_of_another_name_is_mentioned(
    dense_checkpoint: Path,
    tmp_path: Path,
    folder: str,
    searched_for: str,
    mentioned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is known of the weights: the same sizes may be those of a fine-tune, or of
    another model."""
    target = tmp_path / folder
    shutil.copytree(dense_checkpoint, target)
    said = warnings(monkeypatch)
    mask = searched_mask(target, tmp_path, model=searched_for)
    arguments(target, {"mask": mask}).create_engine_config()
    assert bool(said) == mentioned
    assert not said or f"was searched for {searched_for} and is used for" in said[0]


def test_a_mask_of_other_weights_is_refused(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, other = tmp_path / "dense", tmp_path / "other" / "dense"
    shutil.copytree(dense_checkpoint, target)
    make_dense(other, seed=5)
    said = warnings(monkeypatch)
    known = fingerprint(str(target), 4)
    assert known is not None and fingerprint(str(other), 4) not in (None, known)
    # Under another name, the same weights are the same model.
    mask = searched_mask(target, tmp_path, model="some/name", weights=known)
    arguments(target, {"mask": mask}).create_engine_config()
    assert said == []
    message = refusal(other, {"mask": mask})
    assert message.startswith(f"--via-sd-mask is {mask!r}, which was searched for 'some/name'")
    assert "vllm-nvium search-mask" in message and "`--via-sd-mask 1-2`" in message
    arguments(other, {"mask": "1-2"}).create_engine_config()
    # Where the weights cannot be told: a part is missing, or another format is read.
    (other / "model.safetensors").unlink()
    arguments(other, {"mask": mask}).create_engine_config()
    assert "was searched for some/name" in said[0]


def searched_mask(target: Path, folder: Path, **fields: Any) -> str:
    """The path of a mask file for models of the sizes of `target`."""
    identity = ModelIdentity.from_config(json.loads((target / "config.json").read_text()))
    write_mask_file(folder / "mask.json", mask_file(identity=identity.model_dump(), **fields))
    return str(folder / "mask.json")


def test_workers_are_given_the_layers_that_were_checked(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    """And no file, which may change before they read it, or be somewhere else to them."""
    mask = searched_mask(dense_checkpoint, tmp_path)
    config = arguments(dense_checkpoint, {"mask": mask}).create_engine_config()
    assert config.additional_config["via_sd_mask"] == "1-2"
    config = arguments(dense_checkpoint, {"mask": "even:0.25"}).create_engine_config()
    [layer] = even_layers(4, 1)
    assert config.additional_config["via_sd_mask"] == str(layer)


def test_nothing_said_again_is_no_contradiction() -> None:
    """Values that say what holds anyway, and the mask, which a comparison keeps for all rounds."""
    given = {"mode": "lossless", "max_batch": None, "allow_paper_mode": False, "mask": "1"}
    found = ViaSDOptions.from_config(
        {"via_sd": True, "via_sd_rounds": 0} | {f"via_sd_{k}": v for k, v in given.items()}
    )
    assert found == ViaSDOptions(mask="1", rounds=0)


def test_a_pooling_model_is_refused(dense_checkpoint: Path) -> None:
    message = refusal(dense_checkpoint, runner="pooling")
    assert "--runner is pooling" in message and "use --runner generate" in message


def test_offloading_of_the_kv_cache_is_refused_by_its_name(dense_checkpoint: Path) -> None:
    """vLLM makes a connector of it, which the user never named."""
    message = refusal(dense_checkpoint, kv_offloading_size=1.0)
    assert "--kv-offloading-size is 1.0" in message and "remove it" in message


def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a start warns about, as it is added."""
    said: list[str] = []
    monkeypatch.setattr(start.logger, "warning", lambda text, *args: said.append(str(text) % args))
    return said


def test_a_kv_connector_is_refused(dense_checkpoint: Path) -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    message = refusal(dense_checkpoint, kv_transfer_config=connector)
    assert "--kv-transfer-config is ExampleConnector" in message and "remove it" in message


@pytest.mark.parametrize("spec", ["ngram", ["ngram"], {1: 2}])
def test_a_drafter_that_is_no_json_object_is_refused(dense_checkpoint: Path, spec: Any) -> None:
    with pytest.raises(UserError, match=r"--speculative-config is .*; it must be a JSON object"):
        arguments(dense_checkpoint, speculative_config=spec).create_engine_config()


def test_the_drafters_keys_may_have_dashes_as_vllms_may(dense_checkpoint: Path) -> None:
    spec = {key.replace("_", "-"): value for key, value in NGRAM.items()}
    config = arguments(dense_checkpoint, speculative_config=spec).create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 16


class Cuda:
    """This machine's platform, which says that it is CUDA where it is asked."""

    def __init__(self, platform: Any) -> None:
        self.real = platform

    def is_cpu(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("platform", ["CPU with Triton", "CUDA"])
def test_model_runner_v1_is_chosen_where_v2_is_the_default(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    import vllm.platforms

    monkeypatch.delenv(start.V2_SWITCH, raising=False)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    worker = CPU_WORKER
    if platform == "CUDA":
        cuda = Cuda(vllm.platforms.current_platform)
        monkeypatch.setattr(vllm.platforms, "current_platform", cuda)
        worker = start.GPU_WORKER
    plain = arguments(dense_checkpoint, additional_config={})
    config = arguments(dense_checkpoint).create_engine_config()
    assert config.parallel_config.worker_cls == worker
    assert not config.use_v2_model_runner
    # In the processes that it is sent to, and for what workers derive from it.
    assert not pickle.loads(pickle.dumps(config)).use_v2_model_runner
    assert not copy.copy(config).use_v2_model_runner
    # The next engine of this process chooses as if this one had not been.
    assert start.V2_SWITCH not in os.environ
    assert plain.create_engine_config().use_v2_model_runner
    with pytest.raises(UserError):
        arguments(dense_checkpoint, pipeline_parallel_size=2).create_engine_config()
    assert start.V2_SWITCH not in os.environ
    assert plain.create_engine_config().use_v2_model_runner


@pytest.mark.parametrize("value", ["0", "1"])
def test_who_chose_a_model_runner_has_it(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    config = arguments(dense_checkpoint).create_engine_config()
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv(start.V2_SWITCH, value)
    assert config.use_v2_model_runner is bool(int(value))


def test_model_runner_v2_is_refused(dense_checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    message = refusal(dense_checkpoint)
    assert "VLLM_USE_V2_MODEL_RUNNER is '1'" in message and "unset it" in message


def test_an_nvium_model_is_refused(nvium_checkpoint: Path) -> None:
    """Whoever followed "remove --speculative-config" would be told to add it."""
    message = refusal(nvium_checkpoint)
    assert message.startswith("--via-sd is True") and "N-vium" in message
    assert message.endswith("; remove it.") and "--speculative-config" not in message


def test_an_architecture_without_a_plain_list_of_layers_is_refused(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["architectures"] = ["InternLM2ForCausalLM"]
    (other / "config.json").write_text(json.dumps(config))
    message = refusal(other)
    assert "InternLM2ForCausalLM" in message and "LlamaForCausalLM" in message


def test_every_flag_in_the_table_exists_in_vllm(parser: Any) -> None:
    known = parser._option_string_actions
    flags = [option.flag for option in UNSUPPORTED if option.flag.startswith("--")]
    assert len(flags) > 3 and [flag for flag in flags if flag not in known] == []


# ---------------------------------------------------------------------------------------- requests

BAD_OVERRIDES: list[tuple[dict[str, Any], list[str]]] = [
    ({"via_sd_mode": "paper"}, ["'via_sd_mode' is 'paper'", "--via-sd-allow-paper-mode"]),
    ({"via_sd_mode": "fast"}, ["'via_sd_mode'", "'fast'", "'lossless' or 'paper'"]),
    (
        {"via_sd_accept": 0.2, "via_sd_escalate": 0.4},
        ["via_sd_escalate is 0.4", "via_sd_accept is 0.2"],
    ),
    # The engine's own threshold is 0.5.
    ({"via_sd_escalate": 0.6}, ["via_sd_escalate is 0.6", "via_sd_accept is 0.5"]),
    ({"via_sd_accept": 0.6}, ["'via_sd_accept' is 0.6", "is lossless", "'paper'"]),
    ({"via_sd_accept": "0.6"}, ["'via_sd_accept'", "'0.6'", "0..1"]),
    ({"via_sd_accept": [0.6]}, ["'via_sd_accept'", "[0.6]", "0..1"]),
    ({"via_sd": "perhaps"}, ["'via_sd'", "'perhaps'", "'on' or 'off'"]),
    ({"via_sd": [1]}, ["'via_sd'", "[1]", "'on' or 'off'"]),
    ({"via_sd": 2**63}, ["'via_sd'", "9223372036854775808", "'on' or 'off'"]),
    ({"via_sd": math.nan}, ["'via_sd'", "nan", "'on' or 'off'"]),
    ({"via_sd": {"a": 1}}, ["'via_sd'", "{'a': 1}", "'on' or 'off'"]),
    ({"via_sd": np.array([True, True])}, ["'via_sd'", "array", "'on' or 'off'"]),
    ({"via_sd_mode": np.array(["paper"] * 2)}, ["'via_sd_mode'", "array", "'lossless' or 'paper'"]),
    ({"via_sd_mode": ["paper"]}, ["'via_sd_mode'", "['paper']"]),
    ({"via_sd_accept": True}, ["'via_sd_accept'", "True", "0..1"]),
    ({"via_sd_accept": math.nan}, ["'via_sd_accept'", "nan", "0..1"]),
    ({"via_sd_escalate": -math.inf}, ["'via_sd_escalate'", "-inf", "0..1"]),
    ({"via_sd_escalate": 2**63}, ["'via_sd_escalate'", "9223372036854775808", "0..1"]),
    ({"via_sd_request_metrics": "all"}, ["'via_sd_request_metrics'", "'all'", "'summary'"]),
    ({"via_sd_request_metrics": 1}, ["'via_sd_request_metrics'", "is 1", "'detailed'"]),
    ({"via_sd_window": 3}, ["'via_sd_window'", "via_sd_mode"]),
    ({"via_sd_": 3}, ["'via_sd_'", "via_sd_mode"]),
]


def test_overrides_are_read() -> None:
    engine = ViaSDOptions(allow_paper_mode=True)
    read = ViaSDRequestOptions.from_extra_args
    assert read(None, engine) == ViaSDRequestOptions(True, "lossless", 0.5, 0.3)
    assert read({"other": 1}, engine) == ViaSDRequestOptions(True, "lossless", 0.5, 0.3)
    given = {"via_sd_mode": "paper", "via_sd_accept": 1, "via_sd_escalate": 0}
    assert read(given, engine) == ViaSDRequestOptions(True, "paper", 1, 0)
    for off in ("off", "false", "0", False, 0):
        assert not read({"via_sd": off}, engine).on
    for on in ("on", "true", "1", True, 1, None):
        assert read({"via_sd": on}, engine).on
    # Null is "not given".
    nothing = dict.fromkeys(("via_sd", "via_sd_mode", "via_sd_accept", "via_sd_window"))
    assert read(nothing, engine) == ViaSDRequestOptions(True, "lossless", 0.5, 0.3)
    told = ViaSDOptions(request_metrics="summary")
    assert read({}, told).request_metrics == "summary"
    assert read({"via_sd_request_metrics": "none"}, told).request_metrics == "none"
    # A server of the paper's mode lets requests ask for the lossless one and back.
    assert read({"via_sd_mode": "lossless"}, ViaSDOptions(mode="paper")).mode == "lossless"
    assert read({}, ViaSDOptions(mode="paper")).mode == "paper"


class Features:
    """The same model in an engine with VIA-SD and in one without speculation."""

    def __init__(self, path: Path) -> None:
        # The vocabulary is that of the tokenizer: no token is without a character.
        self.reference: PreTrainedModel = make_dense(
            path, seed=2, vocab_size=98, bigrams=0.7, whisper=0.2
        )
        save_character_tokenizer(path)
        common: dict[str, Any] = {"num_gpu_blocks_override": 100, "max_num_seqs": 8}
        self.plain = TraceEngine(str(path), **common)
        options = {"mask": "2", "window": 8, "rounds": 2}
        self.tiered = ViaSDEngine(str(path), NGRAM, options, **common)
        self.drafted = TraceEngine(str(path), speculative_config=dict(NGRAM), **common)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Features]:
    yield Features(tmp_path_factory.mktemp("characters"))


_RANDOM = random.Random(0)
PROMPT = [_RANDOM.randrange(3, 98) for _ in range(12)] * 2


def outputs(engine: TraceEngine, *params: SamplingParams, prompt: list[int] = PROMPT) -> list[Any]:
    engine.run([Arrival(0, list(prompt), one) for one in params])
    return [engine.outputs[str(i)] for i in range(len(params))]


def add(engine: TraceEngine, params: SamplingParams) -> None:
    engine.engine.add_request("refused", {"prompt_token_ids": PROMPT}, params)


@pytest.mark.parametrize(("given", "words"), BAD_OVERRIDES, ids=str)
def test_a_bad_override_is_refused_before_the_engine_core(
    features: Features, given: dict[str, Any], words: list[str]
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(extra_args=given)
    server = SimpleNamespace(vllm_config=features.tiered.engine.vllm_config)
    for call in (
        lambda: add(features.tiered, params),
        lambda: AsyncLLM.generate(server, "w3", params, "0"),
    ):
        with pytest.raises(VLLMValidationError) as error:
            call()
        message = str(error.value)
        assert all(word in message for word in words), message
        assert "\n" not in message and message.endswith(".")
    assert not features.tiered.engine.has_unfinished_requests()


@pytest.mark.parametrize("is_v2", [False, True])
def test_seeds_that_a_model_runner_cannot_hold_are_refused(is_v2: bool) -> None:
    """Model Runner V1 gives them to a generator of torch, V2 puts them into an array; the n-th
    answer has the n-th seed."""

    def held(seed: int) -> None:
        if is_v2:
            np.zeros(1, dtype=np.int64)[0] = seed
        else:
            torch.Generator().manual_seed(seed)

    most = (2**63 if is_v2 else 2**64) - 1
    for least_or_most, beyond in ((most, most + 1), (-(2**63), -(2**63) - 1)):
        held(least_or_most)
        check_seed(SamplingParams(seed=least_or_most), is_v2)
        with pytest.raises((OverflowError, RuntimeError, ValueError)):
            held(beyond)
        with pytest.raises(ValueError, match=f"seed is {beyond}, and with n = 1 it must be"):
            check_seed(SamplingParams(seed=beyond), is_v2)
    check_seed(SamplingParams(seed=most - 1, n=2), is_v2)
    with pytest.raises(ValueError, match=f"n = 2 it must be from -{2**63} to {most - 1}"):
        check_seed(SamplingParams(seed=most, n=2), is_v2)


@pytest.mark.parametrize("given", [{"via_sd": "off"}, {"via_sd_mode": "lossless"}], ids=str)
def test_an_override_where_via_sd_is_off_is_refused(
    features: Features, given: dict[str, Any]
) -> None:
    for engine in (features.plain, features.drafted):
        with pytest.raises(VLLMValidationError) as error:
            add(engine, SamplingParams(extra_args=given))
        message = str(error.value)
        assert f"{next(iter(given))!r} is" in message
        assert "VIA-SD is off" in message and "--via-sd" in message
        assert "\n" not in message and message.endswith(".")
    add_other = SamplingParams(extra_args={"other": 1, "via_sd": None}, max_tokens=1)
    assert outputs(features.plain, add_other)[0].finished


def test_an_override_of_the_other_method_is_refused(
    features: Features, nvium_checkpoint: Path
) -> None:
    """The same on an engine with one method as on one with none."""
    nvium = {"nvium_max_deferred": 3}
    for engine in (features.plain, features.tiered):
        with pytest.raises(VLLMValidationError, match="'nvium_max_deferred' is 3.*LlamaForCaus"):
            add(engine, SamplingParams(extra_args=nvium))
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(nvium_checkpoint)).create_engine_config()
    with pytest.raises(VLLMValidationError, match="'via_sd' is 'off', but VIA-SD is off; an N-v"):
        check_request(SamplingParams(extra_args={"via_sd": "off"}), config)


@pytest.mark.parametrize("odd", [[1], "via_sd", {"via_sd"}], ids=str)
def test_extra_args_that_are_no_mapping_are_refused(features: Features, odd: Any) -> None:
    params = SamplingParams()
    params.extra_args = odd
    for engine in (features.plain, features.tiered):
        with pytest.raises(VLLMValidationError, match="extra_args is .* must be a mapping"):
            check_request(params, engine.engine.vllm_config)


BEAM_SEARCHES = ("completion", "chat", "transcription", "translation")


@pytest.mark.parametrize("kind", BEAM_SEARCHES)
def test_an_override_of_a_beam_search_is_refused(kind: str) -> None:
    plugin.register()
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest

    def asked(**fields: Any) -> Any:
        speech = {"transcription": TranscriptionRequest, "translation": TranslationRequest}
        if kind in speech:
            # The audio is read before; its check wants a web framework's class.
            return speech[kind].model_construct(use_beam_search=True, n=2, **fields)
        common = {"model": "tiny", "use_beam_search": True, "n": 2, **fields}
        if kind == "chat":
            return ChatCompletionRequest(messages=[{"role": "user", "content": "w3"}], **common)
        return CompletionRequest(prompt="w3", **common)

    for key, value in (("via_sd", "off"), ("via_sd_mode", "paper"), ("nvium_max_deferred", 1)):
        with pytest.raises(VLLMValidationError) as error:
            asked(vllm_xargs={"other": 1, key: value}).to_beam_search_params(5, {})
        message = str(error.value)
        assert message.startswith(f"vllm_xargs {key!r} is {value!r}, but use_beam_search is true")
        assert "\n" not in message and message.endswith(".")
    for others in ({"vllm_xargs": None}, {"vllm_xargs": {"other": 1}}):
        assert asked(**others).to_beam_search_params(5, {}).beam_width == 2


# --------------------------------------------------------------------- vLLM's own sampling options


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 40, "ignore_eos": True} | fields))


def test_greedy_results_of_sampling_options_are_the_plain_engines(features: Features) -> None:
    plain = outputs(features.plain, greedy())[0].outputs[0]
    text, tokens = plain.text, plain.token_ids
    assert len(text) == 40
    asked = {
        "stop string": greedy(stop=[text[17:19]]),
        "stop string kept": greedy(stop=[text[23:26]], include_stop_str_in_output=True),
        "stop token": greedy(stop_token_ids=[tokens[20]], ignore_eos=False),
        "min_tokens": greedy(stop_token_ids=[tokens[20]], ignore_eos=False, min_tokens=30),
        "end of sequence": greedy(ignore_eos=False),
        "repetition": greedy(repetition_penalty=1.5),
        "presence": greedy(presence_penalty=1.0),
        "frequency": greedy(frequency_penalty=0.7),
        "bad words": greedy(bad_words=[text[5], text[11:13]]),
        "allowed tokens": greedy(allowed_token_ids=sorted(set(tokens[:20]) | {5, 6, 7})),
        "one token": greedy(max_tokens=1),
        "two tokens": greedy(max_tokens=2),
        "no text": greedy(detokenize=False),
        "to the end of the context": greedy(max_tokens=None),
    }
    before = features.tiered.runner.session.counts.windows
    wanted, found = (
        outputs(engine, *asked.values()) for engine in (features.plain, features.tiered)
    )
    assert features.tiered.runner.session.counts.windows > before + 50
    changed = 0
    for name, mine, theirs in zip(asked, found, wanted, strict=True):
        for left, right in zip(mine.outputs, theirs.outputs, strict=True):
            assert left.token_ids == right.token_ids, name
            assert (left.text, left.finish_reason, left.stop_reason) == (
                right.text, right.finish_reason, right.stop_reason,
            ), name  # fmt: skip
            changed += left.token_ids != tokens
    # The options did something.
    assert changed >= 10


def test_log_probabilities_are_the_plain_engines(features: Features) -> None:
    asked = [greedy(logprobs=5, max_tokens=30), greedy(logprobs=0, prompt_logprobs=3)]
    wanted, found = (outputs(engine, *asked) for engine in (features.plain, features.tiered))
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine.outputs[0].logprobs) == len(mine.outputs[0].token_ids)
        check_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
    assert len(found[1].prompt_logprobs) == len(PROMPT)
    check_logprobs(found[1].prompt_logprobs, wanted[1].prompt_logprobs)


def check_logprobs(mine: list[Any], theirs: list[Any]) -> None:
    for left, right in zip(mine, theirs, strict=True):
        if right is None:
            assert left is None
            continue
        assert left.keys() == right.keys()
        for token, value in right.items():
            assert left[token].logprob == pytest.approx(value.logprob, abs=1e-3)
            assert left[token].rank == value.rank


STRUCTURES: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["abcabcabd", "abcabcabcabe", "xyz"]},
    "regex": {"regex": "(ab|cd){6,12}x"},
    "json": {
        "json": {
            "type": "object",
            "properties": {"name": {"enum": ["anna", "bob"]}, "age": {"type": "integer"}},
            "required": ["name", "age"],
        }
    },
    "grammar": {"grammar": 'root ::= ("yes " | "no "){3,8} "end"'},
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs_are_the_plain_engines(features: Features, kind: str) -> None:
    def asked() -> list[SamplingParams]:
        # The end is allowed where the grammar is: it ends the answer.
        return [
            greedy(
                structured_outputs=StructuredOutputsParams(**STRUCTURES[kind]),
                ignore_eos=False,
                max_tokens=60,
            )
        ]

    before = features.tiered.runner.session.counts.slim_passes
    wanted, found = (outputs(engine, *asked()) for engine in (features.plain, features.tiered))
    assert found[0].outputs[0].token_ids == wanted[0].outputs[0].token_ids
    assert found[0].outputs[0].text == wanted[0].outputs[0].text
    if kind == "choice":
        assert found[0].outputs[0].text in STRUCTURES[kind]["choice"]
    # A choice may be over after a token.
    assert kind == "choice" or features.tiered.runner.session.counts.slim_passes > before


def test_the_papers_rule_keeps_no_forbidden_token(features: Features) -> None:
    """It may change which token is chosen, never to one that may not be."""
    engine = features.tiered
    keep_all = {"via_sd_mode": "paper", "via_sd_accept": 0.0, "via_sd_escalate": 0.0}
    saved = engine.runner.session.options, engine.engine.vllm_config.additional_config
    free = outputs(engine, greedy())[0].outputs[0]
    engine.engine.vllm_config.additional_config = saved[1] | {"via_sd_allow_paper_mode": True}
    engine.runner.session.options = ViaSDOptions(**{**vars(saved[0]), "allow_paper_mode": True})
    forbidden = sorted(set(free.token_ids))[:8]
    allowed = [token for token in range(3, 98) if token not in forbidden]
    words = [chr(32 + token - 3) for token in forbidden if token >= 3]
    try:
        # Drafts that escalate are not kept by the slim verifier.
        all_escalate = keep_all | {"via_sd_accept": 1.0, "via_sd_escalate": 1.0}
        for extra_args, least, most in ((keep_all, 1.0, 1.0), (all_escalate, 0.0, 0.9)):
            before = replace(engine.runner.session.counts)
            outputs(engine, greedy(extra_args=extra_args))
            counts = engine.runner.session.counts
            kept = counts.slim_accepted - before.slim_accepted
            assert least <= kept / (counts.slim_drafted - before.slim_drafted) <= most
        found = outputs(
            engine,
            greedy(bad_words=[word for word in words if word.strip()], extra_args=keep_all),
            greedy(allowed_token_ids=allowed, extra_args=keep_all),
        )
        assert not set(found[1].outputs[0].token_ids) & set(forbidden)
        assert not set(found[0].outputs[0].text) & {word for word in words if word.strip()}
    finally:
        engine.runner.session.options, engine.engine.vllm_config.additional_config = saved


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {40: 100.0}},
        {"presence_penalty": -2.0, "logit_bias": {40: 98.0}},
        {"allowed_token_ids": [40]},
    ],
    ids=str,
)
def test_what_a_request_asks_of_the_sampler_reaches_the_papers_rule(
    features: Features, fields: dict[str, Any]
) -> None:
    """All drafts that the slim verifier does not find likeliest it draws again, and nobody asks the
    full model: the token that the request wants is drawn by the slim verifier, or it is missing."""
    config, runner = features.tiered.engine.vllm_config, features.tiered.runner
    saved = config.additional_config, runner.session.options
    config.additional_config = saved[0] | {"via_sd_allow_paper_mode": True}
    runner.session.options = replace(saved[1], allow_paper_mode=True)
    rule = {"via_sd_mode": "paper", "via_sd_accept": 1.0, "via_sd_escalate": 0.0}
    tiers = list(runner.session.counts.tiers)
    try:
        found = outputs(features.tiered, greedy(extra_args=rule, max_tokens=20, **fields))[0]
    finally:
        config.additional_config, runner.session.options = saved
    assert set(found.outputs[0].token_ids) == {40}
    assert sum(runner.session.counts.tiers) > sum(tiers) + 5


def test_n_answers_to_one_request(features: Features) -> None:
    params = SamplingParams(
        n=3, temperature=1.0, max_tokens=20, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    answers = outputs(features.tiered, params)[0].outputs
    assert len(answers) == 3 and len({tuple(answer.token_ids) for answer in answers}) == 3
    assert all(len(answer.token_ids) == 20 for answer in answers)
