# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint tensor by tensor, and writing one so that it is there as a whole or not at
all. Both kinds of conversion go through here and differ only in the tensors they ask for.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from tqdm import tqdm

from vllm_nvium.checkpoints.inputs import refusing
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import staged_folder
from vllm_nvium.model_executor.models.checkpoint_layout import (
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
    "tekken.json",
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
        load_config: the configuration as transformers reads it (rope settings in one form).
        path: the folder or file that it is in.
    """

    name: str
    config: dict[str, Any]
    shapes: Mapping[str, Shape]
    load: Callable[[str], torch.Tensor]
    copy_companions: Callable[[Path], None]
    load_config: Callable[[], Any]
    path: Path

    @property
    def folder(self) -> Path | None:
        """None for a file."""
        return self.path if self.path.is_dir() else None


def open_folder(folder: Path, name: str) -> Source:
    """Open a Hugging Face folder: one or several `.safetensors` files."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{name} has no config.json, so it is not a Hugging Face checkpoint.")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError(f"{config_file} is not valid JSON ({first_line(error)}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{config_file} holds {type(config).__name__}, not an object of fields.")
    shapes, load = _open_weights(folder, name)

    def load_config() -> Any:
        from transformers import AutoConfig

        with refusing(f"transformers cannot read {config_file}"):
            return AutoConfig.from_pretrained(folder)

    return Source(
        name=name,
        config=config,
        shapes=shapes,
        load=load,
        copy_companions=lambda out: copy_companions(folder, out),
        load_config=load_config,
        path=folder,
    )


def _open_weights(
    folder: Path, name: str
) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    files = _safetensors_files(folder)
    if not files:
        raise UserError(f"{name} has no weights: there is no .safetensors file in it.")
    shapes: dict[str, Shape] = {}
    where: dict[str, Path] = {}
    for file in files:
        found = read_shapes(file)
        shapes.update(found)
        where.update(dict.fromkeys(found, file))

    @cache
    def opened(file: Path) -> Any:
        return safe_open(file, framework="pt")

    return shapes, lambda tensor: opened(where[tensor]).get_tensor(tensor)


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that the index names, else `model.safetensors`, else every `.safetensors` file."""
    indexed = indexed_files(folder)
    if indexed is not None:
        return indexed
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def copy_companions(folder: Path, out: Path) -> None:
    """Copy what a server needs beside weights and configuration (see `COMPANIONS`)."""
    for pattern in COMPANIONS:
        for path in folder.glob(pattern):
            target = out / path.name
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)


def check_tensors(
    source: Source, wanted: Mapping[str, Shape], who_has: str, may_have: Sequence[str] = ()
) -> None:
    """Compare the tensors of a source with those that are wanted of it.

    Args:
        who_has: beginning of "... no place for it", for messages.
        may_have: names that are passed over.
    """
    for name, shape in wanted.items():
        got = source.shapes.get(name)
        if got is None:
            raise UserError(f"{source.name} has no tensor {name}, expected of shape {list(shape)}.")
        if tuple(got) != tuple(shape):
            raise UserError(
                f"{name} in {source.name} has shape {list(got)}, and {list(shape)} is expected."
            )
    for name in sorted(set(source.shapes) - set(wanted) - set(may_have)):
        if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints store the frequencies
            raise UserError(f"{source.name} has a tensor {name}, for which {who_has} no place.")


def source_dtype(source: Source, dtype: str) -> torch.dtype:
    """The dtype to write: the one asked for, or for `"auto"` that of the source's embeddings."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    for name in source.shapes:
        if name.endswith("embed_tokens.weight"):
            found = source.load(name).dtype
            if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise UserError(
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
    sources: Sequence[Path] = (),
) -> None:
    """Write weights, configuration and companions to `out`, atomically.

    Args:
        sources: what is read besides the source.

    Raises:
        UserError: `out` may not be written (see `staged_folder`), or the disk is too full.
    """
    shapes = expected_shapes(config)
    missing = sorted(set(shapes) ^ set(plan))
    assert not missing, f"the plan and the configuration disagree about {missing}"
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    with staged_folder(out, force, size, [source.path, *sources]) as stage:
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
        config.dtype = config.parent.dtype = dtype
        config.save_pretrained(stage)
