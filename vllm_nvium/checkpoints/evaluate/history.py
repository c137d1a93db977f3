# SPDX-License-Identifier: Apache-2.0
"""The validations of a training run, read back from its `history.jsonl`."""

import json
from pathlib import Path
from typing import Any

from vllm_nvium.errors import UserError, first_line

HISTORY = "history.jsonl"


def read_history(file: Path, flag: str, *needed: str) -> list[dict[str, Any]]:
    """The lines of a history in which no field of `needed` is missing or null, by step. Of several
    lines of one step, which earlier versions wrote in resumed runs, the last one counts.

    Args:
        needed: `step` among them.
    """
    try:
        lines = [json.loads(line) for line in file.expanduser().read_text().splitlines()]
        found = {
            line["step"]: line
            for line in lines
            if all(line.get(name) is not None for name in needed)
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{flag} names {file}, which cannot be read as the {HISTORY} of a training run "
            f"({first_line(error)})."
        ) from error
    if not found:
        raise UserError(
            f"{flag} names {file}, and no line of it holds {' and '.join(needed)}: give another "
            "run."
        )
    return [found[step] for step in sorted(found)]
