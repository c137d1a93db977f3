# SPDX-License-Identifier: Apache-2.0
"""VIA-SD in a forward pass: drafting, the slim pass and the tier rule of one window."""
