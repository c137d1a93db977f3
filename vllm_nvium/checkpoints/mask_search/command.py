# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask TARGET --data FILE... -o mask.json`: finds which layers of a target
VIA-SD's slim verifier should skip. A search that was interrupted goes on with `--resume`; masks are
scored on the text as it stands, so text that the target wrote itself is the best to give.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_nvium.console import complain, progress, say
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.via_sd.mask import (
    Calibration,
    MaskFile,
    ModelIdentity,
    Objective,
    skip_count,
    write_mask_file,
)

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.mask_search.search import SearchSettings

OBJECTIVES: tuple[str, ...] = get_args(Objective)
DTYPES = ("float32", "bfloat16")
# The values of a lossless verifier; the paper prints none.
ALPHA, BETA = 0.0, 1.0
# The study, beside the mask file.
RECORD = ".trials.jsonl"
# How a message calls the fingerprint of the target's weights; `None` where it cannot be computed.
WEIGHTS = "the fingerprint of TARGET's weights"
# What may differ between a search and its continuation.
NOT_IN_THE_RECORD = ("target", "out", "trials", "resume")


# ---- what can be asked for


def _flag(text: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": text} | more)


@dataclass(frozen=True)
class SearchRequest:
    """The flags of `vllm-nvium search-mask`, by their names.

    Where `None` is the default of a flag, `check_request` fills in what it depends on.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium search-mask` to a parser."""
    for option in fields(SearchRequest):
        flag = f"--{option.name.replace('_', '-')}"
        names = {"target": ["target"], "out": ["-o", flag]}.get(option.name, [flag])
        settings: dict[str, Any] = {"default": option.default} | dict(option.metadata)
        if option.type is bool:
            settings["action"] = "store_true"
        elif option.type in (int, float, Path):
            settings["type"] = option.type
        parser.add_argument(*names, **settings)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the mask is written, 2 with one line on stderr when it is not, 130
    when the search was interrupted."""
    try:
        request = check_request(args)
        mask = find_mask(request)
    except UserError as error:
        complain(f"vllm-nvium search-mask: error: {error}")
        return 2
    except KeyboardInterrupt:
        goes_on = args.out.expanduser().with_suffix(RECORD).is_file()
        resume = " with --resume goes on" if goes_on else " begins anew"
        complain(f"vllm-nvium search-mask: interrupted; the same command{resume}.")
        return 130
    say(f"vllm-nvium search-mask: wrote {request.out} ({len(mask.skipped)} layers are skipped)")
    return 0


def check_request(args: argparse.Namespace) -> SearchRequest:
    """Refuse what cannot work, before anything slow starts.

    Raises:
        UserError: a flag has a value that cannot be used, or a package is missing.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    defaults = {"alpha": ALPHA, "beta": BETA, "dtype": DTYPES[args.objective == "speed"]}
    request = SearchRequest(**{**defaults, **given, "out": args.out.expanduser()})
    refusal = next(chain(_bad_values(request, args), _bad_files(request)), None)
    if refusal is not None:
        raise UserError(refusal)
    for package in ("optuna", "datasets", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(
                f"the package {package!r} is not installed: pip install 'vllm-nvium[search]'."
            )
    if request.objective == "speed" and find_spec("vllm") is None:
        raise UserError("--objective speed needs vLLM, which is not installed.")
    return request


def _bad_values(request: SearchRequest, args: argparse.Namespace) -> Iterator[str]:
    """A sentence about every flag whose value cannot be used."""
    objective, alpha, beta = request.objective, request.alpha, request.beta
    for flag, value, choices in (
        ("--objective", objective, OBJECTIVES),
        ("--dtype", request.dtype, DTYPES),
    ):
        if value not in choices:
            yield f"{flag} is {value!r}, and it must be one of {', '.join(choices)}."
    for flag, count, smallest in (
        ("--trials", request.trials, 1),
        ("--block-size", request.block_size, 2),
        ("--seed", request.seed, 0),
    ):
        if count < smallest:
            yield f"{flag} is {count}, and it must be at least {smallest}."
    if request.tokens < request.block_size:
        yield (
            f"--tokens is {request.tokens}, which is less than one block of --block-size "
            f"{request.block_size}."
        )
    if not 0 < request.skip_ratio < 1:
        yield (
            f"--skip-ratio is {request.skip_ratio}, and it must be greater than 0 and less than 1."
        )
    if not 0 <= request.random_share <= 1:
        yield f"--random-share is {request.random_share}, and a share lies in 0..1."
    for flag, value in (("--alpha", args.alpha), ("--beta", args.beta)):
        if value is not None and objective != "divergence":
            yield f"{flag} is {value}, and --objective {objective} has none: leave it out."
    if not 0 <= alpha < 1:
        yield f"--alpha is {alpha}, and it must be at least 0 and less than 1."
    if not 1 - alpha <= beta < math.inf:
        yield f"--beta is {beta}, and it must be a number of at least 1 - alpha = {1 - alpha:g}."
    if request.drafter is not None and objective != "speed":
        yield (
            f"--drafter is {request.drafter!r}, and --objective {objective} drafts nothing: leave "
            "it out, or use --objective speed."
        )
    if request.no_ranking and objective == "speed":
        yield "--no-ranking is given, and --objective speed ranks no layers: leave it out."


def _bad_files(request: SearchRequest) -> Iterator[str]:
    """A sentence about everything that keeps the results from being written."""
    out, folder = request.out, request.out.absolute().parent
    if out.suffix != ".json":
        yield f"-o is {str(out)!r}, and the name of a mask file ends in .json."
    if not folder.is_dir():
        yield f"-o is {str(out)!r}, and the folder {folder} does not exist."
    if out.is_dir():
        yield f"-o is {str(out)!r}, which is a folder; a file name is needed."
    if not os.access(folder, os.W_OK):
        yield f"-o is {str(out)!r}, and {folder} cannot be written to."
    if request.resume and not request.record.is_file():
        yield (
            f"--resume needs the record of a search, and there is no {request.record}: leave it "
            "out to begin one."
        )
    if not request.resume and request.record.exists():
        yield (
            f"-o is {str(out)!r}, beside which {request.record.name} holds a search already: give "
            "--resume to go on with it, or another name."
        )
    for path in (out, request.picture):
        if path.exists() and not request.resume:
            yield (
                f"-o is {str(out)!r}, and {path} exists already: move it away, or give another "
                "name."
            )


# ---- the work


def find_mask(request: SearchRequest) -> MaskFile:
    """Search, and write mask, record and picture.

    Raises:
        UserError: target or text cannot be used, the record is of another search, or a result
            cannot be written.
    """
    import optuna

    from vllm_nvium.checkpoints.mask_search.report import draw_history, make_mask_file, print_report
    from vllm_nvium.checkpoints.mask_search.search import (
        begin_study,
        resume_study,
        scored_masks,
        scores_alone,
        scores_left,
        search,
    )
    from vllm_nvium.checkpoints.mask_search.target import load_target_config, load_text, make_score
    from vllm_nvium.weights import fingerprint

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = load_target_config(request)
    identity = ModelIdentity.from_config(config)
    settings = _search_settings(request, identity.num_hidden_layers)
    blocks = load_text(request, config)
    calibration = Calibration(
        sources=tuple(request.data),
        prefixes=blocks.numel(),
        block_size=request.block_size,
        sha256=hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
    )
    recorded = _recorded_settings(request, identity, calibration)
    recorded[WEIGHTS] = fingerprint(request.target, settings.num_layers)
    # The record of another search is refused before the model is loaded, and a new record is begun
    # after it, so that a model that cannot be loaded leaves nothing behind.
    resumed = resume_study(request.record, recorded, (WEIGHTS,)) if request.resume else None
    score = make_score(request, config, blocks)
    study = resumed or begin_study(request.record, recorded, request.maximise)
    try:
        with progress("Searching", scores_left(study, settings), "mask") as bar:
            search(study, settings, score, bar)
    except BaseException:
        if not scored_masks(study) and not scores_alone(study):
            request.record.unlink(missing_ok=True)  # nothing to go on with
        raise
    mask = make_mask_file(request, identity, calibration, study)
    write_mask_file(request.out, mask)
    write_atomically(request.picture, lambda path: draw_history(path, study, request.objective))
    print_report(request, study)
    return mask


def _search_settings(request: SearchRequest, num_layers: int) -> "SearchSettings":
    from vllm_nvium.checkpoints.mask_search.search import SearchSettings

    count = skip_count(request.skip_ratio, num_layers)
    # The even mask is where a search begins, and it keeps both ends.
    if not 1 <= count <= num_layers - 2:
        raise UserError(
            f"--skip-ratio is {request.skip_ratio}, which skips {count} of TARGET's {num_layers} "
            f"layers, and from 1 to {num_layers - 2} can be skipped."
        )
    return SearchSettings(
        num_layers,
        count,
        request.trials,
        allow_ends=request.allow_ends,
        seed=request.seed,
        random_share=request.random_share,
        ranking=request.ranking,
    )


def _recorded_settings(
    request: SearchRequest, identity: ModelIdentity, calibration: Calibration
) -> dict[str, Any]:
    """What a resumed search must agree with, by the name that a message gives it."""
    flags = {
        f"--{name.replace('_', '-')}": value
        for name, value in asdict(request).items()
        if name not in NOT_IN_THE_RECORD
    }
    return (
        {"TARGET": request.target, "TARGET's configuration": identity.model_dump()}
        | flags
        | {"the SHA-256 of the text's tokens": calibration.sha256}
    )
