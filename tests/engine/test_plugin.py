# SPDX-License-Identifier: Apache-2.0
"""The entry point: it never raises, may run twice, can be switched off, and leaves other models
alone whatever it finds."""

import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_nvium import plugin
from vllm_nvium.engine import common_hooks, hooks, patches
from vllm_nvium.engine.hooks import Hook


@pytest.fixture
def restored() -> Iterator[None]:
    """Undo what a test registered instead of the real configuration class. Must stand before
    `monkeypatch` in a test's arguments, so that it runs after that is undone."""
    yield
    plugin.register()


def engine_config(path: Path, **options: object):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), **options).create_engine_config()


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_entry_point_names_register() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [p.value for p in points if p.name == "nvium"] == ["vllm_nvium.plugin:register"]


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_nvium.plugin, vllm_nvium.cli, vllm_nvium.cli.doctor;"
        "print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_registers_and_may_run_twice() -> None:
    plugin.register()
    plugin.register()
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    assert "NviumForCausalLM" in ModelRegistry.get_supported_archs()
    assert "NviumForCausalLM" in MODELS_CONFIG_MAP
    assert type(AutoConfig.for_model("nvium")).__name__ == "NviumConfig"
    for patch in patches.all_patches():
        assert not patch.apply(), f"{patch.method} was applied twice"
    original = getattr(EngineArgs.create_engine_config, "__vllm_nvium_original__")  # noqa: B009
    assert not hasattr(original, "__vllm_nvium_original__")


def test_disable_switch_leaves_vllm_untouched() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.model_executor.models import ModelRegistry as R;"
        "from vllm.model_executor.models.config import MODELS_CONFIG_MAP as M;"
        "from vllm.engine.arg_utils import EngineArgs as E;"
        "print('NviumForCausalLM' in R.get_supported_archs(), 'NviumForCausalLM' in M,"
        " hasattr(E.create_engine_config, '__vllm_nvium_original__'))"
    )
    assert python(code) == "True True True"
    assert python(code, VLLM_NVIUM_DISABLE="1") == "False False False"


COST = """
import sys, time
import vllm.plugins
from vllm.config import VllmConfig
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
import json, resource
before, seconds, megabytes = set(sys.modules), time.process_time(), resident()
vllm.plugins.load_general_plugins()
cost = time.process_time() - seconds, resident() - megabytes
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = [name for name in set(sys.modules) - before if name.startswith("vllm.")]
print(json.dumps([*cost, sorted(heavy), "fastapi" in new]))
"""


def test_being_installed_costs_other_models_next_to_nothing() -> None:
    # Without the plugins that vLLM brings itself.
    runs = [json.loads(python(COST, VLLM_PLUGINS="nvium")) for _ in range(3)]
    assert all(heavy == [] and not web for _, _, heavy, web in runs)
    seconds, megabytes = (statistics.median(run[i] for run in runs) for i in (0, 1))
    assert seconds <= 0.15 and megabytes <= 10, runs


@pytest.mark.parametrize(
    ("statement", "added"),
    [
        ("from transformers import AutoConfig", "AutoConfig.for_model('nvium').model_type"),
        (
            "from vllm.model_executor.models.registry import ModelRegistry",
            "'NviumForCausalLM' in ModelRegistry.get_supported_archs()",
        ),
        (
            "from vllm.model_executor.models.config import MODELS_CONFIG_MAP",
            "'NviumForCausalLM' in MODELS_CONFIG_MAP",
        ),
        (
            "from vllm.engine.arg_utils import EngineArgs",
            "hasattr(EngineArgs.create_engine_config, '__vllm_nvium_original__')",
        ),
    ],
    ids=["transformers", "registry", "checks", "patches"],
)
def test_what_is_added_is_there_as_soon_as_its_module_is(statement: str, added: str) -> None:
    """Whether the plugin was loaded before that module was imported or after."""
    module = statement.split()[1]
    load = "from vllm_nvium import plugin; plugin.register()"
    untouched = f"import sys; loader = sys.modules[{module!r}].__spec__.loader"
    shown = f"print(bool({added}), 'exec_module' in vars(loader))"
    for first, second in ((load, statement), (statement, load)):
        assert python("\n".join([first, second, untouched, shown])) == "True False"


def test_every_patch_is_applied_when_its_module_is_imported() -> None:
    code = (
        "import importlib; from vllm_nvium import plugin; from vllm_nvium.engine import patches;"
        "plugin.register();"
        "rows = patches.all_patches(); [importlib.import_module(row.module) for row in rows];"
        "print(len(rows) > 5, any(row.apply() for row in rows))"
    )
    assert python(code) == "True False"


def test_a_fault_inside_an_import_is_logged_and_not_raised(
    restored, monkeypatch, nvium_log, nvium_checkpoint: Path
) -> None:
    def fail(row: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(plugin, "_add_check", fail)
    importlib.import_module(plugin.CHECKS)
    monkeypatch.delitem(sys.modules, plugin.CHECKS)
    plugin.register()
    assert "did not register" not in nvium_log.text
    importlib.import_module(plugin.CHECKS)
    assert "did not register" in nvium_log.text
    with pytest.raises(ValueError, match="did not register"):
        engine_config(nvium_checkpoint)


def test_never_raises(restored, monkeypatch, nvium_log) -> None:
    def fail() -> list[Hook]:
        raise RuntimeError("surprise")

    monkeypatch.setattr(plugin, "why_not", fail)
    plugin.register()
    assert "did not register" in nvium_log.text
    monkeypatch.setattr(plugin, "_refuse_checkpoints", lambda reason: fail())
    plugin.register()


def test_missing_name_is_logged_and_refuses_nvium_only(
    restored, monkeypatch, nvium_log, nvium_checkpoint: Path, dense_checkpoint: Path
) -> None:
    gone = Hook("vllm.forward_context", "no_such_name", why="a test", breaks="catch-up is lost")
    monkeypatch.setattr(common_hooks, "HOOKS", (*common_hooks.HOOKS, gone))
    # The release that was tested is not searched again.
    plugin.register()
    assert nvium_log.text == ""
    version = "0.32.7+cpu"
    monkeypatch.setattr(hooks, "vllm_version", lambda: version)
    plugin.register()
    assert f"vLLM {version} has no vllm.forward_context:no_such_name" in nvium_log.text
    assert "catch-up is lost" in nvium_log.text
    assert "install 'vllm>=0.32,<0.34'" in nvium_log.text
    with pytest.raises(ValueError, match="lacks vllm.forward_context:no_such_name"):
        engine_config(nvium_checkpoint)
    engine_config(dense_checkpoint)


def test_untested_vllm_refuses_nvium_only(
    restored, monkeypatch, nvium_checkpoint: Path, dense_checkpoint: Path
) -> None:
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.99.1")
    plugin.register()
    with pytest.raises(
        ValueError, match=r"vLLM is 0\.99\.1, but .* tested with >=0\.32,<0\.34 only"
    ):
        engine_config(nvium_checkpoint)
    engine_config(dense_checkpoint)


def test_stock_model_starts_as_without_the_plugin(dense_checkpoint: Path) -> None:
    code = (
        "import json; from vllm.engine.arg_utils import EngineArgs;"
        f"c = EngineArgs(model={str(dense_checkpoint)!r}).create_engine_config();"
        "print(json.dumps([c.parallel_config.worker_cls, c.scheduler_config.async_scheduling,"
        " c.additional_config, c.compute_hash()]))"
    )
    assert json.loads(python(code)) == json.loads(python(code, VLLM_NVIUM_DISABLE="1"))


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.32.0", True),
        ("0.32.7+cpu", True),
        ("0.33.0", True),
        ("0.34.0", False),
        ("0.31.2", False),
        ("0.3.2", False),
        (None, False),
    ],
)
def test_tested_range(version: str | None, tested: bool) -> None:
    assert hooks.is_tested(version) is tested


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.33.0+cu130", True), ("0.32.7", False), ("0.34.0", False), (None, False)],
)
def test_exactly_tested_releases(version: str | None, tested: bool) -> None:
    assert hooks.is_exactly_tested(version) is tested
    assert hooks.is_exactly_tested(hooks.vllm_version()), "add it when the whole suite has passed"


def test_looking_for_names_imports_nothing() -> None:
    """Also where a module would import what it is asked for: `vllm.LLM` is half of vLLM."""
    code = (
        "import sys, vllm; from vllm_nvium.engine import hooks; before = set(sys.modules);"
        "missing, new = hooks.check(), {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(missing, sorted(new & {'vllm', 'torch', 'transformers'}))"
    )
    assert python(code) == "[] []"


@pytest.mark.parametrize(
    "hook", [hook for hook in hooks.all_hooks() if hook.name], ids=lambda hook: hook.path
)
def test_reading_the_source_agrees_with_importing_it(hook: Hook) -> None:
    assert hooks.is_importable(hook) == ""
    assert hooks.is_present(hook)
    source = hooks._source(hook.module)
    assert source is not None
    assert not hooks._defines(source, hook.name + "_gone")


def test_a_method_that_lacks_a_name_is_off_and_the_other_runs(
    restored, monkeypatch, nvium_checkpoint: Path, dense_checkpoint: Path
) -> None:
    def missing(method: str) -> None:
        gone = Hook("vllm.forward_context", "no_such_name", "a test", "nothing", method=method)
        monkeypatch.setattr(hooks, "check", lambda: [gone])
        plugin.register()

    drafter = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    via_sd = {"via_sd": True, "speculative_config": drafter}
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.32.7")
    missing("via_sd")
    assert "nvium" in engine_config(nvium_checkpoint).parallel_config.worker_cls
    with pytest.raises(ValueError, match="--via-sd is given, but VIA-SD is off: .*no_such_name"):
        engine_config(dense_checkpoint, **via_sd)
    missing("nvium")
    with pytest.raises(ValueError, match="^vLLM 0.32.7 lacks vllm.forward_context:no_such_name"):
        engine_config(nvium_checkpoint)
    assert "via_sd" in engine_config(dense_checkpoint, **via_sd).parallel_config.worker_cls


def test_no_row_is_there_twice() -> None:
    """Methods that need the same name have a row each, unless all need it."""
    paths = [(hook.method, hook.path) for hook in hooks.all_hooks()]
    assert len(paths) == len(set(paths))
    common = {path for method, path in paths if not method}
    assert not [each for each in paths if each[0] in ("nvium", "via_sd") and each[1] in common]


def test_names_that_are_imported_or_set_on_instances() -> None:
    source = (
        "from .a import (\n    B,\n    C,\n)\n"
        "class D:\n    f: int\n    def __init__(self):\n        self.g: int = 1\n"
        "        if self.h == 2: ...\n"
    )
    assert all(hooks._defines(source, name) for name in ("B", "C", "D.f", "D.g"))
    assert not any(hooks._defines(source, name) for name in ("A", "D.h", "D.B"))


def test_attribute_of_another_class_is_not_found() -> None:
    source = "class A(\n    B,\n):\n    def f(self): ...\n\nclass C:\n    def g(self): ...\n"
    assert hooks._defines(source, "A.f")
    assert not hooks._defines(source, "A.g")
