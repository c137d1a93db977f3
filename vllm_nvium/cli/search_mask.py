# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask TARGET --data FILE... -o mask.json`: finds which layers of a target
VIA-SD's slim verifier should skip. A search that was interrupted goes on with `--resume`; masks are
scored on the text as it stands, so text that the target wrote itself is the best to give.
"""

import argparse
import math
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_nvium.checkpoints.mask_search.request import (
    ALPHA,
    BETA,
    DTYPES,
    OBJECTIVES,
    RECORD,
    SearchRequest,
)
from vllm_nvium.cli.common import check_at_least, check_output
from vllm_nvium.console import complain, say
from vllm_nvium.errors import UserError

# `--help` shows these; --help-all the others too.
COMMON = ("--data", "--out", "--skip-ratio", "--trials", "--resume")


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
    """Search a mask.

    Returns:
        0, or 130 when the search was interrupted.

    Raises:
        UserError: something given cannot be used, or a file cannot be written.
    """
    try:
        request = check_request(args)
        from vllm_nvium.checkpoints.mask_search.find import find_mask

        mask = find_mask(request)
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
    defaults = {"alpha": ALPHA, "beta": BETA, "dtype": DTYPES[args.objective == "speed"]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    request = SearchRequest(**{**defaults, **given, "out": args.out.expanduser()})
    for flag, name, choices in (
        ("--objective", request.objective, OBJECTIVES),
        ("--dtype", request.dtype, DTYPES),
    ):
        if name not in choices:
            raise UserError(f"{flag} is {name!r}, and it must be one of {', '.join(choices)}.")
    check_at_least(args, trials=1, block_size=2, seed=0)
    if request.tokens < request.block_size:
        raise UserError(
            f"--tokens is {request.tokens}, which is less than one block of --block-size "
            f"{request.block_size}."
        )
    if not 0 < request.skip_ratio < 1:
        raise UserError(
            f"--skip-ratio is {request.skip_ratio}, and it must be greater than 0 and less than 1."
        )
    if not 0 <= request.random_share <= 1:
        raise UserError(f"--random-share is {request.random_share}, and a share lies in 0..1.")
    _check_objective(request, args)
    _check_files(request)
    for package in ("optuna", "datasets", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(
                f"the package {package!r} is not installed: pip install 'vllm-nvium[search]'."
            )
    if request.objective == "speed" and find_spec("vllm") is None:
        raise UserError("--objective speed needs vLLM, which is not installed.")
    return request


def _check_objective(request: SearchRequest, args: argparse.Namespace) -> None:
    """Flags that go with one objective."""
    objective, alpha, beta = request.objective, request.alpha, request.beta
    for flag, value in (("--alpha", args.alpha), ("--beta", args.beta)):
        if value is not None and objective != "divergence":
            raise UserError(
                f"{flag} is {value}, and --objective {objective} has none: leave it out."
            )
    if not 0 <= alpha < 1:
        raise UserError(f"--alpha is {alpha}, and it must be at least 0 and less than 1.")
    if not 1 - alpha <= beta < math.inf:
        raise UserError(
            f"--beta is {beta}, and it must be a number of at least 1 - alpha = {1 - alpha:g}."
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
