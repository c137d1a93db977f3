# SPDX-License-Identifier: Apache-2.0
"""The options of a conversion of a dense model, apart from what converts, so that a command's help
need not import torch."""

from typing import Annotated, Literal

from pydantic import Field

from vllm_nvium.checkpoints.options import Integers, Options, Shares, option


class DenseOptions(Options):
    """What stands at the exits of a converted dense model."""

    exit_layers: Integers | None = option(
        None, "layers already run at each early exit (default: evenly spaced)", "L1,L2,..."
    )
    num_exits: int = option(3, "number of evenly spaced early exits, without --exit-layers", "N")
    hazards: Shares = option(
        [0.0],
        "constant chance of leaving at each exit for a token that got there, for measuring speed; "
        "one value is for all exits (default: 0, the output equals the dense model)",
        "P1,P2,...",
    )
    exit_norm: Literal["final", "ones"] = option(
        "final", "what every exit's norm starts as: the final norm's weight, or ones"
    )
    adapter_size: Annotated[int, Field(ge=0)] | None = option(
        None,
        "inner width of the adapters, of exits and final head (default: the hidden size, as in the "
        "paper)",
        "A",
    )
    router_size: Annotated[int, Field(ge=1)] | None = option(
        None,
        "inner width of the routers (default: about 0.66 of the hidden size, as in the paper)",
        "I",
    )
    seed: int = option(0, "seed of the routers' random weights, which training starts from")
