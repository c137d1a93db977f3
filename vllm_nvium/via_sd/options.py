# SPDX-License-Identifier: Apache-2.0
"""The options of VIA-SD (speculative decoding with a slim verifier, arXiv:2606.12243): the one
place where a flag, its default, its check and its help text live. They travel as flat keys of
vLLM's `additional_config`; a request may override some of them through `vllm_xargs`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from vllm_nvium.engine.feature import running
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
from vllm_nvium.engine.request_metrics import NEEDED_LEVEL, OPTION, Level
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd import DEFAULT_WINDOW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

KEY = "via_sd"
PREFIX = "via_sd_"
AUTO: Literal["auto"] = "auto"
SKIP = "skip"
# What the slim verifier skips where nothing is said.
DEFAULT_MASK = "even:0.2"
# So many drafts are verified in a step at most; a round adds one of them at least.
LARGEST_WINDOW = 128
# Of all requests in a step, where these are no more: the memory of a step is that of their logits,
# and a full model that verifies so many rows has long ceased to be cheaper than by one row.
MOST_DRAFTS = 1024
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
# What the paper's rule alone has.
THRESHOLDS = ("accept", "escalate")


@dataclass(frozen=True)
class ViaSDOptions:
    """Options of one engine.

    Attributes:
        slim: what makes the slim verifier cheaper than the target: copies of the weights at low
            precision, or `skip`, layers left out. `auto` times the kinds at start and takes the one
            that promises most. None is `skip` where a mask is given, else `auto`.
        mask: which layers the slim verifier skips: a mask file, `even:RATIO`, or a list of layers.
            None is `even:0.2` for `skip`, and no layer for the others.
        mode: `lossless`, or the paper's rule, which keeps tokens that the full model never saw.
        accept, escalate: thresholds of the paper's rule on `q'(v) / max q'`.
        window: most tokens between two passes of the full model.
        rounds: rounds of drafting and slim checks in a window; `auto` to let measured times and
            acceptances decide, 0 for plain speculative decoding.
        max_batch: the tier is off while more requests than this decode; None for no such bound.
        allow_paper_mode: a request may ask for the paper's rule where the server's is lossless.
        request_metrics: what an answer tells of its own tokens; `detailed` has the tier of each.
        drafts: most tokens that the drafter proposes at a time, from `--speculative-config`; its
            `num_speculative_tokens` becomes `window`. Not a flag.
    """

    slim: Annotated[
        Literal["auto", "int4", "int8", "fp8", "skip"] | None,
        Option(
            needed="'auto', 'int4', 'int8', 'fp8' or 'skip'",
            help="What makes the slim verifier cheaper than the target: copies of its weights at "
            "low precision, or layers that it skips. 'auto' times the kinds at start and takes the "
            "one that promises most. The default is 'skip' beside --via-sd-mask, else 'auto'.",
        ),
    ] = None
    mask: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Option(
            needed="a file, even:RATIO or a list",
            help="Layers that the slim verifier skips: a file of `vllm-nvium search-mask`, a ratio "
            "of evenly spread layers, or a list such as 5,9,13-15. The default is even:0.2 for "
            "--via-sd-slim skip, and none for the other kinds.",
            metavar="FILE|even:RATIO|LIST",
        ),
    ] = None
    mode: Annotated[
        Literal["lossless", "paper"],
        Option(
            needed="'lossless' or 'paper'",
            help="'lossless': the output law is the target's; 'paper': tokens that the slim "
            "verifier is sure of are kept without asking the target, which changes the output.",
            per_request=True,
        ),
    ] = "lossless"
    accept: Annotated[
        Share,
        Option(
            needed="a number in 0..1",
            help="Mode 'paper': a draft is kept when its slim probability is at least this share "
            "of the largest.",
            metavar="SHARE",
            per_request=True,
        ),
    ] = 0.5
    escalate: Annotated[
        Share,
        Option(
            needed="a number in 0..1",
            help="Mode 'paper': below this share the target decides; between the two the slim "
            "verifier draws again.",
            metavar="SHARE",
            per_request=True,
        ),
    ] = 0.3
    window: Annotated[
        Annotated[int, Field(ge=1, le=LARGEST_WINDOW)],
        Option(
            needed=f"an integer in 1..{LARGEST_WINDOW}",
            help="Most tokens between two passes of the full model.",
            metavar="N",
        ),
    ] = DEFAULT_WINDOW
    rounds: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0, le=LARGEST_WINDOW)],
        Option(
            needed=f"'auto' or an integer in 0..{LARGEST_WINDOW}",
            help="Rounds of drafting and slim checks in a window; 'auto' lets measured times and "
            "acceptances decide, and uses the tier only where it pays; 0 is plain speculative "
            "decoding.",
            metavar="auto|N",
        ),
    ] = AUTO
    max_batch: Annotated[
        Annotated[int, Field(ge=1, le=LARGEST_COUNT)] | None,
        Option(
            needed=f"an integer in 1..{LARGEST_COUNT}",
            help="Use the tier only while at most so many requests decode; by default there is no "
            "bound.",
            metavar="N",
        ),
    ] = None
    allow_paper_mode: Annotated[
        bool,
        Option(needed="a bool", help="Let requests ask for mode 'paper' on a lossless server."),
    ] = False
    request_metrics: Annotated[
        Level,
        Option(
            needed=NEEDED_LEVEL,
            help="What an answer tells of its own tokens: 'summary' how many each tier said and "
            "how often the full model was asked, in `metrics`; 'detailed' each token's tier too.",
            per_request=True,
        ),
    ] = "none"
    drafts: Annotated[
        Annotated[int, Field(ge=0, le=LARGEST_WINDOW)],
        Option(needed=f"an integer in 1..{LARGEST_WINDOW}"),
    ] = 0

    @property
    def kind(self) -> str:
        """`slim`, with its default filled in."""
        return self.slim or (AUTO if self.mask is None else SKIP)

    def most_with_windows(self, requests: int) -> int:
        """Of so many requests in a step, those that may have windows at the same time."""
        return min(self.max_batch or requests, requests)

    def most_drafts(self, requests: int, has_windows: bool = True) -> int:
        """Of so many requests, in one step."""
        windows = self.most_with_windows(requests) if has_windows else 0
        drafted = max(requests * self.drafts, windows * self.window)
        return min(drafted, max(requests, MOST_DRAFTS))

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
        values = read(cls, given, PREFIX, "VIA-SD")
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

    def to_config(self) -> dict[str, Any]:
        """For `LLM(..., additional_config=...)`, with VIA-SD switched on."""
        return {KEY: True} | as_config(self, PREFIX)


# The options that a user gives, as keys of `additional_config` and as keyword arguments.
KEYS = (KEY, *keys_of(ViaSDOptions, PREFIX))


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
    request_metrics: Level = "none"

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
            OPTION: engine.request_metrics,
        }
        values |= read(ViaSDOptions, given, PREFIX, "VIA-SD", of_request=True)
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
    """Add the group "VIA-SD" to vLLM's parser."""
    group = parser.add_argument_group(
        title="VIA-SD",
        description="Speculative decoding with a slim verifier, made of the target itself: a copy "
        "at low precision, or some of its layers. It checks drafts, and drafts on by itself, "
        "before the full model verifies. --speculative-config may name another drafter.",
    )
    group.add_argument(
        "--via-sd", action="store_true", default=None, help="Use a slim verifier. (default: off)"
    )
    add_flags(group, ViaSDOptions, PREFIX)


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
    """The options of an engine; None when VIA-SD is off. Read once for each configuration."""
    return _engine_options(vllm_config.additional_config)


def validate_request(sampling_params: "SamplingParams", vllm_config: "VllmConfig") -> None:
    """Check one request; called in the process that answers the client.

    Raises:
        UserError: one sentence, sent to the client with status 400.
    """
    engine = options_of(vllm_config)
    if engine is None:
        _refuse_options(sampling_params, vllm_config)
        return
    ViaSDRequestOptions.from_extra_args(sampling_params.extra_args, engine)


_engine_options = Remembered(ViaSDOptions.from_config)


def request_metrics_level(extra_args: Any, vllm_config: "VllmConfig") -> Level:
    """What a request that was checked is to be told of its tokens."""
    engine = _engine_options(vllm_config.additional_config)
    assert engine is not None
    return ViaSDRequestOptions.from_extra_args(extra_args, engine).request_metrics


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
