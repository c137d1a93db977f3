# SPDX-License-Identifier: Apache-2.0
"""Making N-vium checkpoints by training: loss, controller, data, retrofit of dense models,
evaluation. Nothing here runs inside vLLM; the models are those of `nvium_reference.py`.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# Target of a position that nothing is to be learned at, as PyTorch's losses know it.
IGNORED = -100


class TrainingError(Exception):
    """Something the user can put right, in one sentence; shown without a stack trace."""


def require(*packages: str) -> None:
    """Refuses to begin without packages of the `train` extra.

    Raises:
        TrainingError: one of them is not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise TrainingError(
            f"the package {missing[0]!r} is not installed: pip install 'vllm-nvium[train]'."
        )


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then give it that name: a file that is there already
    is replaced as a whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    path = path.expanduser()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        partial.unlink(missing_ok=True)
