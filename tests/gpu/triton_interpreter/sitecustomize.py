# SPDX-License-Identifier: Apache-2.0
"""Lets Model Runner V2 run without a GPU, its Triton kernels interpreted. For tests only.

vLLM's CPU build uses Triton only where Triton lists a "cpu" backend, which the stock wheel does
not, so a stand-in is registered here. Python imports a module of this name at start from the
folders of PYTHONPATH: that reaches the processes vLLM spawns too, before they import vLLM. The
stand-in compiles nothing; with TRITON_INTERPRET=1 kernels are Python functions on NumPy arrays.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_hidden_sitecustomize() -> None:
    """Run the next `sitecustomize` on the path, which this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def install() -> None:
    """Register the stand-in with Triton. Calling it again changes nothing."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        """Says that it is active; interpreted kernels ask a driver nothing else."""

        @classmethod
        def is_active(cls) -> bool:
            return True

    backends.setdefault("cpu", Backend(BaseBackend, InterpreterDriver))


_run_hidden_sitecustomize()
if os.environ.get("TRITON_INTERPRET") == "1":
    install()
