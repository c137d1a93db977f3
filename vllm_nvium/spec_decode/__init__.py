# SPDX-License-Identifier: Apache-2.0
"""VIA-SD: speculative decoding with a slim verifier between the drafter and the target."""
