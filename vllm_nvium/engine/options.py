# SPDX-License-Identifier: Apache-2.0
"""What reading options has in common for both methods: which keys of a mapping are a method's, how
flags get into `additional_config`, and how a value is shown in an error. Requests come from
anybody, so nothing here fails on any value."""

import argparse
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

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


def is_count(value: Any, smallest: int, largest: int = LARGEST_COUNT) -> bool:
    """Whether a value is an integer in a range, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def is_share(value: Any) -> bool:
    """Whether a value is a number in 0..1, and neither NaN nor a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def is_one_of(value: Any, names: tuple[str, ...]) -> bool:
    """Whether a value is one of some strings; only strings are compared, because `==` of others
    (arrays) may answer with anything."""
    return isinstance(value, str) and value in names


def flag(key: str) -> str:
    """The flag of a key of `additional_config`."""
    return "--" + key.replace("_", "-")


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
