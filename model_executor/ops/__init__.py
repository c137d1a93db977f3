# SPDX-License-Identifier: Apache-2.0
"""Functions of plain tensors, each beside its formula. They know neither vLLM nor a model, so a
test can compare each with the paper."""
