# SPDX-License-Identifier: Apache-2.0
"""The version of this package and the range of vLLM versions it was tested with. It imports
nothing, so that the build and the plugin loader can read it."""

__version__ = "0.1.0"

# (major, minor). The names in `hooks.py` were read and run in every patch release of this minor.
TESTED_VLLM = (0, 32)
TESTED_VLLM_TEXT = "0.32.*"
# Releases that the whole suite ran with: nobody needs to look for those names in them again.
EXACTLY_TESTED_VLLM = ("0.32.0",)
