# SPDX-License-Identifier: Apache-2.0
"""The options of N-vium: the one place where a flag, its default, its check and its help text live.
They travel as flat keys of vLLM's `additional_config`, which reaches every process and is part of
the configuration's hash; a request may override them through `vllm_xargs`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from vllm_nvium.engine.options import (
    LARGEST_COUNT,
    Option,
    Remembered,
    add_flags,
    as_config,
    flag,
    keys_of,
    picked,
    picked_of_request,
    read,
    shown,
)
from vllm_nvium.engine.request_metrics import NEEDED_LEVEL, Level
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

ARCHITECTURE = "NviumForCausalLM"
PREFIX = "nvium_"
SamplingLaw = Literal["routed", "mixture"]
SAMPLING_LAWS = get_args(SamplingLaw)


@dataclass(frozen=True)
class NviumOptions:
    """Options of an engine, and of a request that may override them.

    sampling: which law tokens are drawn from. `routed` draws an exit, then a token from that
        exit's head; `mixture` draws from the mixture of all heads.
    max_deferred: how many positions of a sequence may be left incomplete at some depth before a
        catch-up pass is forced; None for no limit but the one of all sequences together, which is
        vLLM's `max_num_batched_tokens`. A request may lower the engine's, not raise it.
    request_metrics: what an answer tells of its own tokens; `detailed` has the exit of each.
    """

    sampling: Annotated[
        SamplingLaw,
        Option(
            needed="'routed' or 'mixture'",
            help="Law that tokens are drawn from: 'routed' draws an exit and then a token from "
            "that exit's head, 'mixture' draws from the mixture of all heads.",
            per_request=True,
        ),
    ] = "routed"
    max_deferred: Annotated[
        Annotated[int, Field(ge=0, le=LARGEST_COUNT)] | None,
        Option(
            needed=f"an integer in 0..{LARGEST_COUNT}, or absent for no limit",
            help="Positions that a sequence may leave incomplete at some depth before a catch-up "
            "pass is forced; 0 completes every position at once. By default the only limit is that "
            "of all sequences of a step together, --max-num-batched-tokens.",
            metavar="N",
            per_request=True,
        ),
    ] = None
    request_metrics: Annotated[
        Level,
        Option(
            needed=NEEDED_LEVEL,
            help="What an answer tells of its own tokens: 'summary' how many left at each exit and "
            "how many layers ran, in `metrics`; 'detailed' the exit of each token too.",
            per_request=True,
        ),
    ] = "none"

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "NviumOptions":
        """Read and check the keys `nvium_*` of `additional_config`; once for each configuration.

        Raises:
            UserError: a key is unknown or a value is out of range; one sentence.
        """
        return _engine_options(vllm_config.additional_config)

    @classmethod
    def from_config(cls, additional_config: Any) -> "NviumOptions":
        """The same, of `additional_config` itself."""
        return cls(**read(cls, _keys_of(additional_config), PREFIX, "N-vium"))

    def to_config(self) -> dict[str, Any]:
        """For `LLM(..., additional_config=...)`."""
        return as_config(self, PREFIX)

    def of_request(self, extra_args: Mapping[str, Any] | None) -> "NviumOptions":
        """These options with what a request sets in `SamplingParams.extra_args` (HTTP:
        `vllm_xargs`).

        Raises:
            UserError: a key is unknown, a value is out of range, or a request asks to leave more
                open than the engine's own bound, which holds for whoever waits for its catch-up
                passes; one sentence.
        """
        given = picked_of_request(extra_args, is_own)
        values = read(type(self), given, PREFIX, "N-vium", of_request=True)
        asked, most = values.get("max_deferred"), self.max_deferred
        if asked is not None and most is not None and asked > most:
            raise UserError(
                f"vllm_xargs '{PREFIX}max_deferred' is {asked}; it must be at most {most}, the "
                f"server's {flag(PREFIX + 'max_deferred')}."
            )
        return replace(self, **values)


# The options as keys of `additional_config` and as keyword arguments.
KEYS = keys_of(NviumOptions, PREFIX)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "N-vium" to vLLM's parser."""
    group = parser.add_argument_group(
        title="N-vium", description="Mixture-of-exits models (architecture NviumForCausalLM)."
    )
    add_flags(group, NviumOptions, PREFIX)


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
        NviumOptions.from_vllm_config(vllm_config).of_request(extra_args)
        return
    for key, value in picked_of_request(extra_args, is_own).items():
        raise UserError(
            f"vllm_xargs {shown(key)} is {shown(value)}, but the model is a "
            f"{vllm_config.model_config.architecture} and the option works on {ARCHITECTURE} only; "
            "remove it."
        )


_engine_options = Remembered(NviumOptions.from_config)


def request_metrics_level(extra_args: Any, vllm_config: "VllmConfig") -> Level:
    """What a request that was checked is to be told of its tokens."""
    return _engine_options(vllm_config.additional_config).of_request(extra_args).request_metrics


def _keys_of(additional_config: Any) -> dict[str, Any]:
    return picked(additional_config, is_own)
