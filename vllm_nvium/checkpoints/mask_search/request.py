# SPDX-License-Identifier: Apache-2.0
"""What a search for a mask is asked for: the flags of `vllm-nvium search-mask`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from vllm_nvium.checkpoints.options import Options, Words, option
from vllm_nvium.model_executor.via_sd.mask import Objective

# The study, beside the mask file.
RECORD = ".trials.jsonl"


class SearchRequest(Options):
    """The flags of `vllm-nvium search-mask`, by their names."""

    target: str = option(..., "the full model: folder or hub id")
    data: Words = option(
        ..., "calibration text: files, folders, globs, .jsonl or names of the `datasets` library"
    )
    out: Path = option(..., "mask file to write", "MASK.json")
    skip_ratio: float = option(
        0.45,
        "share of the layers to skip (default: 0.45, the paper's best for 9B)",
        "R",
        gt=0,
        lt=1,
    )
    objective: Objective = option(
        "divergence",
        "divergence: the paper's, how far the slim verifier's predictions are from the full "
        "model's; agreement: how often their most likely tokens are the same; speed: measured "
        "tokens per second of VIA-SD in vLLM",
    )
    drafter: str | None = option(
        None, "with --objective speed: the draft model (default: n-gram drafts)", "MODEL"
    )
    trials: int = option(100, "masks to score", "N", ge=1)
    tokens: int = option(4096, "of the text", "N")
    block_size: int = option(256, "longest prefix", "T", ge=2)
    random_share: float = option(
        0.5,
        "of the trials after the first half (after ten, if that is less), drawn uniformly as those "
        "are; the others are Bayesian (default: 0.5, by turns)",
        "SHARE",
        ge=0,
        le=1,
    )
    no_ranking: bool = option(
        False,
        "do not first leave out every layer alone (which is not done for speed) to try the mask of "
        "those that cost least",
    )
    allow_ends: bool = option(False, "let the first and the last layer be skipped too")
    # Alpha and beta are by default those of a lossless verifier; the paper prints none.
    alpha: float = option(
        0.0,
        "of the divergence, in [0, 1): where the slim verifier gives a token more than 1 / (1 - A) "
        "times what the full model gives it, its own weight counts (default: 0)",
        "A",
        ge=0,
        lt=1,
    )
    beta: float = option(
        1.0,
        "of the divergence, at least 1 - A: where it gives a token more than 1 / B times as much, "
        "the full model's weight counts",
        "B",
    )
    seed: int = option(0, "of all draws (default: 0)", "S", ge=0)
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of the model (default: float32, and bfloat16 for speed, as it is served)"
    )
    resume: bool = option(
        False, "go on with the search whose record is beside -o; only --trials may differ"
    )

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_objective(cls, given: dict[str, Any]) -> dict[str, Any]:
        return ({"dtype": "bfloat16"} if given.get("objective") == "speed" else {}) | given

    @property
    def record(self) -> Path:
        """The trials of the search."""
        return self.out.with_suffix(RECORD)

    @property
    def picture(self) -> Path:
        """Scores over trials."""
        return self.out.with_suffix(".png")

    @property
    def maximise(self) -> bool:
        """Whether a larger score is better."""
        return self.objective != "divergence"

    @property
    def ranking(self) -> bool:
        """Whether every layer is first left out alone."""
        return not self.no_ranking and self.objective != "speed"
