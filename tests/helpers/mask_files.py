# SPDX-License-Identifier: Apache-2.0
"""A mask file of VIA-SD for tests."""

from typing import Any

from transformers import LlamaConfig

from tiny_models import SIZES
from vllm_nvium.model_executor.via_sd.mask import Calibration, MaskFile, ModelIdentity

IDENTITY = ModelIdentity.from_config(LlamaConfig(**SIZES))


def mask_file(**changes: Any) -> MaskFile:
    fields: dict[str, Any] = {
        "model": "llama",
        "identity": IDENTITY.model_dump(),
        "num_layers": 4,
        "skipped": (1, 2),
        "skip_ratio": 0.45,
        "objective": "divergence",
        "alpha": 0.0,
        "beta": 1.0,
        "drafter": None,
        "calibration": Calibration(sources=("a.txt",), prefixes=64, block_size=32, sha256="0" * 64),
        "seed": 0,
        "trials": 3,
        "random_share": 0.5,
        "ends_allowed": False,
        "ranked": True,
        "dtype": "float32",
        "score": 0.1 + 0.2,
        "even_score": 0.4,
        "made_with": {"vllm_nvium": "0"},
    }
    return MaskFile(**fields | changes)
