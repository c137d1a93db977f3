# SPDX-License-Identifier: Apache-2.0
"""The options of N-vium: the one place where a flag, its default, its check and its help text live.
They travel as flat keys of vLLM's `additional_config`, which reaches every process and is part of
the configuration's hash; a request may override them through `vllm_xargs`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.options import (
    LARGEST_COUNT,
    Remembered,
    flag,
    is_count,
    is_one_of,
    picked,
    picked_of_request,
    shown,
)
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

ARCHITECTURE = "NviumForCausalLM"
PREFIX = "nvium_"
SAMPLING_LAWS = ("routed", "mixture")


@dataclass(frozen=True)
class NviumOptions:
    """Options of one engine.

    sampling: which law tokens are drawn from. `routed` draws an exit, then a token from that
        exit's head; `mixture` draws from the mixture of all heads.
    max_deferred: how many positions of a sequence may be left incomplete at some depth before a
        catch-up pass is forced; None for no limit.
    """

    sampling: str = "routed"
    max_deferred: int | None = None

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "NviumOptions":
        """Read and check the keys `nvium_*` of `additional_config`.

        Raises:
            UserError: a key is unknown or a value is out of range; one sentence.
        """
        return cls.from_config(vllm_config.additional_config)

    @classmethod
    def from_config(cls, additional_config: Any) -> "NviumOptions":
        """The same, of `additional_config` itself."""
        return cls(**_read(_keys_of(additional_config), cls(), in_config=True))


# The options as keys of `additional_config` and as keyword arguments.
KEYS = tuple(PREFIX + field.name for field in fields(NviumOptions))


@dataclass(frozen=True)
class NviumRequestOptions:
    """Options of one request; the fields mean the same as in `NviumOptions`."""

    sampling: str
    max_deferred: int | None

    @classmethod
    def from_extra_args(
        cls, extra_args: Mapping[str, Any] | None, defaults: NviumOptions
    ) -> "NviumRequestOptions":
        """Read `SamplingParams.extra_args` (HTTP: `vllm_xargs`); what is absent is the engine's.

        Raises:
            UserError: a key is unknown or a value is out of range; one sentence.
        """
        return cls(**_read(picked_of_request(extra_args, is_own), defaults, in_config=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "N-vium" to vLLM's parser. Unset flags are None, so that it can be told
    whether a flag was given: one that does nothing (on another model) is refused."""
    group = parser.add_argument_group(
        title="N-vium", description="Mixture-of-exits models (architecture NviumForCausalLM)."
    )
    group.add_argument(
        "--nvium-sampling",
        choices=SAMPLING_LAWS,
        default=None,
        help="Law that tokens are drawn from: 'routed' draws an exit and then a token from that "
        "exit's head, 'mixture' draws from the mixture of all heads. Per request: vllm_xargs "
        f"nvium_sampling. (default: {NviumOptions.sampling})",
    )
    group.add_argument(
        "--nvium-max-deferred",
        type=_count,
        default=None,
        metavar="N",
        help="Positions that a sequence may leave incomplete at some depth before a catch-up pass "
        "is forced; 0 completes every position at once. Per request: vllm_xargs "
        "nvium_max_deferred. (default: unlimited)",
    )


def is_own(key: str) -> bool:
    """Whether a key of `additional_config` or of `vllm_xargs` is meant for N-vium."""
    return key.startswith(PREFIX)


def additional_keys(vllm_config: "VllmConfig") -> dict[str, Any]:
    """The keys `nvium_*` of a configuration, unchecked."""
    return _keys_of(vllm_config.additional_config)


def is_nvium(vllm_config: "VllmConfig") -> bool:
    """Whether the engine's model is an N-vium model."""
    model_config = vllm_config.model_config
    return model_config is not None and ARCHITECTURE in (model_config.architectures or [])


def validate_request(sampling_params: "SamplingParams", vllm_config: "VllmConfig") -> None:
    """Check one request; called in the process that answers the client.

    Raises:
        UserError: one sentence, sent to the client with status 400.
    """
    extra_args = sampling_params.extra_args
    if is_nvium(vllm_config):
        engine = _engine_options(vllm_config.additional_config)
        NviumRequestOptions.from_extra_args(extra_args, engine)
        return
    for key, value in picked_of_request(extra_args, is_own).items():
        raise UserError(
            f"vllm_xargs {shown(key)} is {shown(value)}, but the model is a "
            f"{vllm_config.model_config.architecture} and the option works on {ARCHITECTURE} only; "
            "remove it."
        )


_engine_options = Remembered(NviumOptions.from_config)


def _keys_of(additional_config: Any) -> dict[str, Any]:
    return picked(additional_config, is_own)


def _read(given: Mapping[str, Any], defaults: NviumOptions, *, in_config: bool) -> dict[str, Any]:
    values = {field.name: getattr(defaults, field.name) for field in fields(NviumOptions)}
    source = "additional_config" if in_config else "vllm_xargs"
    for key, value in given.items():
        name = key.removeprefix(PREFIX)
        if name not in values:
            known = ", ".join(PREFIX + option for option in values)
            raise UserError(f"{source} {shown(key)} is not an option of N-vium; there are {known}.")
        where = f"{flag(key)} (additional_config {key!r})" if in_config else f"vllm_xargs {key!r}"
        if name == "sampling" and not is_one_of(value, SAMPLING_LAWS):
            laws = " or ".join(map(repr, SAMPLING_LAWS))
            raise UserError(f"{where} is {shown(value)}; it must be {laws}.")
        if name == "max_deferred" and not is_count(value, 0):
            raise UserError(
                f"{where} is {shown(value)}; it must be an integer in 0..{LARGEST_COUNT}, or "
                "absent for no limit."
            )
        values[name] = value
    return values


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not is_count(value, 0):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not an integer in 0..{LARGEST_COUNT}")
    return value
