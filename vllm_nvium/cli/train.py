# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train MODEL --out RUN --text ... --validation ...`: gives a dense model exits that
have learned when to leave, or trains an N-vium model from scratch. A run that was interrupted goes
on with `--resume`.
"""

import argparse
from typing import Any

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.train import train
from vllm_nvium.console import say

# `--help` shows these; --help-all the others too.
COMMON = ("--out", "--text", "--validation", "--method", "--config")


def make_parser(**about: Any) -> argparse.ArgumentParser:
    """The parser of every training option.

    Raises:
        UserError: transformers, whose parser it is made with, is not installed.
    """
    require("transformers")
    from vllm_nvium.checkpoints.train.flags import FlagParser

    return FlagParser(**about)


def run(args: argparse.Namespace) -> None:
    """Train.

    Raises:
        UserError: an option cannot be used; nothing was trained.
    """
    from vllm_nvium.checkpoints.train.flags import options_of

    say(f"vllm-nvium train: wrote {train(options_of(args))}")
