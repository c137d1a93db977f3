# SPDX-License-Identifier: Apache-2.0
"""What is installed from a checkout by wheel, sdist, editable install and archive: every module and
data file, inside `vllm_nvium` only. No network, and no new environment: packages go to folders, and
Python is told of these folders only."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "model_executor", "vllm_nvium")
MODULE = Path("vllm_nvium/model_executor/ops/ragged.py")
# Where numpy is, which that module imports. A path given like this has no .pth files processed, so
# that a vllm_nvium which is installed there as editable is not seen.
DEPENDENCIES = Path(numpy.__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree's own files, as a clone would have them. Builds write beside the source."""
    path = tmp_path_factory.mktemp("packaging") / "checkout"
    path.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                path / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
            )
        else:
            shutil.copy(ROOT / name, path / name)
    for weights in path.glob("vllm_nvium/trained_exits/*/*.safetensors"):
        weights.write_bytes(b"compressing the real ones takes seconds and shows no more")
    return path


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    if path is not None:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{DEPENDENCIES}"
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def build(what: str, source: Path, out: Path) -> Path:
    """Calls a hook of the build backend (`wheel`, `sdist`, `editable`) as pip and `build` do."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import setuptools.build_meta as backend; print(backend.build_{what}({str(out)!r}))"
    done = python("-c", code, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build("wheel", checkout, checkout.with_name("wheel"))


def contents(wheel: Path) -> dict[str, str]:
    """Names and hashes of a wheel's files, but not of the list of them, which is in no order."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("/RECORD")
        }


def found(cwd: Path, path: Path | None = None, *, site: bool = False) -> dict[str, str | None]:
    """Where a process finds the module, and where a top-level `model_executor`.

    Args:
        path: what is first on its path, after the working directory.
        site: whether .pth files in `path` are processed, as in an installation.
    """
    code = "import importlib.util, json, os, sys\n"
    if site:
        code += f"import site; site.addsitedir({str(path)!r})\n"
    code += (
        "from vllm_nvium.model_executor.ops import ragged\n"
        "import vllm_nvium\n"
        "top = importlib.util.find_spec('model_executor')\n"
        "print(json.dumps({'version': vllm_nvium.__version__, 'module': ragged.__file__,"
        " 'top': top and top.origin}))"
    )
    done = python("-S", "-c", code, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules_of(source: Path) -> set[str]:
    """Every Python file of the two folders, by the name that it has when it is installed."""
    own = {
        str(file.relative_to(source))
        for file in (source / "vllm_nvium").rglob("*.py")
        if "model_executor" not in file.parts[len(source.parts) :]
    }
    shared = {
        str("vllm_nvium" / file.relative_to(source))
        for file in (source / "model_executor").rglob("*.py")
    }
    assert len(own) > 50 and len(shared) > 20
    return own | shared


def test_wheel_holds_everything(checkout: Path, wheel: Path) -> None:
    names = set(contents(wheel))
    assert modules_of(checkout) == {name for name in names if name.endswith(".py")}
    assert "vllm_nvium/py.typed" in names
    exits = checkout / "vllm_nvium/trained_exits"
    data = {str(file.relative_to(checkout)) for file in exits.rglob("*") if file.is_file()}
    assert any(name.endswith("exits.safetensors") for name in data) and data <= names
    # vLLM has a package called model_executor, and so may others.
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_nvium"}


def test_wheel_is_registered_with_vllm_and_has_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        text = archive.read(name).decode()
    assert "[vllm.general_plugins]\nnvium = vllm_nvium.plugin:register" in text
    assert "vllm-nvium = vllm_nvium.cli:main" in text


def test_wheel_is_imported_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = python(*PIP, "install", *OFFLINE, "--target", str(target), str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = found(tmp_path, target)
    assert where["module"] == str(target / MODULE) and where["top"] is None
    assert not (target / MODULE).parents[1].is_symlink()


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", checkout, tmp_path)
    with tarfile.open(sdist) as archive:
        # Files, not a link to a folder that is not in the archive.
        assert not [member.name for member in archive if member.issym() or member.islnk()]
    shutil.unpack_archive(sdist, tmp_path)
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_editable_install_leads_into_the_checkout(checkout: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with zipfile.ZipFile(build("editable", checkout, tmp_path)) as archive:
        archive.extractall(target)
    where = found(tmp_path, target, site=True)
    assert where["module"] == str(checkout / MODULE) and where["top"] is None


def test_started_in_the_checkout_it_is_the_checkout(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    # Python finds a second `model_executor` there, which nothing of this package imports.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    where = found(checkout, tmp_path)
    assert where["module"] == str(checkout / MODULE)
    assert not [
        name
        for name in modules_of(checkout)
        if "from model_executor" in (text := (checkout / name).read_text(encoding="utf-8"))
        or "import model_executor" in text
    ]


def test_pip_installs_an_archive_of_git(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    source, target = tmp_path / "source", tmp_path / "target"
    archive = tmp_path / "source.tar"
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, source)
    done = python(*PIP, "install", *OFFLINE, "--target", str(target), str(source), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = found(tmp_path, target)
    assert where["module"] == str(target / MODULE) and where["top"] is None
    installed = {str(file.relative_to(target)) for file in target.rglob("*.py")}
    assert installed == modules_of(source)


def test_an_archive_unpacked_without_links_is_refused(checkout: Path, tmp_path: Path) -> None:
    """pip unpacks .zip archives so. Without the refusal it would install a package without
    model_executor, and say nothing."""
    source = tmp_path / "source"
    shutil.copytree(checkout, source, symlinks=True)
    (source / "vllm_nvium/model_executor").unlink()
    (source / "vllm_nvium/model_executor").write_text("../model_executor")
    done = python(*PIP, "wheel", *OFFLINE, "-w", str(tmp_path), str(source), cwd=tmp_path)
    assert done.returncode != 0
    assert "unpacked without symbolic links; install from a .tar.gz" in done.stdout + done.stderr
