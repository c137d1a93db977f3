# SPDX-License-Identifier: Apache-2.0
"""N-vium in the engine: its options, what a start is refused for, and both model runners. What
happens in a forward pass is in `model_executor/nvium`.
"""
