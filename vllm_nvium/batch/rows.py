# SPDX-License-Identifier: Apache-2.0
"""What a row of a batch job may say, and the request to vLLM's OpenAI layer that it becomes. A row
is a line of OpenAI's batch files, or the body of such a request alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_nvium.errors import UserError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
# Of OpenAI's requests, and without influence on the text.
WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier"})
WITHOUT_EFFECT |= {"store", "user"}


class BatchLine(BaseModel):
    """A line of OpenAI's batch files."""

    model_config = ConfigDict(extra="forbid")

    custom_id: str
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One request.

    Attributes:
        custom_id: the name that the row gave itself.
        url: `CHAT` or `COMPLETION`.
        body: as a client would send it there.
    """

    custom_id: str | None
    url: str
    body: dict[str, Any]


def row_seed(seed: int, index: int) -> int:
    """The seed of a row that gives none: it depends on the row's place alone, not on the replica
    that answers it. 63 bits, because vLLM takes 64 with a sign."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8]) >> 1


def read_fields(text: bytes) -> dict[str, Any]:
    """The fields of a row.

    Args:
        text: UTF-8, one JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        fields = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError("the row is not UTF-8 text.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the row is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise UserError(f"the row is a JSON {type(fields).__name__}; it must be an object.")
    return fields


def read_row(fields: Mapping[str, Any], seed: int | None) -> Row:
    """The request that a row stands for.

    Args:
        seed: of the request, if it gives none; None leaves it without.

    Raises:
        UserError: it stands for none.
    """
    row = _batch_line(fields) if fields.keys() & {"body", "url"} else _plain_row(fields)
    body = {key: value for key, value in row.body.items() if value is not None}
    if isinstance(extra := body.get("vllm_xargs"), Mapping):
        # Frameworks whose rows all have the same fields fill missing ones with None.
        body["vllm_xargs"] = {key: value for key, value in extra.items() if value is not None}
    if body.pop("stream", False):
        raise UserError("stream is true; a batch has no streams, so leave it out.")
    if seed is not None:
        body.setdefault("seed", seed)
    return Row(row.custom_id, row.url, body)


def name_of(fields: Mapping[str, Any]) -> str | None:
    """The `custom_id` of a row that may be wrong otherwise."""
    name = fields.get("custom_id")
    return name if isinstance(name, str) else None


def check_known(body: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse what vLLM would leave unread, as a misspelt parameter.

    Args:
        known: fields that the request has.

    Raises:
        UserError: the body has another.
    """
    if unknown := sorted(body.keys() - known - WITHOUT_EFFECT):
        raise UserError(f"unknown field {unknown[0]!r}: remove it, or correct its name.")


def _batch_line(fields: Mapping[str, Any]) -> Row:
    try:
        line = BatchLine.model_validate(fields)
    except ValidationError as error:
        raise UserError(
            f"{first_of(error)}. A line of a batch file has custom_id, method POST, a url "
            f"({CHAT} or {COMPLETION}) and a body."
        ) from None
    return Row(line.custom_id, line.url, line.body)


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong, and where, without the point."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").split("\n")[0].rstrip(".")
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {message}" if where else message


def _plain_row(fields: Mapping[str, Any]) -> Row:
    body = {key: value for key, value in fields.items() if value is not None}
    name = body.pop("custom_id", None)
    if name is not None and not isinstance(name, str):
        raise UserError(f"custom_id is {name!r}; it must be text.")
    if ("prompt" in body) == ("messages" in body):
        raise UserError("a row must have either prompt or messages.")
    return Row(name, CHAT if "messages" in body else COMPLETION, body)
