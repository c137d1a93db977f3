# SPDX-License-Identifier: Apache-2.0
"""Making checkpoints and measuring them: conversion, training, evaluation, mask search. Nothing
here serves; the models are those of `nvium_reference.py`, in plain transformers.
"""

from importlib.util import find_spec

from vllm_nvium.errors import UserError

# Target of a position that nothing is to be learned at, as PyTorch's losses know it.
IGNORED = -100


def require(*packages: str, extra: str = "train") -> None:
    """Refuses to begin without packages of an extra."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the package {missing[0]!r} is not installed: pip install 'vllm-nvium[{extra}]'."
        )
