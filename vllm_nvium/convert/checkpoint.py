# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint tensor by tensor, and writing one so that it is there as a whole or not at
all. Both kinds of conversion go through here and differ only in the tensors they ask for.
"""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from vllm_nvium.convert import ConvertError
from vllm_nvium.model_executor.models.checkpoint_layout import (
    LayoutError,
    Shape,
    expected_shapes,
    indexed_files,
    read_shapes,
)
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

# Files of a checkpoint that are neither its weights nor its configuration.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
)

# Name in the N-vium checkpoint -> how to make that tensor. Nothing is read before it is needed.
TensorPlan = dict[str, Callable[[], torch.Tensor]]


@dataclass
class Source:
    """A checkpoint to convert.

    Attributes:
        name: what the user called it, for messages.
        config: the content of its `config.json`, or the equivalent for GGUF.
        shapes: the shape of every tensor in it.
        load: reads one tensor by name.
        copy_companions: puts tokenizer, generation configuration and chat template into a folder.
        folder: where it is, when it is a folder.
        load_config: the configuration as transformers reads it (rope settings in one form).
    """

    name: str
    config: dict[str, Any]
    shapes: Mapping[str, Shape]
    load: Callable[[str], torch.Tensor]
    copy_companions: Callable[[Path], None]
    load_config: Callable[[], Any]
    folder: Path | None = None


def open_folder(folder: Path, name: str) -> Source:
    """Open a Hugging Face folder: one or several `.safetensors` files, or `pytorch_model*.bin`.

    Raises:
        ConvertError: no readable configuration or no weights.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConvertError(f"{name} has no config.json, so it is not a Hugging Face checkpoint.")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ConvertError(f"{config_file} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ConvertError(f"{config_file} holds {type(config).__name__}, not an object of fields.")
    shapes, load = _open_weights(folder, name)

    def load_config() -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder)
        except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise ConvertError(f"transformers cannot read {config_file}: {first_line}") from error

    return Source(
        name=name,
        config=config,
        shapes=shapes,
        load=load,
        copy_companions=lambda out: copy_companions(folder, out),
        folder=folder,
        load_config=load_config,
    )


def _open_weights(
    folder: Path, name: str
) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    files = _safetensors_files(folder)
    if not files:
        return _open_bin_weights(folder, name)
    shapes: dict[str, Shape] = {}
    where: dict[str, Path] = {}
    for file in files:
        try:
            found = read_shapes(file)
        except LayoutError as error:
            raise ConvertError(str(error)) from error
        shapes.update(found)
        where.update(dict.fromkeys(found, file))

    @cache
    def opened(file: Path) -> Any:
        return safe_open(file, framework="pt")

    return shapes, lambda tensor: opened(where[tensor]).get_tensor(tensor)


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that the index names, else `model.safetensors`, else every `.safetensors` file."""
    try:
        indexed = indexed_files(folder)
    except LayoutError as error:
        raise ConvertError(str(error)) from error
    if indexed is not None:
        return indexed
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _open_bin_weights(
    folder: Path, name: str
) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ConvertError(f"{name} has no weights: no .safetensors and no pytorch_model.bin.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ConvertError(f"{file} cannot be read as PyTorch weights.") from error
    return {key: tuple(value.shape) for key, value in state.items()}, state.__getitem__


def copy_companions(folder: Path, out: Path) -> None:
    """Copy what a server needs beside weights and configuration (see `COMPANIONS`)."""
    for pattern in COMPANIONS:
        for path in folder.glob(pattern):
            target = out / path.name
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)


def source_dtype(source: Source, dtype: str) -> torch.dtype:
    """The dtype to write: the one asked for, or for `"auto"` that of the source's embeddings."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    for name in source.shapes:
        if name.endswith("embed_tokens.weight"):
            found = source.load(name).dtype
            if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise ConvertError(
                    f"{name} in {source.name} is {found}, and a plain float checkpoint is needed."
                )
            return torch.float32 if found == torch.float64 else found
    return torch.float32


def write_checkpoint(
    out: Path,
    source: Source,
    config: NviumConfig,
    plan: TensorPlan,
    dtype: torch.dtype,
    force: bool,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, configuration and companions to `out`, atomically.

    Raises:
        ConvertError: `out` may not be written (see `staged_folder`), or the disk is too full.
    """
    shapes = expected_shapes(config)
    missing = sorted(set(shapes) ^ set(plan))
    assert not missing, f"the plan and the configuration disagree about {missing}"
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    with staged_folder(out, force, size, source.folder) as stage:
        state: dict[str, torch.Tensor] = {}
        storages: set[int] = set()
        for name in tqdm(sorted(plan), desc="convert", unit=" tensors", disable=None):
            tensor = plan[name]()
            assert tuple(tensor.shape) == shapes[name], (name, tensor.shape, shapes[name])
            # Tensors made from one source tensor must not share memory: of those that do, the
            # library keeps one name only.
            tensor = tensor.to(dtype).contiguous()
            shared = tensor.untyped_storage().data_ptr() in storages
            state[name] = tensor.clone() if shared else tensor
            storages.add(state[name].untyped_storage().data_ptr())
        save_torch_state_dict(state, stage, max_shard_size=max_shard_size)
        source.copy_companions(stage)
        config.dtype = dtype
        config.save_pretrained(stage)


@contextmanager
def staged_folder(out: Path, force: bool, size: int, source: Path | None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    Args:
        force: replace a checkpoint that is already there.
        size: bytes that will be written.
        source: a folder that must survive.

    Raises:
        ConvertError: `out` is not free, would swallow the source, or there is no room for it.
    """
    out = Path(os.path.abspath(out))
    _check_target(out, force, source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and not in /tmp, because only a rename within a filesystem is atomic.
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ConvertError(f"{out} cannot be written ({error.strerror}).") from error
    try:
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise ConvertError(
                f"{out.parent} has {free / 1e9:.2f} GB free, and the checkpoint needs "
                f"{size / 1e9:.2f} GB."
            )
        yield stage
        stage.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would keep a server's user out
        _take_place(stage, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConvertError(f"{out} could not be written ({reason}).") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_target(out: Path, force: bool, source: Path | None) -> None:
    if source is not None:
        here, there = out.resolve(), source.resolve()
        if here == there or here in there.parents:
            raise ConvertError(f"{out} contains the checkpoint to convert, so choose another OUT.")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConvertError(f"{out} is a file, and OUT must be a folder.")
    if not any(out.iterdir()):
        return
    if not force:
        raise ConvertError(f"{out} is not empty; pass --force to replace it.")
    if not (out / "config.json").is_file():
        raise ConvertError(
            f"{out} is not empty and has no config.json, so --force does not replace it."
        )


def _take_place(stage: Path, out: Path) -> None:
    """Put `stage` at `out`. A folder cannot be renamed onto a full one, so that one steps aside."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(stage, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    os.replace(out, aside)
    try:
        os.replace(stage, out)
    except OSError:
        os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
