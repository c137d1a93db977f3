# SPDX-License-Identifier: Apache-2.0
"""The runs of the demo, and the process that each of them has of its own: so that no run shares
memory or threads with another, and libraries can be preloaded. What it prints goes to a log."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vllm_nvium.cli.demo.checkpoint import Models
from vllm_nvium.console import complain
from vllm_nvium.errors import UserError
from vllm_nvium.via_sd.refusals import ARCHITECTURES

# Of N-vium where nothing is said: sampled, so that tokens leave early, and still text to read.
WARM = 0.5
# Lines of a failed engine's log that are shown.
TAIL = 40


@dataclass(frozen=True)
class Run:
    """One engine of the demo.

    Attributes:
        kind: plain, nvium or via_sd; title: for people; name: the same for the table.
        model: folder or hub id.
    """

    kind: str
    title: str
    name: str
    model: str
    temperature: float
    additional_config: dict[str, Any] = field(default_factory=dict)


def runs_of(models: Models, temperature: float | None, sampling: str | None) -> list[Run]:
    """The runs that apply: a checkpoint that was N-vium from the start has no dense parent, and
    VIA-SD does not take every model.

    Args:
        temperature: of all runs; None for `WARM` as N-vium and else 0.
    """
    cold = 0.0 if temperature is None else temperature
    warm = WARM if temperature is None else temperature
    nvium = Run(
        "nvium",
        f"N-vium, {_words(warm)}: tokens leave the network early",
        f"N-vium, {_words(warm)}",
        str(models.nvium),
        warm,
        {"nvium_sampling": sampling} if sampling else {},
    )
    if models.dense is None:
        return [nvium]
    plain = Run(
        "plain",
        f"Plain vLLM, {_words(cold)}",
        f"plain, {_words(cold)}",
        models.dense,
        cold,
    )
    if models.architecture not in ARCHITECTURES:
        return [plain, nvium]
    via_sd = Run(
        "via_sd",
        f"--via-sd, {_words(cold)}: the whole model checks what cheaper ones drafted",
        f"--via-sd, {_words(cold)}",
        models.dense,
        cold,
        {"via_sd": True},
    )
    return [plain, nvium, via_sd]


def _words(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def answers_of(
    request: dict[str, Any], environment: dict[str, str], *, verbose: bool
) -> Iterator[dict[str, Any]]:
    """Start an engine and yield its events as they come; see `engine.main`.

    Raises:
        UserError: it failed; the end of its log is on standard error then.
    """
    environment = dict(environment)
    if not verbose:
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Whose word a token was is told inside the engine's process.
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "vllm_nvium.cli.demo.engine", str(writing)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        os.fdopen(reading) as events,
        subprocess.Popen(
            [*command, json.dumps(request)],
            env=environment,
            pass_fds=[writing],
            stdout=None if verbose else log,
            stderr=None if verbose else subprocess.STDOUT,
        ) as process,
    ):
        os.close(writing)
        try:
            for line in events:
                yield json.loads(line)
        except BaseException:
            process.terminate()
            raise
        code = process.wait()
        _show_errors(log, everything=code != 0)
    if code:
        raise UserError(
            f"the engine of {Path(request['model']).name} ({request['kind']}) ended with status "
            f"{code}; what it said stands above, and --verbose shows all of it."
        )


def _show_errors(log: IO[str], *, everything: bool) -> None:
    """The end of the log of an engine that failed, and of another the lines that are errors."""
    log.seek(0)
    lines = log.read().splitlines()
    for line in lines[-TAIL:] if everything else [each for each in lines if "ERROR" in each]:
        complain(line)
