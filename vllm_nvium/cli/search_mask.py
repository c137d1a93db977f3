# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask TARGET --data FILE... -o mask.json`: finds which layers of a target
VIA-SD's slim verifier should skip. A search that was interrupted goes on with `--resume`; masks are
scored on the text as it stands, so text that the target wrote itself is the best to give.
"""

import argparse
from pathlib import Path

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.mask_search.request import RECORD, SearchRequest
from vllm_nvium.checkpoints.options import add_flags, given_by
from vllm_nvium.cli.common import check_output
from vllm_nvium.console import complain, say
from vllm_nvium.errors import UserError

# `--help` shows these; --help-all the others too.
COMMON = ("--data", "--out", "--skip-ratio", "--trials", "--resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium search-mask` to a parser."""
    parser.add_argument("target", metavar="TARGET", help="the full model: folder or hub id")
    add_flags(parser, SearchRequest, left_out=("target",), out="-o")


def run(args: argparse.Namespace) -> int:
    """Search a mask.

    Returns:
        0, or 130 when the search was interrupted.
    """
    args.out = Path(args.out).expanduser()
    try:
        request = SearchRequest(**given_by(args, SearchRequest))
        check(request)
        from vllm_nvium.checkpoints.mask_search.find import find_mask

        mask = find_mask(request)
    except KeyboardInterrupt:
        goes_on = args.out.with_suffix(RECORD).is_file()
        resume = " with --resume goes on" if goes_on else " begins anew"
        complain(f"vllm-nvium search-mask: interrupted; the same command{resume}.")
        return 130
    say(f"vllm-nvium search-mask: wrote {request.out} ({len(mask.skipped)} layers are skipped)")
    return 0


def check(request: SearchRequest) -> None:
    """Refuse what cannot work, before anything slow starts."""
    if request.tokens < request.block_size:
        raise UserError(
            f"--tokens is {request.tokens}, which is less than one block of --block-size "
            f"{request.block_size}."
        )
    _check_objective(request)
    _check_files(request)
    require("optuna", "datasets", "matplotlib", extra="search")
    if request.objective == "speed":
        require("vllm", extra="cpu")


def _check_objective(request: SearchRequest) -> None:
    """Flags that go with one objective."""
    objective = request.objective
    for name in ("alpha", "beta"):
        if name in request.model_fields_set and objective != "divergence":
            raise UserError(
                f"--{name} is {getattr(request, name)}, and --objective {objective} has none: "
                "leave it out."
            )
    if request.beta < 1 - request.alpha:
        raise UserError(
            f"--beta is {request.beta}, and it must be a number of at least 1 - alpha = "
            f"{1 - request.alpha:g}."
        )
    if request.drafter is not None and objective != "speed":
        raise UserError(
            f"--drafter is {request.drafter!r}, and --objective {objective} drafts nothing: leave "
            "it out, or use --objective speed."
        )
    if request.no_ranking and objective == "speed":
        raise UserError(
            "--no-ranking is given, and --objective speed ranks no layers: leave it out."
        )


def _check_files(request: SearchRequest) -> None:
    """The results must have a place, and no others may lie there."""
    out = request.out
    if out.suffix != ".json":
        raise UserError(f"-o is {str(out)!r}, and the name of a mask file ends in .json.")
    check_output("-o", out)
    if request.resume:
        if not request.record.is_file():
            raise UserError(
                f"--resume needs the record of a search, and there is no {request.record}: leave "
                "it out to begin one."
            )
        return
    if request.record.exists():
        raise UserError(
            f"-o is {str(out)!r}, beside which {request.record.name} holds a search already: give "
            "--resume to go on with it, or another name."
        )
    for path in (out, request.picture):
        if path.exists():
            raise UserError(
                f"-o is {str(out)!r}, and {path} exists already: move it away, or give another "
                "name."
            )
