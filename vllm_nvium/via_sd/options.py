# SPDX-License-Identifier: Apache-2.0
"""The options of VIA-SD (speculative decoding with a slim verifier, arXiv:2606.12243): the one
place where a flag, its default, its check and its help text live. They travel as flat keys of
vLLM's `additional_config`; a request may override some of them through `vllm_xargs`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.options import (
    LARGEST_COUNT,
    Remembered,
    flag,
    is_count,
    is_one_of,
    is_share,
    picked,
    picked_of_request,
    shown,
)
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd import DEFAULT_WINDOW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

KEY = "via_sd"
PREFIX = "via_sd_"
MODES = ("lossless", "paper")
AUTO = "auto"
# vLLM's rejection sampler takes at most so many drafts; a round adds one of them at least.
LARGEST_WINDOW = 128
# What the paper's rule alone has.
THRESHOLDS = ("accept", "escalate")
# What it has not: penalties, and the values at which they do nothing.
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class ViaSDOptions:
    """Options of one engine.

    Attributes:
        mask: which layers the slim verifier skips: a mask file, `even:RATIO`, or a list of layers.
        mode: `lossless`, or the paper's rule, which keeps tokens that the full model never saw.
        accept, escalate: thresholds of the paper's rule on `q'(v) / max q'`.
        window: most tokens between two passes of the full model.
        rounds: rounds of drafting and slim checks in a window; `auto` to let measured times and
            acceptances decide, 0 for plain speculative decoding.
        max_batch: the tier is off while more requests than this decode; None for no such bound.
        allow_paper_mode: a request may ask for the paper's rule where the server's is lossless.
        drafts: most tokens that the drafter proposes at a time, from `--speculative-config`; its
            `num_speculative_tokens` becomes `window`. Not a flag.
    """

    mask: str = "even:0.2"
    mode: str = "lossless"
    accept: float = 0.5
    escalate: float = 0.3
    window: int = DEFAULT_WINDOW
    rounds: int | str = AUTO
    max_batch: int | None = None
    allow_paper_mode: bool = False
    drafts: int = 0

    @classmethod
    def from_config(cls, additional_config: Any) -> "ViaSDOptions | None":
        """Read and check the keys `via_sd*`; None when VIA-SD is off.

        Raises:
            UserError: a key is unknown, a value is out of range, or options are given while it is
                off; one sentence.
        """
        given = additional_keys(additional_config)
        switch = given.pop(KEY, False)
        if not isinstance(switch, bool):
            raise UserError(
                f"--via-sd (additional_config 'via_sd') is {shown(switch)}; give a bool."
            )
        if not switch:
            if given:
                key, value = next(iter(given.items()))
                raise UserError(f"{flag(key)} is {shown(value)}, but VIA-SD is off; add --via-sd.")
            return None
        values = {key.removeprefix(PREFIX): value for key, value in given.items()}
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise UserError(
                    f"additional_config {shown(PREFIX + name)} is not an option of VIA-SD; there "
                    f"are {', '.join(PREFIX + option for option in known if option != 'drafts')}."
                )
            _check_value(f"{flag(PREFIX + name)} (additional_config)", name, value)
        options = cls(**values)
        _check_thresholds("--via-sd-", options.accept, options.escalate)
        for name in THRESHOLDS:
            if name in values and options.mode != "paper" and not options.allow_paper_mode:
                raise UserError(
                    f"--via-sd-{name} is {values[name]}, but the mode is lossless and has no "
                    "thresholds; remove it, or add --via-sd-mode paper or "
                    "--via-sd-allow-paper-mode."
                )
        _check_without_rounds(options)
        # A round of slim checks ends with a token of the slim verifier's own.
        needed = options.drafts + int(options.rounds != 0)
        if needed > options.window:
            raise UserError(
                f"--via-sd-window is {options.window}, and the drafter's num_speculative_tokens is "
                f"{options.drafts}: a window must hold the drafts of one round and a token of the "
                f"slim verifier, so give at least {needed}."
            )
        return options


# The options that a user gives, as keys of `additional_config` and as keyword arguments.
KEYS = (KEY, *(PREFIX + field.name for field in fields(ViaSDOptions) if field.name != "drafts"))


@dataclass(frozen=True)
class ViaSDRequestOptions:
    """Options of one request; the fields mean the same as in `ViaSDOptions`.

    Attributes:
        on: whether the tier is used at all.
    """

    on: bool
    mode: str
    accept: float
    escalate: float

    @classmethod
    def from_extra_args(
        cls, extra_args: Mapping[str, Any] | None, engine: ViaSDOptions
    ) -> "ViaSDRequestOptions":
        """Read `SamplingParams.extra_args` (HTTP: `vllm_xargs`); what is absent is the engine's.

        Raises:
            UserError: a key is unknown, a value is out of range, or the paper's rule is asked for
                where it is not allowed; one sentence.
        """
        given = picked_of_request(extra_args, is_own)
        on = _switch(given.pop(KEY, True))
        values: dict[str, Any] = {
            "mode": engine.mode,
            "accept": engine.accept,
            "escalate": engine.escalate,
        }
        for key, value in given.items():
            name = key.removeprefix(PREFIX)
            if name not in values:
                known = ", ".join([KEY, *(PREFIX + option for option in values)])
                raise UserError(
                    f"vllm_xargs {shown(key)} is not an option that a request can set; there are "
                    f"{known}."
                )
            _check_value(f"vllm_xargs {key!r}", name, value)
            values[name] = value
        _check_thresholds("vllm_xargs via_sd_", values["accept"], values["escalate"])
        if values["mode"] == "paper" and engine.mode != "paper" and not engine.allow_paper_mode:
            raise UserError(
                "vllm_xargs 'via_sd_mode' is 'paper', but this server is lossless; it must be "
                "started with --via-sd-allow-paper-mode."
            )
        for name in THRESHOLDS:
            if PREFIX + name in given and values["mode"] != "paper":
                raise UserError(
                    f"vllm_xargs {PREFIX + name!r} is {values[name]}, but the request is lossless "
                    "and has no thresholds; remove it or ask for via_sd_mode 'paper'."
                )
        return cls(on=on, **values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "VIA-SD" to vLLM's parser; unset flags are None, see `flags.add_arguments`."""
    group = parser.add_argument_group(
        title="VIA-SD",
        description="Speculative decoding with a slim verifier: beside --speculative-config, which "
        "names the drafter, the target with some layers skipped checks drafts before the full "
        "model does.",
    )
    group.add_argument(
        "--via-sd", action="store_true", default=None, help="Use a slim verifier. (default: off)"
    )
    group.add_argument(
        "--via-sd-mask",
        default=None,
        metavar="FILE|even:RATIO|LIST",
        help="Layers that the slim verifier skips: a file of `vllm-nvium search-mask`, a ratio of "
        "evenly spread layers, or a list such as 5,9,13-15. "
        f"(default: {ViaSDOptions.mask})",
    )
    group.add_argument(
        "--via-sd-mode",
        choices=MODES,
        default=None,
        help="'lossless': the output law is the target's; 'paper': tokens that the slim verifier "
        "is sure of are kept without asking the target, which changes the output. Per request: "
        f"vllm_xargs via_sd_mode. (default: {ViaSDOptions.mode})",
    )
    group.add_argument(
        "--via-sd-accept",
        type=float,
        default=None,
        metavar="SHARE",
        help="Mode 'paper': a draft is kept when its slim probability is at least this share of "
        f"the largest. Per request: vllm_xargs via_sd_accept. (default: {ViaSDOptions.accept})",
    )
    group.add_argument(
        "--via-sd-escalate",
        type=float,
        default=None,
        metavar="SHARE",
        help="Mode 'paper': below this share the target decides; between the two the slim verifier "
        "draws again. Per request: vllm_xargs via_sd_escalate. "
        f"(default: {ViaSDOptions.escalate})",
    )
    group.add_argument(
        "--via-sd-window",
        type=int,
        default=None,
        metavar="N",
        help=f"Most tokens between two passes of the full model. (default: {ViaSDOptions.window})",
    )
    group.add_argument(
        "--via-sd-rounds",
        type=_rounds,
        default=None,
        metavar="auto|N",
        help="Rounds of drafting and slim checks in a window; 'auto' lets measured times and "
        "acceptances decide, and uses the tier only where it pays; 0 is plain speculative "
        f"decoding. (default: {ViaSDOptions.rounds})",
    )
    group.add_argument(
        "--via-sd-max-batch",
        type=int,
        default=None,
        metavar="N",
        help="Use the tier only while at most so many requests decode. (default: no bound)",
    )
    group.add_argument(
        "--via-sd-allow-paper-mode",
        action="store_true",
        default=None,
        help="Let requests ask for mode 'paper' on a lossless server. (default: off)",
    )


def is_own(key: str) -> bool:
    """Whether a key of `additional_config` or of `vllm_xargs` is meant for VIA-SD."""
    return key == KEY or key.startswith(PREFIX)


def additional_keys(additional_config: Any) -> dict[str, Any]:
    """The keys `via_sd*` of a mapping, unchecked."""
    return picked(additional_config, is_own)


def is_on(additional_config: Any) -> bool:
    """Whether VIA-SD is on, whatever its other options are."""
    return additional_keys(additional_config).get(KEY) is True


def options_of(vllm_config: "VllmConfig") -> ViaSDOptions | None:
    """The options of an engine; None when VIA-SD is off."""
    return ViaSDOptions.from_config(vllm_config.additional_config)


def validate_request(sampling_params: "SamplingParams", vllm_config: "VllmConfig") -> None:
    """Check one request; called in the process that answers the client.

    Raises:
        UserError: one sentence, sent to the client with status 400.
    """
    engine = _engine_options(vllm_config.additional_config)
    if engine is None:
        _refuse_options(sampling_params, vllm_config)
        return
    request = ViaSDRequestOptions.from_extra_args(sampling_params.extra_args, engine)
    if request.on and request.mode == "paper":
        _check_penalties(sampling_params)
    # vLLM's rejection sampler has no place for them, and one such request would stop the engine for
    # all others.
    if sampling_params.logprob_token_ids:
        raise UserError(
            f"logprob_token_ids is {shown(sampling_params.logprob_token_ids)}, which speculative "
            "decoding of vLLM cannot answer; leave it out, or ask a server without --via-sd."
        )
    # vLLM looks for the row to force the end of thinking on among the drafts of all requests, and
    # takes the first row, whoever's it is, where nobody has any.
    if sampling_params.thinking_token_budget is not None:
        raise UserError(
            f"thinking_token_budget is {shown(sampling_params.thinking_token_budget)}, which "
            "speculative decoding of vLLM can charge to another request; leave it out, or ask a "
            "server without --via-sd."
        )


_engine_options = Remembered(ViaSDOptions.from_config)


def _refuse_options(sampling_params: "SamplingParams", vllm_config: "VllmConfig") -> None:
    """Of a request to an engine without VIA-SD."""
    for key, value in picked_of_request(sampling_params.extra_args, is_own).items():
        remedy = "the server must be started with --via-sd"
        if (other := running(vllm_config)) is not None:
            remedy = f"an {other.name} model leaves layers out by itself, so remove it"
        raise UserError(f"vllm_xargs {shown(key)} is {shown(value)}, but VIA-SD is off; {remedy}.")


def _check_without_rounds(options: ViaSDOptions) -> None:
    """Without rounds there is no tier, and what only the tier reads is a mistake. The mask is let
    through, so that a comparison of rounds can leave the rest of its command as it is."""
    if options.rounds != 0:
        return
    for name, nothing in (("mode", "lossless"), ("max_batch", None), ("allow_paper_mode", False)):
        if (value := getattr(options, name)) != nothing:
            raise UserError(
                f"{flag(PREFIX + name)} is {value!r}, but --via-sd-rounds is 0, which is plain "
                "speculative decoding and does not read it; remove it, or give rounds."
            )


def _check_penalties(params: "SamplingParams") -> None:
    """What the slim verifier is sure of is kept as it is, so penalties would not reach it."""
    for name, nothing in NO_PENALTIES.items():
        if (value := getattr(params, name)) != nothing:
            raise UserError(
                f"{name} is {value} (perhaps by the model's generation_config.json), but tokens "
                f"that the paper's rule keeps take no penalties; set it to {nothing:g} or ask for "
                "vllm_xargs via_sd_mode 'lossless'."
            )


def _check_value(where: str, name: str, value: Any) -> None:
    good: bool
    if name == "mask":
        good, needed = isinstance(value, str) and bool(value), "a file, even:RATIO or a list"
    elif name == "mode":
        good, needed = is_one_of(value, MODES), " or ".join(map(repr, MODES))
    elif name in THRESHOLDS:
        good, needed = is_share(value), "a number in 0..1"
    elif name == "allow_paper_mode":
        good, needed = isinstance(value, bool), "a bool"
    elif name == "rounds":
        good = is_one_of(value, (AUTO,)) or is_count(value, 0, LARGEST_WINDOW)
        needed = f"{AUTO!r} or an integer in 0..{LARGEST_WINDOW}"
    elif name == "max_batch":
        good, needed = is_count(value, 1), f"an integer in 1..{LARGEST_COUNT}"
    else:
        good = is_count(value, 0 if name == "drafts" else 1, LARGEST_WINDOW)
        needed = f"an integer in 1..{LARGEST_WINDOW}"
    if not good:
        raise UserError(f"{where} is {shown(value)}; it must be {needed}.")


def _check_thresholds(prefix: str, accept: float, escalate: float) -> None:
    if escalate > accept:
        raise UserError(
            f"{prefix}escalate is {escalate} and {prefix}accept is {accept}; escalate must not "
            "exceed accept."
        )


def _switch(value: Any) -> bool:
    """`vllm_xargs` carry strings and numbers besides booleans."""
    if isinstance(value, str | int | float):
        if value in (True, "on", "true", "1"):
            return True
        if value in (False, "off", "false", "0"):
            return False
    raise UserError(f"vllm_xargs 'via_sd' is {shown(value)}; it must be 'on' or 'off'.")


def _rounds(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is neither 'auto' nor an integer"
        ) from None
