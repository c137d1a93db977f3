# SPDX-License-Identifier: Apache-2.0
"""VIA-SD in a forward pass: drafting, the slim pass and the tier rule of one window."""

# Most tokens between two passes of the full model, unless the user gives another number.
DEFAULT_WINDOW = 16
