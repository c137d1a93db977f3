# SPDX-License-Identifier: Apache-2.0
"""Options of a command as one class: its fields are the flags, the names of a configuration file
and the arguments in Python, and whichever way a value comes, it is checked once and alike.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_nvium.errors import UserError


class Options(BaseModel):
    """Raises a `UserError` of one sentence for a value that is not of a field's type or range."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{flag_of(str(first['loc'][0]))} is {first['input']!r}: {said[0].lower()}"
                f"{said[1:]}."
            ) from None


def option(default: Any, text: str, metavar: str | None = None, **bounds: Any) -> Any:
    """A field.

    Args:
        default: `...` if it must be given.
        text: of the flag's help, which names the default besides.
        bounds: of pydantic, such as `ge=1`.
    """
    return Field(default, description=text, title=metavar, **bounds)


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _one_word(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value)  # YAML has more: dates, for instance
    except TypeError as error:
        raise ValueError(str(error)) from None
    return value


# Lists of words, of which one may stand alone, and of numbers with commas; names with values, JSON
# as a flag.
Words = Annotated[list[str], BeforeValidator(_one_word)]
Integers = Annotated[list[int], BeforeValidator(_split)]
Shares = Annotated[list[Annotated[float, Field(ge=0, le=1)]], BeforeValidator(_split)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_parsed), AfterValidator(_as_json)]


def flag_of(name: str) -> str:
    """How an option is spelled on the command line."""
    return "--" + name.replace("_", "-")


def add_flags(
    parser: Any, options: type[Options], left_out: Sequence[str] = (), **short: str
) -> None:
    """A flag for every field. Flags that are not given are not in the namespace, so that `Options`
    knows which were, and none is checked here.

    Args:
        left_out: fields that have no such flag.
        short: `-x` of fields that have such a name besides.
    """
    for name, field in options.model_fields.items():
        if name in left_out:
            continue
        default, text = field.default, str(field.description).replace("%", "%%")
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            settings["action"] = "store_true"
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            settings["metavar"] = field.title or "|".join(choices) or name.upper()
            settings["required"] = field.is_required()
            if field.annotation == list[str]:
                settings["nargs"] = "+"
            if default and not field.is_required() and "(default" not in text:
                text += f" (default: {default})"
        names = [short[name]] if name in short else []
        parser.add_argument(*names, flag_of(name), help=text, **settings)


def given_by(args: argparse.Namespace, options: type[Options]) -> dict[str, Any]:
    """What a namespace holds of the options."""
    return {name: value for name, value in vars(args).items() if name in options.model_fields}
