# SPDX-License-Identifier: Apache-2.0
"""What a start is refused for that no CPU has: sizes of CUDA graphs."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationConfig, CUDAGraphMode

from vllm_nvium.errors import UserError
from vllm_nvium.via_sd.refusals import check_graphs


def graphs(mode: CUDAGraphMode, sizes: list[int], window: int = 16, tokens: int = 8192) -> Any:
    compilation = CompilationConfig(
        cudagraph_mode=mode,
        cudagraph_capture_sizes=sizes,
        max_cudagraph_capture_size=max(sizes, default=0),
    )
    return SimpleNamespace(
        compilation_config=compilation,
        num_speculative_tokens=window,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
    )


def test_graphs_that_hold_no_window_are_refused() -> None:
    """As vLLM does in a worker."""
    small = graphs(CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4, 16])
    with pytest.raises(
        UserError, match="is 16, but --via-sd-window 16 has graphs of 17 tokens; give at least"
    ):
        check_graphs(small)
    with pytest.raises(ValueError, match="No valid cudagraph sizes"):
        small.compilation_config.adjust_cudagraph_sizes_for_spec_decode(17)
    few = graphs(CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4, 16], tokens=16)
    with pytest.raises(UserError, match="--max-num-batched-tokens is 16, but --via-sd-window 16"):
        check_graphs(few)


@pytest.mark.parametrize(
    "config",
    [
        graphs(CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4, 17]),
        graphs(CUDAGraphMode.FULL_DECODE_ONLY, [1, 512]),
        graphs(CUDAGraphMode.PIECEWISE, [1, 2]),
        graphs(CUDAGraphMode.NONE, []),
        graphs(CUDAGraphMode.FULL, [8], window=7),
    ],
    ids=["a window", "larger", "piecewise", "none", "a smaller window"],
)
def test_graphs_that_hold_one_are_not(config: Any) -> None:
    check_graphs(config)
    compilation = config.compilation_config
    if compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL:
        compilation.adjust_cudagraph_sizes_for_spec_decode(1 + config.num_speculative_tokens)
