# SPDX-License-Identifier: Apache-2.0
"""Plumbing between vLLM and both methods: options, refusals, workers, patches, the table of names
of vLLM that are used. It knows vLLM and neither method.
"""
