# SPDX-License-Identifier: Apache-2.0
"""The package's version and the vLLM versions it was tested with. Imports nothing, so that the build and the plugin loader can read it."""

__version__ = "0.1.0"
