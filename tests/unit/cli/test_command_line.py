# SPDX-License-Identifier: Apache-2.0
"""The `vllm-nvium` command before any sub-command runs, and how their refusals are answered."""

import argparse
import contextlib
import subprocess
import sys

import pytest

from vllm_nvium import cli
from vllm_nvium.cli import setup_cpu
from vllm_nvium.errors import UserError


def test_help_knows_the_commands_without_loading_torch() -> None:
    code = """
import contextlib, sys
from vllm_nvium import cli
text = cli.build_parser().format_help()
assert all(name in text for name in cli.COMMANDS), text
for name in ("doctor", "demo", "setup-cpu", "convert", "eval"):
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
assert not {"torch", "transformers", "vllm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_screen(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = []
    for flag in ("--help", "--help-all"):
        with contextlib.suppress(SystemExit):  # a few options: --help-all is refused
            cli.main([name, flag])
        shown.append(capsys.readouterr().out)
    assert len(shown[0].splitlines()) <= 24
    if shown[1]:
        assert "--help-all" in shown[0]
        assert len(shown[1].splitlines()) > len(shown[0].splitlines())


@pytest.mark.parametrize("words", [[], ["evaluate"], ["--", "--json"]])
def test_an_unknown_command_stops_the_parser(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("vllm-nvium ")


def test_refusals_are_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: argparse.Namespace) -> None:
        raise UserError("--check is on, and a test refuses it.")

    monkeypatch.setattr(setup_cpu, "run", refuse)
    assert cli.main(["setup-cpu", "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "vllm-nvium setup-cpu: error: --check is on, and a test refuses it.\n"
    assert not captured.out
