# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.worker.gpu_model_runner.build_logitsprocs`: beside a drafter vLLM leaves out the logits
processors of min_p and logit_bias, and refuses custom ones. While a runner of VIA-SD is made it
builds those of plain decoding, because its sampler can apply them; this can go when vLLM's
rejection sampler applies all of them.
"""

import copy
import logging
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, build_logitsprocs
from vllm.v1.worker import gpu_model_runner

logger = logging.getLogger("vllm.nvium")


def _build(vllm_config: Any, *args: Any) -> Any:
    plain = copy.copy(vllm_config)
    object.__setattr__(plain, "speculative_config", None)  # past the checks of its class
    found = build_logitsprocs(plain, *args)
    others = [type(each) for each in found.all if type(each) not in BUILTIN_LOGITS_PROCESSORS]
    if others:
        logger.warning(
            "Logits processors that are not vLLM's own (%s) see one token at a time: requests that "
            "they apply to get no drafts, and nobody does if they do not say which those are, as "
            "an AdapterLogitsProcessor does",
            ", ".join(each.__name__ for each in others),
        )
    return found


def as_without_speculation() -> AbstractContextManager[object]:
    """While a model runner is made: it gets the logits processors of plain decoding."""
    return patch.object(gpu_model_runner, build_logitsprocs.__name__, _build)
