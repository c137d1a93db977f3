# SPDX-License-Identifier: Apache-2.0
"""The functions of vLLM behind the hook table, as they were when somebody last read them: a hash of
each, per tested minor of vLLM. A name that is still there may do something else; this shows where
to look. Files are read as text, so any vLLM can be looked at, installed or not."""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_nvium.engine.hooks import Hook

RECORDS = Path(__file__).with_name("vllm_functions.json")
# A name that is imported from where it is imported from somewhere else, and so on.
MOST_HOPS = 5


@dataclass(frozen=True)
class Change:
    """A row whose function is not what was recorded; `now` and `then` are hashes, or empty where
    there is no such function."""

    hook: Hook
    then: str
    now: str

    @property
    def kind(self) -> str:
        if not self.now:
            return "gone"
        return "changed" if self.then else "new"


def recorded() -> dict[str, dict[str, str]]:
    """Minor of vLLM, like "0.33" -> path of a row -> hash of the function behind it."""
    records: dict[str, dict[str, str]] = json.loads(RECORDS.read_text(encoding="utf-8"))
    return records


def hashes(root: Path, hooks: Iterable[Hook]) -> dict[str, str]:
    """Of every row with a function behind it.

    Args:
        root: the folder of a package `vllm`.
    """
    texts = {hook.path: function_text(root, hook.module, hook.name) for hook in hooks}
    return {
        path: hashlib.sha256(text.encode()).hexdigest()[:16]
        for path, text in sorted(texts.items())
        if text
    }


def changes(hooks: Iterable[Hook], then: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Rows whose functions differ, by path."""
    rows = {hook.path: hook for hook in hooks}
    return [
        Change(rows[path], then.get(path, ""), now.get(path, ""))
        for path in sorted(rows)
        if then.get(path, "") != now.get(path, "")
    ]


def function_text(root: Path, module: str, name: str) -> str:
    """Source of a function, or of how a class is made: its `__init__`, or the fields of a
    dataclass. Without comments on lines of their own, docstrings and empty lines; empty for what is
    neither, such as an attribute that instances get.

    Args:
        root: the folder of a package `vllm`.
        name: dotted, on the class that defines it.
    """
    for _ in range(MOST_HOPS):
        path = _file(root, module)
        if path is None:
            return ""
        source, tree = _parsed(path)
        first, _, rest = name.partition(".")
        statement = _defined(tree.body, first)
        if statement is None:
            origin = _imported_from(tree, module, first, is_package=path.name == "__init__.py")
            if origin is None:
                return ""
            module, name = origin, name
            continue
        if rest:
            statement = _defined(getattr(statement, "body", []), rest)
        return "\n".join(
            line for node in _that_count(statement) for line in _lines(source, node) if line
        )
    return ""


def _file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _parsed(path: Path) -> tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    return source, ast.parse(source)


def _defined(body: Iterable[ast.stmt], name: str) -> ast.stmt | None:
    """The function or class of this name; the last, as overloads and branches come before it."""
    found: ast.stmt | None = None
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                found = node
        elif isinstance(node, ast.If | ast.Try):
            found = _defined([*node.body, *node.orelse], name) or found
    return found


def _imported_from(tree: ast.Module, module: str, name: str, *, is_package: bool) -> str | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in node.names
        ):
            if not node.level:
                return node.module
            parts = module.split(".") if is_package else module.split(".")[:-1]
            parts = parts[: len(parts) - node.level + 1]
            return ".".join([*parts, *([node.module] if node.module else [])])
    return None


def _that_count(node: ast.stmt | None) -> list[ast.stmt]:
    if not isinstance(node, ast.ClassDef):
        return [node] if node is not None else []
    made = _defined(node.body, "__init__")
    return [made] if made else [field for field in node.body if isinstance(field, ast.AnnAssign)]


def _lines(source: str, node: ast.stmt) -> list[str]:
    lines = source.splitlines()
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    left_out: set[int] = set()
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                left_out.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    return [
        lines[number - 1].rstrip()
        for number in range(first, (node.end_lineno or first) + 1)
        if number not in left_out and not lines[number - 1].lstrip().startswith("#")
    ]
