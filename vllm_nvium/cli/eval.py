# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium eval MODEL --text SOURCE`: perplexity of an N-vium checkpoint and of each of its
heads, where its tokens leave, and the speed-up to expect, beside the dense parent if one is given.
Printed as a table, written as JSON and drawn as a PNG.
"""

import argparse
import glob
import json
from collections.abc import Sequence
from pathlib import Path

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.evaluate.request import Request
from vllm_nvium.checkpoints.options import add_flags, given_by
from vllm_nvium.cli.common import check_output
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically

# `--help` shows these; --help-all the others too.
COMMON = ("--text", "--dense", "--max-tokens", "--plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium eval` to a parser."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="N-vium checkpoint folder")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="[NAME=]SOURCE",
        help="text that the model was not trained on: files, folders, globs or names of the "
        "`datasets` library; every name is measured for itself, and sources that are given the "
        "same NAME are one text",
    )
    add_flags(parser, Request, left_out=("model", "texts"))
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write every number")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the exit shares")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="RUN_FOLDER",
        help="with --plot: also draw loss and depth over the training run in this folder",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    given = given_by(args, Request) | {"model": args.model.expanduser()}
    request = Request(**given, texts=parse_texts(args.text))
    check(request, args)
    from vllm_nvium.checkpoints.evaluate.checkpoint import evaluate
    from vllm_nvium.checkpoints.evaluate.history import HISTORY, read_history
    from vllm_nvium.checkpoints.evaluate.plots import draw
    from vllm_nvium.checkpoints.evaluate.results import to_json
    from vllm_nvium.checkpoints.evaluate.tables import print_report

    history = []
    if args.history is not None:
        needed = ("step", "val_loss", "mean_depth")
        history = read_history(args.history / HISTORY, "--history", *needed)
    report = evaluate(request)
    print_report(report)
    if args.json is not None:
        text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text))
    if args.plot is not None:
        evaluations = {name: result.nvium for name, result in report.texts.items()}
        write_atomically(args.plot, lambda path: draw(path, evaluations, history))


def check(request: Request, args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything slow starts."""
    if request.max_tokens is not None and request.max_tokens < request.block_size:
        raise UserError(
            f"--max-tokens is {request.max_tokens}, which is less than one block of --block-size "
            f"{request.block_size}."
        )
    if request.agreement and request.dense is None:
        raise UserError("--agreement is with the dense parent, so --dense must be given too.")
    if args.history is not None and args.plot is None:
        raise UserError("--history is drawn by --plot, so --plot must be given too.")
    check_output("--json", args.json)
    check_output("--plot", args.plot)
    if args.json is not None and args.plot is not None and _same(args.json, args.plot):
        raise UserError(f"--json and --plot are both {str(args.json)!r}; give two files.")
    require("datasets", *(["matplotlib"] if args.plot is not None else []))


def parse_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=SOURCE` or `SOURCE` words as name -> sources; a source alone is named after itself.

    Raises:
        UserError: a name or a source is empty, or two texts would have one name by chance.
    """
    texts: dict[str, list[str]] = {}
    automatic: set[str] = set()
    for word in words:
        name, equals, source = word.partition("=")
        # A path may have an equals sign in it, a name has no slash.
        is_named = bool(equals) and "/" not in name and not Path(word).expanduser().exists()
        if not is_named:
            name, source = _name_of(word), word
        if not name.strip() or not source.strip():
            raise UserError(f"--text has {word!r}, and NAME=SOURCE or SOURCE is needed.")
        if name in texts and (not is_named or name in automatic):
            raise UserError(
                f"--text has two texts that would be called {name!r}; name them, as in "
                f"NAME={source}."
            )
        if not is_named:
            automatic.add(name)
        texts.setdefault(name, []).append(source)
    return texts


def _name_of(source: str) -> str:
    return source if glob.has_magic(source) else Path(source).stem or source


def _same(one: Path, other: Path) -> bool:
    return one.expanduser().resolve() == other.expanduser().resolve()
