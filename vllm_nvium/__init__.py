# SPDX-License-Identifier: Apache-2.0
"""N-vium (mixture-of-exits) models and VIA-SD (speculative decoding with a slim verifier) on an
unmodified vLLM. Importing this package imports neither vLLM nor torch; vLLM reaches it through the
entry point in `plugin.py`."""

from vllm_nvium.version import __version__

__all__ = ["__version__"]
