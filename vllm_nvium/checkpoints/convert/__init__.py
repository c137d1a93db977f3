# SPDX-License-Identifier: Apache-2.0
"""Makes N-vium checkpoints out of dense models (`dense.py`, `gguf.py`), with trained exits
(`exits.py`), and out of the layout that the N-vium authors released (`authors.py`). Importing this
package imports neither torch nor transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_nvium.checkpoints.convert.options import DenseOptions
from vllm_nvium.checkpoints.options import flag_of
from vllm_nvium.errors import UserError
from vllm_nvium.files import from_hub

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.convert.checkpoint import Source


def convert(
    dense: str | Path,
    out: str | Path,
    options: DenseOptions | None = None,
    *,
    dtype: str = "auto",
    force: bool = False,
    exits: str | Path | None = None,
) -> list[str]:
    """Make an N-vium checkpoint that vLLM serves and training continues from.

    Args:
        dense: folder, hub id or `.gguf` file.
        out: folder to write; it appears complete or not at all.
        options: the exits of a dense model; must be `None` for an authors' checkpoint.
        dtype: `"auto"`, `"bfloat16"` or `"float32"`.
        force: replace a checkpoint at `out`.
        exits: folder of trained exits (see `exits.py`) for a dense model; excludes `options`.

    Returns:
        Notes for the user, one sentence each; mostly none.

    Raises:
        UserError: what was given cannot be converted; nothing was written.
    """
    from vllm_nvium.checkpoints.convert import authors
    from vllm_nvium.checkpoints.convert import dense as dense_models
    from vllm_nvium.checkpoints.convert import exits as trained_exits
    from vllm_nvium.checkpoints.convert.checkpoint import source_dtype, write_checkpoint

    source = open_source(str(dense), dtype)
    flags = ", ".join(map(flag_of, DenseOptions.model_fields))
    do_not_apply = f"so {flags} do not apply."
    notes: list[str] = []
    if exits is not None:
        if options is not None:
            raise UserError(f"--exits holds exits that are given, {do_not_apply}")
        config, plan, notes = trained_exits.plan(source, Path(exits))
    elif authors.is_authors_layout(source):
        if options is not None:
            raise UserError(
                f"{dense} is a checkpoint of the N-vium authors, whose exits are given, "
                f"{do_not_apply}"
            )
        config, plan, notes = authors.plan(source)
    else:
        config, plan = dense_models.plan(source, options or DenseOptions())
    read = [] if exits is None else [Path(exits)]
    write_checkpoint(
        Path(out), source, config, plan, source_dtype(source, dtype), force, sources=read
    )
    return notes


def open_source(name: str, dtype: str = "auto") -> "Source":
    """Opens a folder, hub id or `.gguf` file to convert from.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    from vllm_nvium.checkpoints.convert.checkpoint import open_folder
    from vllm_nvium.checkpoints.convert.gguf import open_gguf

    path = Path(name).expanduser()
    if is_hub_id(name):
        return open_folder(from_hub(name), name)
    if path.is_dir():
        return open_folder(path, name)
    if not path.exists():
        raise UserError(f"{name!r} does not exist, and it is no hub id like 'owner/name'.")
    if path.suffix == ".gguf":
        return open_gguf(path, dtype)
    raise UserError(f"{name} is a file, and a folder, a hub id or a .gguf file is needed.")


def is_hub_id(name: str) -> bool:
    """Whether this names a model on the hub: nothing here is called so, and it does not look like
    a path."""
    path = Path(name)
    looks_like_a_path = name.startswith(("/", ".", "~")) or path.suffix == ".gguf"
    return not path.exists() and not looks_like_a_path and name.count("/") <= 1
