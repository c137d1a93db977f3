# SPDX-License-Identifier: Apache-2.0
"""Trains N-vium models: retrofits of dense ones and models from random weights."""
