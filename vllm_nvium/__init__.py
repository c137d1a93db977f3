# SPDX-License-Identifier: Apache-2.0
"""N-vium (mixture-of-exits) models for an unmodified vLLM. Importing this package imports neither
vLLM nor torch; vLLM reaches it through the entry point in `plugin.py`."""

from pathlib import Path

from vllm_nvium.version import __version__

# In a checkout `model_executor/` stands beside this folder. When Python is started there, the
# checkout shadows an installed wheel, so `vllm_nvium.model_executor` must be found beside it.
if (Path(__file__).parent.parent / "model_executor" / "models").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__all__ = ["__version__"]
