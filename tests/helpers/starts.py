# SPDX-License-Identifier: Apache-2.0
"""What a start makes of options, without an engine: the configuration, or the sentence that refuses
them."""

from pathlib import Path
from typing import Any

import pytest


def start(path: Path, **options: Any) -> Any:
    """The configuration of an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), **options).create_engine_config()


def refusal(path: Path, **options: Any) -> str:
    """The one sentence that a start is refused with."""
    with pytest.raises(ValueError) as error:
        start(path, **options)
    message = str(error.value)
    # Not pydantic's stack of lines, which is a ValueError too.
    assert "\n" not in message and "validation error" not in message, message
    assert message.endswith("."), message
    assert "1234567" not in message, "a secret"
    return message


def from_command_line(parser: Any, model: Path, *arguments: str) -> Any:
    """The engine arguments of `vllm serve`."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *arguments]))


def additional_config_of(arguments: Any) -> Any:
    """What an API server makes of the arguments that another process has parsed."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(arguments).additional_config
