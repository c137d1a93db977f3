# SPDX-License-Identifier: Apache-2.0
"""What a batch job writes for each row: a line of OpenAI's batch output, or in Parquet the same
with what is mostly asked for in columns of its own."""

import filecmp
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_nvium.batch.inputs import PARQUET_SUFFIX
from vllm_nvium.batch.journal import Journal, refuse_existing
from vllm_nvium.files import write_atomically

ROWS_PER_GROUP = 4096


def answered(index: int, custom_id: str | None, body: dict[str, Any]) -> dict[str, Any]:
    """The result of a row that has an answer.

    Args:
        body: of vLLM's response.
    """
    response = {"status_code": 200, "request_id": body.get("id"), "body": body}
    return _result(index, custom_id, response, None)


def failed(
    index: int,
    custom_id: str | None,
    message: str,
    status: int = 400,
    kind: str = "BadRequestError",
) -> dict[str, Any]:
    """The result of a row that has none."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    response = {"status_code": status, "request_id": None, "body": body}
    return _result(index, custom_id, response, {"code": kind, "message": message})


def _result(
    index: int, custom_id: str | None, response: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"row-{index}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


def encoded(result: dict[str, Any]) -> bytes:
    """One line of JSON, without the line break."""
    # Lone surrogates, which a body may have out of escaped JSON, are no UTF-8.
    return json.dumps(result, separators=(",", ":")).encode()


def tokens_of(result: dict[str, Any]) -> int:
    """Tokens that were generated for a row."""
    usage = result["response"]["body"].get("usage") or {}
    return usage.get("completion_tokens") or 0


def write_output(journal: Journal, rows: int, output: Path) -> None:
    """Write the results of a complete job in the order of its rows; the file is there as a whole or
    not at all.

    Raises:
        UserError: it cannot be written.
    """
    lines = (journal.result(index) for index in range(rows))
    write = _write_parquet if output.suffix == PARQUET_SUFFIX else _write_lines

    def write_and_sync(path: Path) -> None:
        write(lines, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        # A job that was killed behind this may have put it there, and nobody else.
        if output.exists() and not filecmp.cmp(path, output, shallow=False):
            refuse_existing(output)

    # What a job that was killed here has left.
    stale = re.compile(rf"\.{re.escape(output.name)}\.\d+\.partial")
    for path in filter(lambda path: stale.fullmatch(path.name), output.parent.iterdir()):
        path.unlink(missing_ok=True)
    write_atomically(output, write_and_sync)


def _write_lines(lines: Iterator[bytes], path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(line + b"\n" for line in lines)


def _write_parquet(lines: Iterator[bytes], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    number, text = pa.int64(), pa.string()
    schema = pa.schema(
        {
            "index": number,
            "custom_id": text,
            "status_code": number,
            "text": text,
            "finish_reason": text,
            "prompt_tokens": number,
            "completion_tokens": number,
            "error": text,
            "response": text,
        }
    )
    with parquet.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []
        for index, line in enumerate(lines):
            group.append({"index": index, **_columns(json.loads(line))})
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _columns(result: dict[str, Any]) -> dict[str, Any]:
    """Text and finish reason are those of the first choice; `response` has all."""
    response, error = result["response"], result["error"]
    body = response["body"]
    choice: dict[str, Any] = next(iter(body.get("choices") or ()), {})
    usage = body.get("usage") or {}
    message = choice.get("message") or {}
    return {
        "custom_id": _text(result["custom_id"]),
        "status_code": response["status_code"],
        "text": _text(choice.get("text", message.get("content"))),
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": error and _text(error["message"]),
        "response": json.dumps(body),
    }


def _text(value: str | None) -> str | None:
    """Text with lone surrogates spelt out, which Parquet refuses."""
    return value and value.encode(errors="backslashreplace").decode()
