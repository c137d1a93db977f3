# SPDX-License-Identifier: Apache-2.0
"""What both methods know of a request."""

# vLLM's own bound below which a temperature means greedy.
GREEDY_BELOW = 1e-5
