# SPDX-License-Identifier: Apache-2.0
"""The options: parsing, checks, the way from the command line into `additional_config`, and the
overrides of one request."""

import dataclasses
import inspect
import math
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starts import additional_config_of, from_command_line

from vllm_nvium import plugin
from vllm_nvium.engine.options import merge
from vllm_nvium.errors import UserError
from vllm_nvium.nvium.options import NviumOptions, validate_request


def config(**additional: Any) -> Any:
    return SimpleNamespace(additional_config=additional)


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
        ("nvium_max_deferred", -1, ["--nvium-max-deferred", "-1", "0..2147483647"]),
        ("nvium_max_deferred", True, ["--nvium-max-deferred", "True"]),
        ("nvium_max_deferred", "4", ["--nvium-max-deferred", "'4'"]),
        ("nvium_max_deferred", 2**31, ["--nvium-max-deferred", "2147483648", "0..2147483647"]),
        ("nvium_max_deferred", 2**63, ["--nvium-max-deferred", "9223372036854775808"]),
        # Python refuses to write it out, also as part of a test's name.
        pytest.param(
            "nvium_max_deferred",
            10**5000,
            ["--nvium-max-deferred", "an integer of 16610 bits"],
            id="huge",
        ),
        ("nvium_max_deferred", 4.0, ["--nvium-max-deferred", "4.0"]),
        ("nvium_max_deferred", math.nan, ["--nvium-max-deferred", "nan"]),
        ("nvium_max_deferred", math.inf, ["--nvium-max-deferred", "inf"]),
        ("nvium_max_deferred", [4], ["--nvium-max-deferred", "[4]"]),
        ("nvium_max_deferred", {"a": {"b": [4]}}, ["--nvium-max-deferred", "{'a': {'b': [4]}}"]),
        ("nvium_max_deferred", np.zeros((2, 2)), ["--nvium-max-deferred", "array"]),
        ("nvium_sampling", np.array(["routed"] * 2), ["--nvium-sampling", "array"]),
        ("nvium_sampling", 0, ["--nvium-sampling", "0"]),
        ("nvium_request_metrics", "all", ["--nvium-request-metrics", "'all'", "'summary'"]),
        ("nvium_request_metrics", True, ["--nvium-request-metrics", "True", "'detailed'"]),
        ("nvium_max_defered", 4, ["'nvium_max_defered'", "nvium_max_deferred"]),
    ],
)
def test_bad_values_are_named(key: str, value: Any, words: list[str]) -> None:
    for read in (
        lambda: NviumOptions.from_vllm_config(config(**{key: value})),
        lambda: NviumOptions().of_request({key: value}),
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

    def read(extra_args: Any, engine: NviumOptions) -> NviumOptions:
        return engine.of_request(extra_args)

    assert read(None, defaults) == NviumOptions("mixture", 8)
    assert read({"unrelated": 1}, defaults) == NviumOptions("mixture", 8)
    assert read({"nvium_sampling": "routed"}, defaults) == NviumOptions("routed", 8)
    # Null is "not given".
    nothing = {"nvium_sampling": None, "nvium_max_deferred": None, "nvium_other": None}
    assert read(nothing, defaults) == NviumOptions("mixture", 8)
    for fewer in (0, 7, 8):
        assert read({"nvium_max_deferred": fewer}, defaults).max_deferred == fewer
    unbounded = {"nvium_max_deferred": 2**31 - 1}
    assert read(unbounded, NviumOptions("mixture")).max_deferred == 2**31 - 1
    told = NviumOptions(request_metrics="summary")
    assert read({}, told).request_metrics == "summary"
    assert read({"nvium_request_metrics": "none"}, told).request_metrics == "none"


@pytest.mark.parametrize(
    ("most", "asked"), [(4, 5), (4, 2**31 - 1), (0, 1), (2**31 - 2, 2**31 - 1)]
)
def test_a_request_cannot_raise_the_engines_bound(most: int, asked: int) -> None:
    """All requests of a step wait while one of them catches up."""
    bounded = engine("NviumForCausalLM", nvium_max_deferred=most)
    given = {"other": 1, "nvium_sampling": "mixture", "nvium_max_deferred": asked}
    with pytest.raises(UserError) as error:
        validate_request(SimpleNamespace(extra_args=given), bounded)
    assert str(error.value) == (
        f"vllm_xargs 'nvium_max_deferred' is {asked}; it must be at most {most}, the server's "
        "--nvium-max-deferred."
    )
    for fine in (most, 0, None):
        fewer = SimpleNamespace(extra_args=given | {"nvium_max_deferred": fine})
        validate_request(fewer, bounded)
    validate_request(SimpleNamespace(extra_args=given), engine("NviumForCausalLM"))


def test_null_in_additional_config_is_not_given() -> None:
    options = NviumOptions.from_vllm_config(config(nvium_sampling=None, nvium_max_deferred=None))
    assert options == NviumOptions()
    assert merge({"nvium_max_deferred": None}, {"nvium_max_deferred": 3}) == {
        "nvium_max_deferred": 3
    }


@pytest.mark.parametrize("odd", [{1: 2, None: 3, ("nvium_",): 4}, {"other": {"nvium_sampling": 1}}])
def test_keys_that_are_nobodys_are_left_alone(odd: Any) -> None:
    for architecture in ("NviumForCausalLM", "LlamaForCausalLM"):
        validate_request(SimpleNamespace(extra_args=odd), engine(architecture))


@pytest.mark.parametrize("odd", [[1], "nvium_sampling", 4, {"nvium_sampling"}])
def test_extra_args_that_are_no_mapping_are_refused(odd: Any) -> None:
    """They come from callers in Python: HTTP has no such request."""
    for architecture in ("NviumForCausalLM", "LlamaForCausalLM"):
        with pytest.raises(ValueError, match=r"^extra_args is .*; it must be a mapping") as error:
            validate_request(SimpleNamespace(extra_args=odd), engine(architecture))
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("value", [3, -1, "x" * 10**6, 2**63])
def test_an_override_on_another_model_is_refused(value: Any) -> None:
    given = SimpleNamespace(extra_args={"other": 1, "nvium_max_deferred": value})
    with pytest.raises(ValueError, match="'nvium_max_deferred' is .*LlamaForCausalLM") as error:
        validate_request(given, engine("LlamaForCausalLM"))
    message = str(error.value)
    assert "\n" not in message and message.endswith("; remove it.") and len(message) < 300
    nothing = SimpleNamespace(extra_args={"other": 1, "nvium_max_deferred": None})
    validate_request(nothing, engine("LlamaForCausalLM"))


def engine(architecture: str, **additional: Any) -> Any:
    """What `validate_request` reads of an engine's configuration."""
    model = SimpleNamespace(architectures=[architecture], architecture=architecture)
    return SimpleNamespace(additional_config=additional, model_config=model)


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
        (["--nvium-max-deferred", "-2"], ["--nvium-max-deferred", "-2", "0..2147483647"]),
        (["--nvium-max-deferred", "x"], ["--nvium-max-deferred", "x", "0..2147483647"]),
        (["--nvium-max-deferred", str(2**31)], ["--nvium-max-deferred", "2147483648"]),
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


# ------------------------------------------------------------------------------- keyword arguments

KEYWORDS: dict[str, Any] = {
    "nvium_sampling": "mixture",
    "nvium_max_deferred": 4,
    "nvium_request_metrics": "summary",
    "via_sd": True,
    "via_sd_slim": "int8",
    "via_sd_mask": "1,2",
    "via_sd_mode": "paper",
    "via_sd_accept": 0.7,
    "via_sd_escalate": 0.1,
    "via_sd_window": 9,
    "via_sd_rounds": 2,
    "via_sd_max_batch": 3,
    "via_sd_allow_paper_mode": True,
    "via_sd_request_metrics": "detailed",
}


def engine_args_classes() -> list[Any]:
    plugin.register()
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    return [EngineArgs, AsyncEngineArgs]


def test_keywords_are_the_flags(parser: Any) -> None:
    titles = ("N-vium", "VIA-SD")
    groups = [group for group in parser._action_groups if group.title in titles]
    flags = {action.dest for group in groups for action in group._group_actions}
    assert flags == set(KEYWORDS)


@pytest.mark.parametrize("index", [0, 1], ids=["EngineArgs", "AsyncEngineArgs"])
def test_keywords_travel_in_additional_config(index: int, dense_checkpoint: Path) -> None:
    cls, path = engine_args_classes()[index], str(dense_checkpoint)
    assert cls(model=path, **KEYWORDS).additional_config == KEYWORDS
    # A first argument without its name, and what is in additional_config already.
    given = {"other": 1, "via_sd_mask": "2"}
    args = cls(path, via_sd=True, via_sd_mask="2", via_sd_window=None, additional_config=given)
    assert args.additional_config == {"other": 1, "via_sd_mask": "2", "via_sd": True}
    assert given == {"other": 1, "via_sd_mask": "2"} and args.model == path
    with pytest.raises(ValueError, match="--via-sd-mask is '1' but --additional-config says"):
        cls(model=path, via_sd_mask="1", additional_config=given)
    for unknown in ("via_sd_speed", "via_sd_drafts", "nvium_depth", "other"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            cls(model=path, **{unknown: 1})


def test_flags_reach_processes_that_have_not_loaded_plugins(
    parser: Any, dense_checkpoint: Path
) -> None:
    """vLLM's front ends, of which `--data-parallel-size 2` starts two."""
    given = ["--model", str(dense_checkpoint), "--additional-config", '{"other": 1}']
    args = parser.parse_args([*given, "--via-sd", "--via-sd-window", "9"])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(additional_config_of, args).result()
    assert found == {"other": 1, "via_sd": True, "via_sd_window": 9}


def test_a_flag_that_says_something_else_than_additional_config(
    parser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--via-sd-window", "9", "--additional-config", '{"via_sd_window": 8}'])
    assert "--via-sd-window is 9 but --additional-config says via_sd_window = 8; give one" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("index", [0, 1], ids=["EngineArgs", "AsyncEngineArgs"])
def test_keywords_leave_the_dataclass_as_it_was(index: int, dense_checkpoint: Path) -> None:
    cls, path = engine_args_classes()[index], str(dense_checkpoint)
    names = [field.name for field in dataclasses.fields(cls)]
    assert list(inspect.signature(cls).parameters) == names and not set(names) & set(KEYWORDS)
    args = cls(model=path, seed=3, via_sd=True)
    assert vars(args).keys() == vars(cls(model=path)).keys() == set(names)
    assert cls(model=path).additional_config == {}
    assert pickle.loads(pickle.dumps(args)) == args
    changed = dataclasses.replace(args, seed=4, via_sd_mask="1")
    assert (changed.seed, args.seed) == (4, 3)
    assert changed.additional_config == {"via_sd": True, "via_sd_mask": "1"}
    assert args.additional_config == {"via_sd": True}


def test_keywords_of_llm(dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(engine_args: Any, **_: Any) -> None:
        raise Stop(engine_args.additional_config)

    plugin.register()
    from vllm import LLM

    monkeypatch.setattr("vllm.v1.engine.llm_engine.LLMEngine.from_engine_args", stop)
    with pytest.raises(Stop) as stopped:
        LLM(str(dense_checkpoint), via_sd=True, via_sd_mask="1", nvium_max_deferred=0)
    expected = {"via_sd": True, "via_sd_mask": "1", "nvium_max_deferred": 0}
    assert stopped.value.args == (expected,)


def test_keywords_need_the_plugins_loaded(dense_checkpoint: Path) -> None:
    """vLLM loads them inside its first EngineArgs, after its arguments were looked at."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"def make(): return EngineArgs(model={str(dense_checkpoint)!r}, via_sd=True)\n"
        "try: make()\n"
        "except TypeError: print('too early')\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "print(make().additional_config)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-2:] == ["too early", "{'via_sd': True}"]
