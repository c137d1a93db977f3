# SPDX-License-Identifier: Apache-2.0
"""The version of this package and the vLLM versions that it was tested with. It imports nothing, so
that the build and the plugin loader can read it."""

__version__ = "0.1.0"

# (major, minor), oldest first: the two newest are supported. The names in the hook tables were read
# and run in them.
TESTED_VLLM = ((0, 32), (0, 33))
# As pip takes it, `vllm>=...`; the extras of pyproject.toml say the same.
TESTED_VLLM_TEXT = ">=0.32,<0.34"
# Releases in which every name of the hook tables was found and that tests ran with, the whole suite
# on 0.32.0 and what `.ci/run` picks of it on 0.33.0: nobody needs to look for those names in them
# again. There is no CPU build of 0.33.0; its Python files ran over the kernels of 0.32.0
# (docs/updating-vllm.md).
EXACTLY_TESTED_VLLM = ("0.32.0", "0.33.0")
