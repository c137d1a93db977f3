# SPDX-License-Identifier: Apache-2.0
"""N-vium models: the configuration, the plain PyTorch reference, and the vLLM model. All of them
use the same names for the same parameters."""
