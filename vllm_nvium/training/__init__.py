# SPDX-License-Identifier: Apache-2.0
"""Making N-vium checkpoints by training: loss, controller, data, retrofit of dense models,
evaluation. Nothing here runs inside vLLM; the models are those of `nvium_reference.py`.
"""

from importlib.util import find_spec


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
