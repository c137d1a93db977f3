# SPDX-License-Identifier: Apache-2.0
"""Run something as soon as a module has been imported, whoever imports it. This package is loaded
in every process of vLLM, whatever model that serves, and must not import vLLM's heavy modules only
to add a name to them."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], object]


def after_import(module: str, action: Action) -> None:
    """Call `action` now where `module` was imported before, and otherwise right after its body has
    run, before whoever imports it sees it. Actions of one module run in the order they came in.

    An action must not raise: inside an import it would look like a fault of the module.
    """
    if module in sys.modules:
        action()
        return
    _FINDER.waiting.setdefault(module, []).append(action)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    """Finds nothing itself: it asks the other finders, and has the loader that they found call
    back.

    Attributes:
        waiting: actions by the module that they wait for.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}
        self._asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, lambda: self._run(name))
        return spec

    def _run(self, name: str) -> None:
        for action in self.waiting.pop(name, []):
            action()
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def _call_after(loader: Any, action: Action) -> None:
    """Let `loader` call `action` once, after it has run its module's body. Each module has a loader
    of its own, so what is set here is gone with the call and others see vLLM's own loader."""
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        original(module)
        action()

    loader.exec_module = exec_module


_FINDER = _Finder()
