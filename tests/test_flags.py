# SPDX-License-Identifier: Apache-2.0
"""The options: parsing, checks, the way from the command line into `additional_config`, and the
overrides of one request."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nvium import plugin
from vllm_nvium.flags import NviumOptions, NviumRequestOptions, merge


def config(**additional: Any) -> Any:
    return SimpleNamespace(additional_config=additional)


@pytest.fixture(scope="module")
def parser() -> Any:
    plugin.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def from_command_line(parser: Any, model: Path, *arguments: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *arguments]))


def test_defaults() -> None:
    assert NviumOptions.from_vllm_config(config()) == NviumOptions("routed", None)
    assert NviumOptions.from_vllm_config(config(other=1)) == NviumOptions()


def test_values_are_read() -> None:
    options = NviumOptions.from_vllm_config(config(nvium_sampling="mixture", nvium_max_deferred=0))
    assert options == NviumOptions("mixture", 0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("nvium_sampling", "greedy", ["--nvium-sampling", "'greedy'", "'routed' or 'mixture'"]),
        ("nvium_sampling", ["routed"], ["--nvium-sampling", "['routed']"]),
        ("nvium_max_deferred", -1, ["--nvium-max-deferred", "-1", ">= 0"]),
        ("nvium_max_deferred", True, ["--nvium-max-deferred", "True"]),
        ("nvium_max_deferred", "4", ["--nvium-max-deferred", "'4'"]),
        ("nvium_max_defered", 4, ["'nvium_max_defered'", "nvium_max_deferred"]),
    ],
)
def test_bad_values_are_named(key: str, value: Any, words: list[str]) -> None:
    for read in (
        lambda: NviumOptions.from_vllm_config(config(**{key: value})),
        lambda: NviumRequestOptions.from_extra_args({key: value}, NviumOptions()),
    ):
        with pytest.raises(ValueError) as error:
            read()
        message = str(error.value)
        wanted = [word.replace("--", "") for word in words]
        assert all(
            word in message.replace("--", "") or word.replace("-", "_") in message
            for word in wanted
        ), message
        assert "\n" not in message and message.endswith(".")


def test_request_overrides_the_engine() -> None:
    defaults = NviumOptions("mixture", 8)
    read = NviumRequestOptions.from_extra_args
    assert read(None, defaults) == NviumRequestOptions("mixture", 8)
    assert read({"unrelated": 1}, defaults) == NviumRequestOptions("mixture", 8)
    assert read({"nvium_sampling": "routed"}, defaults) == NviumRequestOptions("routed", 8)
    assert read({"nvium_max_deferred": None}, defaults) == NviumRequestOptions("mixture", None)


def test_flags_travel_in_additional_config(parser: Any, dense_checkpoint: Path) -> None:
    args = from_command_line(
        parser, dense_checkpoint, "--nvium-sampling", "mixture", "--nvium-max-deferred", "4"
    )
    assert args.additional_config == {"nvium_sampling": "mixture", "nvium_max_deferred": 4}
    assert from_command_line(parser, dense_checkpoint).additional_config == {}


def test_flags_join_a_given_additional_config(parser: Any, dense_checkpoint: Path) -> None:
    args = from_command_line(
        parser,
        dense_checkpoint,
        "--additional-config",
        '{"nvium_sampling": "mixture"}',
        "--nvium-max-deferred",
        "4",
    )
    assert args.additional_config == {"nvium_sampling": "mixture", "nvium_max_deferred": 4}


def test_contradiction_is_refused() -> None:
    assert merge({"nvium_sampling": "routed"}, {"nvium_sampling": "routed"})
    with pytest.raises(ValueError, match="--nvium-sampling is 'mixture' but --additional-config"):
        merge({"nvium_sampling": "routed"}, {"nvium_sampling": "mixture"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nvium-sampling", "greedy"], ["--nvium-sampling", "greedy", "routed", "mixture"]),
        (["--nvium-max-deferred", "-2"], ["--nvium-max-deferred", "-2", ">= 0"]),
        (["--nvium-max-deferred", "x"], ["--nvium-max-deferred", "x", ">= 0"]),
    ],
)
def test_parser_names_the_flag(parser: Any, capsys, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed


def test_flags_on_another_model_are_refused(dense_checkpoint: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(dense_checkpoint), additional_config={"nvium_sampling": "mixture"})
    with pytest.raises(ValueError, match="--nvium-sampling .* LlamaForCausalLM .*; remove it"):
        args.create_engine_config()
