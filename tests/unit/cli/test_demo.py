# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, from numbers: colours, marks, the table, and a line of curl."""

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import make_dense
from vllm_nvium.cli.demo import checkpoint
from vllm_nvium.cli.demo.checkpoint import Models
from vllm_nvium.cli.demo.engine import pieces
from vllm_nvium.cli.demo.report import (
    TIERS,
    Answer,
    Result,
    exits_of,
    painted,
    same_text,
    shows_colours,
    summary,
)
from vllm_nvium.cli.demo.runs import runs_of
from vllm_nvium.cli.demo.server import HOST, check_port, curl_line, serve
from vllm_nvium.errors import UserError
from vllm_nvium.via_sd.session import DRAFTER, FULL, SLIM

MODELS = Models("m", Path("nvium"), "dense", "LlamaForCausalLM")


def answer(sources: list[int], ids: list[int] | None = None, passes: int = 0) -> Answer:
    words = [f" w{place}" for place in range(len(sources))]
    return Answer("p", words, ids or list(range(len(sources))), sources, 2.0, passes)


def test_marks_and_colours_tell_sources() -> None:
    exits = exits_of([4, 6], 8)
    said = answer([0, 0, 2, 1])
    assert painted(said, exits, False) == "[1: w0 w1] w2[2: w3]"
    assert painted(said, exits, True) == ("\x1b[32m w0 w1\x1b[0m w2\x1b[36m w3\x1b[0m")
    assert painted(said, [], True) == " w0 w1 w2 w3"


def test_tiers_are_those_of_the_session() -> None:
    marks = {DRAFTER: "d", SLIM: "s", FULL: ""}
    assert [source.mark for source in TIERS] == [marks[place] for place in range(3)]


def test_colours_end_with_the_line() -> None:
    said = Answer("p", ["a\n", "\nb"], [1, 2], [0, 0], 1.0, 0)
    assert painted(said, TIERS, True) == "\x1b[32ma\x1b[0m\n\n\x1b[32mb\x1b[0m"


@pytest.mark.parametrize(
    ("environment", "is_terminal", "coloured"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({}, False, False),
    ],
)
def test_colours_are_for_terminals(
    environment: dict[str, str], is_terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert shows_colours(environment) is coloured


def test_the_table() -> None:
    plain, nvium, via_sd = (Result(run) for run in runs_of(MODELS, None, None))
    plain.start(8, [])
    nvium.start(8, [4])
    via_sd.start(8, [])
    plain.answers = [Answer("p", ["a"] * 4, [1, 2, 3, 4], [], 2.0, 4)]
    nvium.answers = [Answer("p", ["a"] * 4, [1, 2, 5, 6], [0, 0, 0, 1], 1.0, 1)]
    via_sd.answers = [Answer("p", ["a"] * 4, [1, 2, 3, 4], [2, 0, 1, 2], 4.0, 2)]
    assert summary([plain, nvium, via_sd])[1:] == [
        ("plain, greedy", "2.0", "1.00x", "100 %", "1.00", "-"),
        ("N-vium, temperature 0.5", "4.0", "2.00x", "62 %", "0.25", "-"),
        ("--via-sd, greedy", "1.0", "0.50x", "-", "0.50", "yes"),
    ]
    assert nvium.shares() == "4 tokens in 1.0 s: 75 % exit 1, 25 % final head."
    assert "exit 1 (after 4 of 8 layers)" in nvium.legend(False)[0]
    assert plain.legend(False) == []
    assert summary([nvium])[1][2] == "-"


def test_the_first_difference_is_named() -> None:
    plain = [answer([2, 2, 2]), answer([2, 2], [1, 2])]
    assert same_text(plain, plain) == "yes"
    assert same_text(plain, [plain[0], answer([2, 2], [1, 3])]) == "no (prompt 2, token 2)"
    assert same_text(plain, [plain[0], answer([2], [1])]) == "no (prompt 2, token 2)"


def test_runs_that_apply() -> None:
    assert [run.kind for run in runs_of(MODELS, None, None)] == ["plain", "nvium", "via_sd"]
    assert [run.temperature for run in runs_of(MODELS, None, None)] == [0.0, 0.5, 0.0]
    assert [run.temperature for run in runs_of(MODELS, 0.5, None)] == [0.5] * 3
    (alone,) = runs_of(Models("m", Path("nvium"), None), None, "mixture")
    assert alone.additional_config == {"nvium_sampling": "mixture"}


def test_experts_run_without_via_sd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checkpoint.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "convert", lambda *_: [])
    make_dense(tmp_path / "model", "qwen3_moe")
    models = checkpoint.prepare(str(tmp_path / "model"))
    assert models.architecture == "Qwen3MoeForCausalLM"
    assert [run.kind for run in runs_of(models, None, None)] == ["plain", "nvium"]


def test_a_model_that_changed_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checkpoint.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "convert", lambda *_: [])
    model = tmp_path / "model"
    make_dense(model)
    first = checkpoint.prepare(str(model)).nvium
    (model / "log").write_text("no part of the model")
    assert checkpoint.prepare(str(model)).nvium == first
    os.utime(model / "model.safetensors", (0, 0))  # written again: as large, and other numbers
    second = checkpoint.prepare(str(model)).nvium
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert len({first, second, checkpoint.prepare(str(model)).nvium}) == 3


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    parts = [b"a", b"\xc3", b"\xa9", b"b\xc3"]

    def decode(ids: list[int]) -> str:
        return b"".join(parts[i] for i in ids).decode(errors="replace")

    assert pieces(decode, [0, 1, 2, 3]) == ["a", "", "\xe9", "b\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_request_to_try(is_chat: bool, tmp_path: Path) -> None:
    if is_chat:
        (tmp_path / "chat_template.jinja").write_text("x")
    words = shlex.split(curl_line(tmp_path, 9000))
    path = "chat/completions" if is_chat else "completions"
    assert words[0] == "curl" and f"http://127.0.0.1:9000/v1/{path}" in words
    body = json.loads(words[words.index("-d") + 1])
    assert ("messages" in body) is is_chat and ("prompt" in body) is not is_chat


def test_an_empty_template_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert "/v1/completions" in curl_line(tmp_path, 9000)


def test_the_port_of_another_program_is_refused() -> None:
    """Its answers would be taken for those of the server that is being started."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port is {port}"):
            check_port(port)
    check_port(port)
    with pytest.raises(UserError, match="--port is 65536, and it must be at most"):
        check_port(65536)


def test_the_process_becomes_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: Any = {"port": 9000, "eager": True, "sampling": "mixture", "max_model_len": None}
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="vLLM is not installed"):
        serve(tmp_path, **given)
    (tmp_path / "vllm").write_text("")
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *process: became.extend(process))
    serve(tmp_path, **given)
    path, command, environment = became
    assert path == command[0] == str(tmp_path / "vllm") and environment["PATH"]
    assert command[1:5] == ["serve", str(tmp_path), "--port", "9000"]
    assert command[-3:] == ["--enforce-eager", "--nvium-sampling", "mixture"]
    assert "curl -s http://127.0.0.1:9000" in capsys.readouterr().out
