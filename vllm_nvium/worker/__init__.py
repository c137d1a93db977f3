# SPDX-License-Identifier: Apache-2.0
"""Thin adapters between vLLM's workers and the N-vium cascade."""
