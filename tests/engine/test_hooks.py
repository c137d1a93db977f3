# SPDX-License-Identifier: Apache-2.0
"""The hook table is complete: what the code overrides, wraps or reads on vLLM's objects has a row
where it belongs. And the functions behind the rows are those that somebody has read."""

import argparse
import ast
import builtins
import hashlib
import importlib
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from torch.library import CustomOpDef

from vllm_nvium import cli, plugin
from vllm_nvium.engine import common_hooks, hooks, vllm_functions
from vllm_nvium.engine.hooks import Hook
from vllm_nvium.engine.patches import all_patches
from vllm_nvium.version import EXACTLY_TESTED_VLLM, TESTED_VLLM

PACKAGE = Path(plugin.__file__).parent
VLLM = Path(vllm.__file__).parent
TABLES = (
    "engine/request_hooks.py",
    "engine/common_hooks.py",
    "nvium/hooks.py",
    "via_sd/hooks.py",
)

# Attributes of other libraries that nothing imported by name has.
OF_OTHERS = {
    # importlib, ast, functions of functions
    *("submodule_search_locations", "lineno", "end_lineno", "orelse", "asname", "decorator_list"),
    *("__closure__", "__code__", "__defaults__", "__globals__", "__metadata__", "cache_clear"),
    # safetensors, transformers, psutil
    *("get_dtype", "get_shape", "get_slice", "get_interface", "get_seq_length", "available"),
    # pydantic, prometheus_client, torch.compile, unittest.mock, shutil and tempfile
    *("Repr", "json_schema", "validate_python", "validate_strings", "inc", "set", "object"),
    *("disable_guard_check", "get_memory_info", "aten", "_buffers", "training"),
    *("zeros_", "mkdtemp", "rmtree", "disk_usage", "fileno", "pid"),
    # torch's quantised operators
    *("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32"),
    # configurations of models with experts
    *("decoder_sparse_step", "mlp_only_layers", "num_experts_per_tok"),
    # outputs and models of transformers
    *("gradient_checkpointing", "hidden_states", "last_hidden_state", "no_init_weights"),
}
# Rows whose names stand nowhere in this package: vLLM's own callers of what it overrides or reads.
CALLERS = {
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
    "vllm.config.vllm:VllmConfig.try_verify_and_update_config",
    "vllm.compilation.decorators:_try_load_aot_compiled_fn",
}
# Objects that are made and passed on, never imported by name.
OBJECTS: tuple[Any, ...] = (
    builtins, *(v for v in vars(builtins).values() if isinstance(v, type)),
    torch.Tensor, torch.nn.Module, torch.nn.functional, torch.cuda, torch.Generator, torch.device,
    torch.dtype, torch.cpu, torch.compiler, torch.library, CustomOpDef, np.ndarray,
    np.random.Generator, ast.ImportFrom, Path, os.path, argparse.ArgumentParser, hashlib.sha256(),
    io.BytesIO,
)  # fmt: skip


@cache
def sources() -> dict[str, ast.Module]:
    """Every file that engines run, by its path in the package.

    Commands are left out, batch jobs too: they drive an engine from outside, by what vLLM's own
    servers and commands use. What they import has rows of its own, by which no method is turned
    off; `vllm-nvium doctor` lists those that are missing."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        parts = Path(folder).relative_to(PACKAGE).parts
        if {*parts[:1]} & {*hooks.COMMANDS} or "__pycache__" in parts:
            continue
        for name in names:
            path = "/".join((*parts, name))
            if name.endswith(".py") and path not in TABLES:
                found[path] = ast.parse(Path(folder, name).read_text())
    return found


def names_read() -> dict[str, set[str]]:
    """`x.name` anywhere -> the files that have it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found[node.attr].add(path)
    return found


def names_used() -> dict[str, set[str]]:
    """A name in any part of speech -> the files that have it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in sources().items():
        for node in ast.walk(tree):
            name = (
                getattr(node, "attr", None)
                or getattr(node, "id", None)
                or getattr(node, "arg", None)
                or getattr(node, "name", None)
                or getattr(node, "value", None)
            )
            if isinstance(name, str):
                found[name].add(path)
    return found


def own_names() -> set[str]:
    """What this package defines, and so may read of its own objects."""
    found = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def names_of_others() -> set[str]:
    """Attributes of what is imported from elsewhere than vLLM."""
    found = set(OF_OTHERS).union(*(dir(thing) for thing in OBJECTS))
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if not f"{alias.name}.".startswith(("vllm.", "vllm_nvium.")):
                        found.update(dir(importlib.import_module(alias.name)))
            elif isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith(
                ("vllm.", "vllm_nvium.")
            ):
                module = importlib.import_module(str(node.module))
                found.update(*(dir(getattr(module, alias.name, None)) for alias in node.names))
    return found


def last(hook: Hook) -> str:
    return hook.name.rpartition(".")[2]


def written_down() -> list[Hook]:
    """Rows of the tables, without the names that the code imports."""
    imported = set(hooks.imported())
    return [hook for hook in hooks.all_hooks() if hook not in imported]


def test_every_attribute_of_vllm_is_in_the_table() -> None:
    """What is read and neither defined here nor another library's can only be vLLM's. A name that
    both have goes unnoticed here."""
    rows = {last(hook) for hook in hooks.all_hooks()}
    explained = rows | own_names() | names_of_others()
    read = names_read()
    assert {"kv_cache_spec", "execute_model_state"} <= set(read) - own_names() - names_of_others()
    assert sorted((name, sorted(read[name])) for name in set(read) - explained) == []


def test_rows_stand_with_those_who_need_them() -> None:
    """Where a name is missing, only the methods that need it are off."""
    used = names_used()
    for hook in common_hooks.HOOKS:
        users = sorted(used[last(hook)])
        assert users, f"{hook.path}: nothing here uses it"
        assert hooks._method_of(users) == "", f"{hook.path} belongs to one method: {users}"
    for hook in written_down():
        users = sorted(used[last(hook)])
        assert bool(users) != (hook.path in CALLERS), f"{hook.path}: {users}"
        owners = {hooks._method_of([user]) for user in users}
        assert not users or not hook.method or hook.method in owners, f"{hook.path}: {users}"


def test_this_vllm_has_every_row() -> None:
    """Those of commands too, which no start looks for."""
    assert [hook.path for hook in hooks.all_hooks() if not hooks.is_present(hook)] == []


def test_what_only_commands_import_turns_no_method_off() -> None:
    rows = {hook.path: hook for hook in hooks.imported()}
    only_batch = "vllm.entrypoints.launchers.api_server.app_state:init_app_state"
    assert rows[only_batch].method == "commands"
    assert rows["vllm.config:VllmConfig"].method != "commands"
    users = {path.partition("/")[0] for path in sources()}
    assert not users & set(hooks.COMMANDS) and {"engine", "nvium", "via_sd"} <= users


def overridden() -> Iterator[tuple[str, str]]:
    """What classes of this package override of vLLM's classes: module, `Class.name`."""
    for path in sources():
        module = importlib.import_module(f"vllm_nvium.{path[:-3].replace('/', '.')}")
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                yield from overridden_by(cls)


def overridden_by(cls: type) -> Iterator[tuple[str, str]]:
    own = [base for base in cls.__mro__ if base.__module__.startswith("vllm_nvium.")]
    others = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
    names = {name for base in own for name in vars(base) if not name.startswith("__")}
    for name in names - {"_abc_impl"}:
        for base in others:
            if name in vars(base):
                yield base.__module__, f"{base.__name__}.{name}"
                break


def test_every_override_is_in_the_table() -> None:
    rows = {(hook.module, hook.name) for hook in hooks.all_hooks()}
    found = set(overridden())
    assert ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._update_states") in found
    assert sorted(found - rows) == []


def test_everything_that_is_wrapped_is_in_the_table() -> None:
    rows = {hook.path for hook in hooks.all_hooks()}
    # A dataclass has its constructor from its fields: the row is the class.
    wrapped = {
        f"{p.module}:{p.class_name}" + ("" if p.method == "__init__" else f".{p.method}")
        for p in all_patches()
    }
    classes = {path.rpartition(".")[0] for path in rows if path.rpartition(":")[2].count(".")}
    assert sorted(wrapped - rows - classes) == []
    replaced = {
        # The name as text, or `name.__name__`.
        ast.unparse(node.args[1]).removesuffix(".__name__").strip("'")
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "patch.object"
    }
    assert {"CPUModelRunner", "build_logitsprocs"} <= replaced
    assert sorted(replaced - {last(hook) for hook in written_down()}) == []


def test_rows_count_from_the_version_that_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, since: str = "0.32", until: str = "") -> Hook:
        return Hook("vllm.forward_context", name, "a test", "nothing", since=since, until=until)

    added = (row("newer", since="0.33"), row("older", until="0.33"), row("both"))
    monkeypatch.setattr(common_hooks, "HOOKS", (*common_hooks.HOOKS, *added))
    for version, expected in (
        ("0.32.7+cpu", {"older", "both"}),
        ("0.33.0", {"newer", "both"}),
        ("0.40.1", {"newer", "both"}),
        (None, {"newer", "older", "both"}),
    ):
        monkeypatch.setattr(hooks, "vllm_version", lambda version=version: version)
        names = {"newer", "older", "both"}
        assert {hook.name for hook in hooks.all_hooks() if hook.name in names} == expected
        assert {hook.name for hook in hooks.check() if hook.name in names} == expected


# ------------------------------------------------------------------------- functions behind rows


def test_functions_behind_the_rows_were_read() -> None:
    """In every release that counts as tested. After a change of the table or of the releases:
    `make record-vllm`, once somebody has read what changed (docs/updating-vllm.md)."""
    records = vllm_functions.recorded()
    assert list(records) == [".".join(map(str, minor)) for minor in TESTED_VLLM]
    version = str(hooks.vllm_version()).partition("+")[0]
    assert version in EXACTLY_TESTED_VLLM
    found = vllm_functions.hashes(VLLM, hooks.all_hooks())
    minor = version.rpartition(".")[0]
    changed = vllm_functions.changes(hooks.all_hooks(), records[minor], found)
    assert [(change.kind, change.hook.path) for change in changed] == []
    assert set(records[minor]) == set(found)


VLLM_TEXT = '''
from .other import moved

@cached
def f(x):
    """Says something."""
    # So it goes.
    return x


class C:
    """A class."""
    a: int
    b: int = 1  # with a remark

    def m(self):
        return 1


class D(C):
    def __init__(self):
        self.y = 1
'''


def test_what_is_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "part"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(VLLM_TEXT)
    (folder / "other.py").write_text("async def moved():\n    pass\n")
    expected = {
        "f": "@cached\ndef f(x):\n    return x",
        "moved": "async def moved():\n    pass",
        "C": "    a: int\n    b: int = 1  # with a remark",
        "C.m": "    def m(self):\n        return 1",
        "C.a": "",
        "D": "    def __init__(self):\n        self.y = 1",
        "gone": "",
    }
    for name, text in expected.items():
        assert vllm_functions.function_text(tmp_path / "vllm", "vllm.part", name) == text
    assert vllm_functions.function_text(tmp_path / "vllm", "vllm.no_such", "f") == ""


def test_the_command_says_what_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = "vllm.v1.core.sched.scheduler:Scheduler.make_stats"
    records = {"0.1": vllm_functions.hashes(VLLM, hooks.all_hooks())}
    monkeypatch.setattr(vllm_functions, "recorded", lambda: records)
    assert cli.main(["doctor", "--vllm-changes"]) == 0
    assert "Nothing changed" in capsys.readouterr().out
    records["0.1"][wanted] = "another"
    old = tmp_path / "vllm" / "v1" / "core" / "sched"
    old.mkdir(parents=True)
    (old / "scheduler.py").write_text("class Scheduler:\n    def make_stats(self):\n        old\n")
    assert cli.main(["doctor", "--vllm-changes", "--old-vllm", str(tmp_path / "vllm")]) == 1
    shown = capsys.readouterr().out
    assert f"changed  {wanted}" in shown and "\n-        old" in shown
    assert cli.main(["doctor", "--vllm-changes", "--old-vllm", str(tmp_path / "nothing")]) == 2
    assert "--old-vllm is" in capsys.readouterr().err
