# SPDX-License-Identifier: Apache-2.0
"""What a search for a mask is asked for: the flags of `vllm-nvium search-mask`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from vllm_nvium.model_executor.via_sd.mask import Objective

OBJECTIVES: tuple[str, ...] = get_args(Objective)
DTYPES = ("float32", "bfloat16")
# The values of a lossless verifier; the paper prints none.
ALPHA, BETA = 0.0, 1.0
# The study, beside the mask file.
RECORD = ".trials.jsonl"


def _flag(text: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": text} | more)


@dataclass(frozen=True)
class SearchRequest:
    """The flags of `vllm-nvium search-mask`, by their names.

    `alpha`, `beta` and `dtype` have no default here, because it depends on the objective.
    """

    target: str = _flag("the full model: folder or hub id", metavar="TARGET")
    data: list[str] = _flag(
        "calibration text: files, folders, globs, .jsonl or names of the `datasets` library",
        nargs="+",
        required=True,
        metavar="SOURCE",
    )
    out: Path = _flag("mask file to write", required=True, metavar="MASK.json")
    skip_ratio: float = _flag(
        "share of the layers to skip (default: 0.45, the paper's best for 9B)", 0.45, metavar="R"
    )
    objective: str = _flag(
        "divergence: the paper's, how far the slim verifier's predictions are from the full "
        "model's; agreement: how often their most likely tokens are the same; speed: measured "
        "tokens per second of VIA-SD in vLLM (default: divergence)",
        OBJECTIVES[0],
        metavar="NAME",
    )
    drafter: str | None = _flag(
        "with --objective speed: the draft model (default: n-gram drafts)", metavar="MODEL"
    )
    trials: int = _flag("masks to score (default: 100)", 100, metavar="N")
    tokens: int = _flag("of the text (default: 4096)", 4096, metavar="N")
    block_size: int = _flag("longest prefix (default: 256)", 256, metavar="T")
    random_share: float = _flag(
        "of the trials after the first half (after ten, if that is less), drawn uniformly as those "
        "are; the others are Bayesian (default: 0.5, by turns)",
        0.5,
        metavar="SHARE",
    )
    no_ranking: bool = _flag(
        "do not first leave out every layer alone (which is not done for speed) to try the mask of "
        "those that cost least",
        False,
    )
    allow_ends: bool = _flag("let the first and the last layer be skipped too", False)
    alpha: float = _flag(
        "of the divergence, in [0, 1): where the slim verifier gives a token more than 1 / (1 - A) "
        f"times what the full model gives it, its own weight counts (default: {ALPHA:g})",
        metavar="A",
    )
    beta: float = _flag(
        "of the divergence, at least 1 - A: where it gives a token more than 1 / B times as much, "
        f"the full model's weight counts (default: {BETA:g})",
        metavar="B",
    )
    seed: int = _flag("of all draws (default: 0)", 0, metavar="S")
    dtype: str = _flag(
        f"{' or '.join(DTYPES)}, of the model (default: {DTYPES[0]}, and {DTYPES[1]} for speed, as "
        "it is served)",
        metavar="DTYPE",
    )
    resume: bool = _flag(
        "go on with the search whose record is beside -o; only --trials may differ", False
    )

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
