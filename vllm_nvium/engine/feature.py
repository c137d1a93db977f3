# SPDX-License-Identifier: Apache-2.0
"""What a method brings to an engine, as one record. Patches and plugin go through the records, so
that neither names a method, and a method never imports the other."""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.hooks import Hook
from vllm_nvium.engine.options import flag, picked
from vllm_nvium.engine.request_metrics import AnswerFormat
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    import argparse

    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


def _nothing(*_: Any) -> None:
    return None


def _unchanged(_: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Feature:
    """One method.

    Attributes:
        name: for messages; folder: where it stands in this package.
        hooks: names of vLLM that it alone needs, beside those that it imports.
        keys: its options, as keys of `additional_config` and as keyword arguments of `LLM`.
        is_own: whether a key of `additional_config` or `vllm_xargs` is meant for it.
        add_arguments: adds its flags to vLLM's parser; unset flags are None.
        validate_request: refuses a request whose options this engine does not take.
        is_on: whether an engine of this configuration runs it.
        check_engine_args: refuses what is wrong before vLLM makes its configuration.
        prepared: while vLLM makes its configuration, engine arguments as the method needs them.
        check: refuses a configuration that cannot work.
        instead_of: given an error of vLLM's own, the engine arguments as the user gave them and
            vLLM's way to a configuration: what to raise instead, or None.
        make_stat_logger: of a configuration, the engines' numbers and whether it writes log lines;
            None where there is nothing to log.
        samples_as_plain: whether requests of its engines may ask of the sampler what vLLM refuses
            beside a drafter.
        needs_runner_v1: whether it does not run on Model Runner V2; asked of `additional_config`.
        answers: how an answer tells of its own tokens.
        leaves_open: whether a step may leave positions that are not through every layer.
    """

    name: str
    folder: str
    hooks: tuple[Hook, ...]
    keys: tuple[str, ...]
    is_own: Callable[[str], bool]
    add_arguments: Callable[["argparse.ArgumentParser"], None]
    validate_request: Callable[["SamplingParams", "VllmConfig"], None]
    is_on: Callable[["VllmConfig"], bool]
    check_engine_args: Callable[[Any], None] = _nothing
    prepared: Callable[[Any], AbstractContextManager[None]] = _unchanged
    check: Callable[["VllmConfig"], None] = _nothing
    instead_of: Callable[[Exception, Any, Callable[[Any], "VllmConfig"]], Exception | None] = (
        _nothing
    )
    make_stat_logger: Callable[["VllmConfig", Any, bool], Any | None] = _nothing
    samples_as_plain: bool = False
    needs_runner_v1: Callable[[Any], bool] = lambda _: False
    answers: AnswerFormat | None = None
    leaves_open: bool = False


# "module:NAME" of every record, so that a method is imported when it is first needed.
FEATURES = ("vllm_nvium.nvium.feature:NVIUM", "vllm_nvium.via_sd.feature:VIA_SD")


# Folder of a method -> why it cannot run with the installed vLLM.
_off: dict[str, str] = {}


@cache
def features() -> tuple[Feature, ...]:
    """Every method; of one that is switched off, a record that refuses its options."""
    found = []
    for path in FEATURES:
        module, _, name = path.partition(":")
        feature = getattr(importlib.import_module(module), name)
        reason = _off.get(feature.folder)
        found.append(feature if reason is None else _refusing(feature, reason))
    return tuple(found)


def answer_formats() -> tuple[AnswerFormat, ...]:
    """Of every method that has one."""
    return tuple(_formats().values())


def answer_format(folder: str) -> AnswerFormat | None:
    """Of the method in this folder; None if it is switched off."""
    return _formats().get(folder)


@cache
def _formats() -> dict[str, AnswerFormat]:
    return {f.folder: f.answers for f in features() if f.answers is not None}


def switch_off(reasons: Mapping[str, str]) -> None:
    """Engines with options of these methods (by folder) are refused from now on; others are not."""
    _off.clear()
    _off.update(reasons)
    features.cache_clear()
    _formats.cache_clear()


def _refusing(feature: Feature, reason: str) -> Feature:
    def check_engine_args(engine_args: Any) -> None:
        for key in picked(engine_args.additional_config, feature.is_own):
            raise UserError(f"{flag(key)} is given, but {feature.name} is off: {reason}")

    return Feature(
        name=feature.name,
        folder=feature.folder,
        hooks=feature.hooks,
        keys=feature.keys,
        is_own=feature.is_own,
        add_arguments=feature.add_arguments,
        validate_request=_nothing,
        is_on=lambda _: False,
        check_engine_args=check_engine_args,
    )


def running(vllm_config: "VllmConfig", other_than: str = "") -> Feature | None:
    """The method that an engine of this configuration runs, if any, leaving out one by name."""
    for feature in features():
        if feature.name != other_than and feature.is_on(vllm_config):
            return feature
    return None
