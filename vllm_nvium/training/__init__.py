# SPDX-License-Identifier: Apache-2.0
"""Making N-vium checkpoints by training: loss, controller, data, retrofit of dense models,
evaluation. Nothing here runs inside vLLM; the models are those of `nvium_reference.py`.
"""


class TrainingError(Exception):
    """Something the user can put right, in one sentence; shown without a stack trace."""
