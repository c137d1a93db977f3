# SPDX-License-Identifier: Apache-2.0
"""What reading options has in common for both methods: which keys of a mapping are a method's, how
flags get into `additional_config`, and how a value is shown in an error. Requests come from
anybody, so nothing here fails on any value."""

import argparse
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vllm_nvium.errors import UserError

T = TypeVar("T")

# No option counts anything that has more. What is larger may not fit the arrays it ends in, and an
# error there, in the engine core, would end the server for everybody.
LARGEST_COUNT = 2**31 - 1


def picked(options: Any, is_own: Callable[[str], bool]) -> dict[str, Any]:
    """The given ones among a method's keys of a mapping; None is "not given", which is what batch
    frameworks fill missing keys with.

    Args:
        options: a mapping; what is none has no keys.
    """
    if not isinstance(options, Mapping):
        return {}
    return {
        key: value
        for key, value in options.items()
        if isinstance(key, str) and is_own(key) and value is not None
    }


def picked_of_request(extra_args: Any, is_own: Callable[[str], bool]) -> dict[str, Any]:
    """`picked` of `SamplingParams.extra_args` (HTTP: `vllm_xargs`).

    Raises:
        UserError: it is no mapping, which would end the engine core; one sentence.
    """
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise UserError(
            f"extra_args is {shown(extra_args)}; it must be a mapping of names to values."
        )
    return picked(extra_args, is_own)


def flag(key: str) -> str:
    """The flag of a key of `additional_config`."""
    return "--" + key.replace("_", "-")


@dataclass(frozen=True)
class Option:
    """What a field of a method's options is beside its type; stands in `Annotated`. Flags, their
    help, and checks and errors of all ways to give an option come from type and this.

    Attributes:
        needed: what would be right, as in "it must be ...".
        help: of the flag; none if empty.
        metavar: of the flag, where it has no list of choices.
        per_request: a request may set it in `vllm_xargs`.
    """

    needed: str
    help: str = ""
    metavar: str | None = None
    per_request: bool = False


@cache
def options_of_class(options: type) -> dict[str, Option]:
    """The options that users give, by field."""
    return {name: found for name, (found, _) in _described(options).items() if found.help}


@cache
def _described(options: type) -> dict[str, tuple[Option, TypeAdapter[Any]]]:
    found = {}
    for name, annotation in get_type_hints(options, include_extras=True).items():
        [option] = [part for part in annotation.__metadata__ if isinstance(part, Option)]
        found[name] = option, TypeAdapter(annotation)
    return found


def keys_of(options: type, prefix: str) -> tuple[str, ...]:
    """The options that users give, as keys of `additional_config` and as keyword arguments."""
    return tuple(prefix + name for name in options_of_class(options))


def as_config(options: Any, prefix: str) -> dict[str, Any]:
    """Options as keys of `additional_config`; defaults are left out, because one that does nothing
    is refused where it is given."""
    cls: Any = type(options)
    return {
        prefix + name: getattr(options, name)
        for name in options_of_class(cls)
        if getattr(options, name) != getattr(cls, name)
    }


def read(
    options: type, given: Mapping[str, Any], prefix: str, method: str, of_request: bool = False
) -> dict[str, Any]:
    """The values of given keys, by field.

    Args:
        options: a dataclass whose fields have an `Option` each.
        method: its name, for messages.
        of_request: the keys are those of a request; else of `additional_config`.

    Raises:
        UserError: a key is unknown, or a value is of another type or out of range; one sentence.
    """
    source = "vllm_xargs" if of_request else "additional_config"
    described, values = _described(options), {}
    for key, value in given.items():
        name = key.removeprefix(prefix)
        if name not in described or (of_request and not described[name][0].per_request):
            known = ", ".join(
                prefix + other
                for other, option in options_of_class(options).items()
                if option.per_request or not of_request
            )
            whose = "that a request can set" if of_request else f"of {method}"
            raise UserError(f"{source} {shown(key)} is not an option {whose}; there are {known}.")
        option, adapter = described[name]
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError:
            where = f"{source} {key!r}"
            if not of_request:
                where = f"{flag(key)} ({where})"
            raise UserError(f"{where} is {shown(value)}; it must be {option.needed}.") from None
        values[name] = value
    return values


def add_flags(group: Any, options: type, prefix: str) -> None:
    """Add the flags of a method to its group of a parser. Unset flags are None, so that it can be
    told whether one was given: one that does nothing (on another model) is refused."""
    for name, (option, adapter) in _described(options).items():
        if not option.help:
            continue
        default = getattr(options, name)
        schema = adapter.json_schema()
        # Of an option that may be left to its default, the part that says what it may be.
        for part in schema.get("anyOf", ()):
            if part.get("enum"):
                schema = part
        settings: dict[str, Any] = {}
        if schema.get("type") == "boolean":
            settings["action"], shown_default = "store_true", "off"
        else:
            shown_default = default
            if choices := schema.get("enum"):
                settings["choices"] = choices
            else:
                settings |= {"type": _parsed_by(option, adapter), "metavar": option.metavar}
        per_request = f" Per request: vllm_xargs {prefix}{name}." if option.per_request else ""
        default_text = "" if default is None else f" (default: {shown_default})"
        group.add_argument(
            flag(prefix + name),
            default=None,
            help=f"{option.help}{per_request}{default_text}".replace("%", "%%"),
            **settings,
        )


def _parsed_by(option: Option, adapter: TypeAdapter[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return adapter.validate_strings(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(
                f"{shown(text)} is given, and it must be {option.needed}"
            ) from None

    return parse


def given_on_command_line(args: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, as keys of `additional_config`."""
    return {key: getattr(args, key) for key in keys if getattr(args, key, None) is not None}


def merge(additional_config: Any, flags: Mapping[str, Any]) -> Any:
    """`additional_config` with the flags added.

    Raises:
        UserError: the same option is given twice with different values.
    """
    if not flags:
        return additional_config
    if not isinstance(additional_config, dict):
        raise UserError(
            f"--additional-config is a {type(additional_config).__name__}, and {flag(min(flags))} "
            "can only be added to a JSON object."
        )
    for key, value in flags.items():
        other = additional_config.get(key)
        if other is not None and other != value:
            raise UserError(
                f"{flag(key)} is {value!r} but --additional-config says {key} = {shown(other)}; "
                "give one of them."
            )
    return {**additional_config, **flags}


def shown(value: Any) -> str:
    """`repr(value)` on one line and, of a large value, its beginning and end only."""
    return _SHORT.repr(value).replace("\n", " ")


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out integers of some thousand digits.
        bits = value.bit_length()
        return repr(value) if bits <= 128 else f"an integer of {bits} bits"


_SHORT = _Short()


class Remembered(Generic[T]):
    """A function of one object that is asked anew only when it gets another object than the last
    time: the options of an engine, which every request is compared with."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read
        # In one piece, so that a thread never sees one object with the answer to another. It keeps
        # the object alive, so that no later one can be taken for it.
        self._last: tuple[Any, T] | None = None

    def __call__(self, source: Any) -> T:
        last = self._last
        if last is None or last[0] is not source:
            last = self._last = (source, self._read(source))
        return last[1]
