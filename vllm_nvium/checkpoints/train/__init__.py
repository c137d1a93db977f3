# SPDX-License-Identifier: Apache-2.0
"""Trains N-vium models: retrofits of dense ones and models from random weights. Importing this
package imports neither torch nor transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_nvium.checkpoints import require

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.train.options import TrainOptions


def train(options: "TrainOptions") -> Path:
    """Makes the run that the options describe, or goes on with it.

    Returns:
        the folder of the finished checkpoint, `RUN/model`.

    Raises:
        UserError: something given cannot be used; nothing was trained, and a new run's folder
            is as it was before.
    """
    from vllm_nvium.checkpoints.train.options import check

    check(options)
    require("accelerate", "datasets", *(["peft"] if options.method == "lora" else []))
    from vllm_nvium.checkpoints.train.run import run

    return run(options)
