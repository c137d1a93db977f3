# SPDX-License-Identifier: Apache-2.0
"""Measures N-vium checkpoints: perplexity of the mixture and of every head, exits, expected
speed-up."""
