# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask`: finds the layers that VIA-SD's slim verifier skips."""
