# SPDX-License-Identifier: Apache-2.0
"""Which weight files of a checkpoint are on this machine, and what tells its weights from others of
the same sizes. Nothing is loaded: files are found, their headers read, and a few rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.checkpoint_layout import indexed_files

# What a fingerprint is taken of: rows of a projection that every decoder here has, where fine-tunes
# and other models differ from the first row on. Quantised checkpoints have no such plain numbers.
TENSOR = "model.layers.{}.self_attn.q_proj.weight"
ROWS = 8
PLAIN = ("F64", "F32", "F16", "BF16")
# Of each tensor, at its beginning and at its end, in a digest of all.
END_BYTES = 4096


def weight_files(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> list[Path]:
    """The `.safetensors` files of a checkpoint that vLLM would read; none when not all are here.

    Args:
        model: a folder, or an id of the hub, whose cache is looked into.

    Raises:
        UserError: a folder's index is not one, or names a file that is not there.
    """
    if Path(model).is_dir():
        return _local_files(Path(model))
    return _cached_files(model, revision, cache_dir)


def fingerprint(
    model: str, num_layers: int, revision: str | None = None, cache_dir: str | None = None
) -> str | None:
    """What tells a checkpoint's weights from others of the same sizes, in milliseconds: the SHA-256
    of dtype, shape and first rows of the query projections of the first, the middle and the last
    layer. Another dtype of the same weights is another checkpoint.

    Returns:
        64 hexadecimal digits; `None` where it cannot be computed: files that are not here or not
        safetensors, tensors of other names, quantised ones.
    """
    try:
        files = weight_files(model, revision, cache_dir)
        layers = sorted({0, num_layers // 2, num_layers - 1})
        parts = _first_rows(files, [TENSOR.format(layer) for layer in layers])
    except (UserError, SafetensorError, OSError):
        return None
    return hashlib.sha256(b"".join(parts)).hexdigest() if parts else None


def digest(model: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """What tells a checkpoint from others of the same sizes, in seconds: the SHA-256 of the first
    and last bytes of every tensor, of the headers of its files, and of its configurations. What
    was changed in the middle of tensors alone it does not see.

    Returns:
        64 hexadecimal digits; `None` where its files are not here or not safetensors.
    """
    try:
        files = weight_files(model, revision, cache_dir)
        found = hashlib.sha256()
        for file in files:
            for part in _header_and_ends(file):
                found.update(part)
        for folder in sorted({file.parent for file in files}):
            for path in (folder / "config.json", folder / "generation_config.json"):
                found.update(path.read_bytes() if path.is_file() else b"")
    except (UserError, SafetensorError, OSError, ValueError):
        return None
    return found.hexdigest() if files else None


def checkpoint_name(model: str) -> str:
    """What a checkpoint is called wherever it lies: the last part of its path or id, and for a
    folder of the hub's cache (`models--ORG--NAME/snapshots/HASH`) that of its id."""
    path = Path(model)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return path.name


def _first_rows(files: Sequence[Path], names: Sequence[str]) -> list[bytes]:
    """Dtype, shape and first rows of each tensor in bytes; empty unless all are there and plain."""
    import torch

    found: dict[str, bytes] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in set(handle.keys()) & set(names):
                tensor = handle.get_slice(name)
                if tensor.get_dtype() not in PLAIN:
                    return []
                rows = tensor[:ROWS].contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = f"{tensor.get_dtype()} {tensor.get_shape()}".encode() + rows
    return [found[name] for name in names] if len(found) == len(names) else []


def _header_and_ends(file: Path) -> Iterator[bytes]:
    """Of a safetensors file: its header, then the first and last bytes of every tensor."""
    with safe_open(file, framework="pt"):  # raises an error of its own where it is none
        pass
    # On network file systems the usual buffer is a thousand times what is read here.
    with file.open("rb", buffering=END_BYTES) as data:
        length = int.from_bytes(data.read(8), "little")
        yield (header := data.read(length))
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for start, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
            for first in sorted({start, max(end - END_BYTES, start)}):
                data.seek(8 + length + first)
                yield data.read(min(end - first, END_BYTES))


def _local_files(folder: Path) -> list[Path]:
    """The `.safetensors` files of a folder that vLLM would read."""
    files = indexed_files(folder)
    return sorted(folder.glob("*.safetensors")) if files is None else files


def _cached_files(model: str, revision: str | None, cache_dir: str | None) -> list[Path]:
    """The same for a model of the hub, when the cache holds all of them."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", cache_dir, revision)
    except HFValidationError:
        return []
    if not isinstance(config, str):
        return []
    folder = Path(config).parent
    try:
        files = indexed_files(folder)
    except UserError:  # a part is still to be downloaded
        return []
    single = folder / "model.safetensors"
    return ([single] if single.is_file() else []) if files is None else files
