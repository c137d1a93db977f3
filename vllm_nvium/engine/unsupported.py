# SPDX-License-Identifier: Apache-2.0
"""What a start is refused for, as rows of a table: N-vium and VIA-SD each have one. Nothing of vLLM
is imported at module level, because the tables are read where vLLM's parser is built."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Unsupported:
    """An option that cannot be run with. `value` returns what was set, or None when the option is
    off; the sentence reads "FLAG is VALUE, but WHY; REMEDY."."""

    flag: str
    value: Callable[["VllmConfig"], Any]
    why: str
    remedy: str


def first_set(rows: Iterable[Unsupported], config: Any) -> tuple[Unsupported, Any] | None:
    """The first option of a table that is on, and its value.

    Args:
        config: a VllmConfig, or what has the same parts.
    """
    for row in rows:
        value = row.value(config)
        if value is not None and value is not False:
            return row, value
    return None


def above_one(value: int) -> int | None:
    """The value of a count that must be 1, when it is not."""
    return value if value > 1 else None


def pooling_runner(config: "VllmConfig") -> str | None:
    """The runner of models that generate nothing, when it is that one."""
    return "pooling" if config.model_config.runner_type == "pooling" else None


def rust_frontend(_: "VllmConfig") -> str | None:
    """The environment's switch of vLLM's Rust front end, when it is on."""
    import vllm.envs as envs

    return "1" if envs.VLLM_USE_RUST_FRONTEND else None


def watermark(config: Any) -> str | None:
    """The algorithm of a watermark, where one was asked for: its key is a secret."""
    given = config.watermark_config
    if given is None:
        return None
    name = given.get("algorithm") if isinstance(given, dict) else getattr(given, "algorithm", None)
    return str(name or "on")
