# SPDX-License-Identifier: Apache-2.0
"""Documents name what is there: links lead somewhere, and files that they name exist."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("vllm_nvium/trained_exits/*/README.md")),
]
# Where a path that a document names may begin.
STARTS = [ROOT, ROOT / "vllm_nvium", ROOT / "model_executor"]
# What looks like the name of a file of this repository. Other files belong to users or to vLLM.
FILE = re.compile(r"[\w./-]*[\w-]+\.(?:py|sh|svg)")
FOLDER = re.compile(r"(?:vllm_nvium|model_executor|tests|benchmarks|docs|examples|engine)/[\w./-]*")


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@cache
def file_names() -> frozenset[str]:
    folders = ("vllm_nvium", "model_executor", "tests", "benchmarks", "examples", "docs")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.*"))
    return frozenset(file.name for file in files)


@cache
def source() -> str:
    folders = ("vllm_nvium", "model_executor", "tests", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def is_there(name: str) -> bool:
    if "/" not in name:
        return name in file_names() or (ROOT / name).exists()
    return any((start / name).exists() for start in STARTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    # Only what is set as code and is one word; commands are checked by running them.
    words = {word for word in re.findall(r"`([^`\n]+)`", text) if " " not in word}
    named = {word for word in words if FILE.fullmatch(word) or FOLDER.fullmatch(word)}
    missing = sorted(name for name in named if not is_there(name))
    assert not missing


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_names_of_the_code_exist(name: str) -> None:
    words = re.findall(
        r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`", (ROOT / name).read_text(encoding="utf-8")
    )
    named = {word.rpartition(".")[2] for word in words if not FILE.fullmatch(word)}
    assert len(named) > 30
    missing = sorted(word for word in named if not re.search(rf"\b{word}\b", source()))
    assert not missing
