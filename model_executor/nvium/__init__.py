# SPDX-License-Identifier: Apache-2.0
"""N-vium in a forward pass: who leaves at an exit, and which rows catch up."""
