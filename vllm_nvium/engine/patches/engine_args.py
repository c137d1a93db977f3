# SPDX-License-Identifier: Apache-2.0
"""`vllm.engine.arg_utils.EngineArgs`: the --nvium-* and --via-sd-* flags, as flags and as keyword
arguments, and refusals that read as one sentence. vLLM 0.32 offers plugins no way to add either. It
loads them before its parser is built, and otherwise inside the first `EngineArgs`."""

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pydantic import ValidationError

from vllm_nvium.engine.feature import features
from vllm_nvium.engine.options import given_on_command_line, merge
from vllm_nvium.engine.patches import Patch
from vllm_nvium.errors import UserError

MODULE, CLASS = "vllm.engine.arg_utils", "EngineArgs"


def _keys() -> tuple[str, ...]:
    return tuple(key for feature in features() for key in feature.keys)


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for feature in features():
            feature.add_arguments(parser)
        parser.parse_known_args = _with_flags_merged(parser)
        return parser

    return add_cli_args


def _with_flags_merged(parser: Any) -> Callable[..., Any]:
    """This parser's way to parse, with the flags in `additional_config`. API servers that vLLM
    spawns (`--api-server-count`, data parallelism) get what was parsed and make their engine
    arguments of it before they load plugins."""
    original = parser.parse_known_args

    @functools.wraps(original)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        found, rest = original(*args, **kwargs)
        if flags := given_on_command_line(found, _keys()):
            try:
                found.additional_config = merge(found.additional_config, flags)
            except UserError as error:
                parser.error(str(error))
        return found, rest

    return parse_known_args


def _with_keywords(original: Callable[..., Any]) -> Callable[..., Any]:
    # No fields are added: what is made from fields (the parser, copies, pickles, hashes) stays.
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {key: kwargs.pop(key) for key in _keys() if key in kwargs}
        original(self, *args, **kwargs)
        if given:
            own = {key: value for key, value in given.items() if value is not None}
            self.additional_config = merge(self.additional_config, own)

    return __init__


def _with_flag_values(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any) -> Any:
        engine_args = original(cls, args)
        engine_args.additional_config = merge(
            engine_args.additional_config, given_on_command_line(args, _keys())
        )
        return engine_args

    return from_cli_args


def _with_refusals(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_engine_args(self)
        # vLLM fills in defaults before it is done.
        given = copy.copy(self)
        given.additional_config = copy.copy(self.additional_config)
        try:
            with ExitStack() as stack:
                for feature in features():
                    stack.enter_context(feature.prepared(self))
                vllm_config = original(self, *args, **kwargs)
        except (ValueError, AssertionError, NotImplementedError) as error:
            best = _best_refusal(error, given, lambda one: original(one, *args, **kwargs))
            if best is error:
                raise
            raise best from None
        for feature in features():
            feature.check(vllm_config)
        return vllm_config

    return create_engine_config


def _best_refusal(error: Exception, given: Any, make: Callable[[Any], Any]) -> Exception:
    """What says best why a start failed: a refusal of this package, whose sentence pydantic has
    wrapped, or vLLM's error about what the user gave."""
    if isinstance(error, UserError):
        return error
    if refusal := _own_refusal(error):
        return refusal
    try:
        # By now vLLM has fetched a drafter that was not here.
        _check_engine_args(given)
    except UserError as refusal:
        return refusal
    for feature in features():
        if (other := feature.instead_of(error, given, make)) is not None:
            return _own_refusal(other) or other
    return error


def _check_engine_args(engine_args: Any) -> None:
    for feature in features():
        feature.check_engine_args(engine_args)


def _own_refusal(error: Exception) -> UserError | None:
    """The refusal of this package inside pydantic's wrapping, if that is what it is."""
    if not isinstance(error, ValidationError):
        return None
    for line in error.errors():
        cause = line.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            return cause.with_traceback(None)
    return None


PATCHES = (
    Patch(
        MODULE,
        CLASS,
        "add_cli_args",
        _with_flags,
        without="`vllm serve` does not know --nvium-* and --via-sd-*",
        until="vLLM lets a plugin add an argument group",
        kind=staticmethod,
    ),
    Patch(
        MODULE,
        CLASS,
        "from_cli_args",
        _with_flag_values,
        without="--nvium-* would be parsed and dropped",
        until="vLLM lets a plugin add an argument group",
        kind=classmethod,
    ),
    *(
        Patch(
            MODULE,
            # A dataclass has an `__init__` of its own and does not call the one of its base.
            owner,
            "__init__",
            _with_keywords,
            without="`LLM(..., via_sd=True)` is a TypeError",
            until="vLLM lets a plugin add an engine argument",
        )
        for owner in (CLASS, "AsyncEngineArgs")
    ),
    Patch(
        MODULE,
        CLASS,
        "create_engine_config",
        _with_refusals,
        without="--nvium-* on another model is accepted, and refusals come wrapped by pydantic",
        until="additional_config has owners that can check it",
    ),
)
