# SPDX-License-Identifier: Apache-2.0
"""Which tensors an N-vium checkpoint holds, how large each is, and whether a folder agrees.

Only the headers of the weight files are read, so a mistake is found before an engine starts.
Conversion writes by the same list. A size is kept with the configuration field it comes from: that
field, or the file, is what has to be corrected when the two disagree.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_MAPPING
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.parent import head_dim_of

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"


class Dim(NamedTuple):
    """One size of a tensor, and the fields that make it so, for messages."""

    size: int
    why: str


# What the dimensions of the parent's tensors are called: the first pattern that fits the name.
QUERY, KEY = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
EXPERT = "moe_intermediate_size"
_WHY = (
    (r"embed_tokens\.", ("vocab_size", "hidden_size")),
    (r"q_proj\.", (QUERY, "hidden_size")),
    (r"[kv]_proj\.", (KEY, "hidden_size")),
    (r"o_proj\.", ("hidden_size", QUERY)),
    (r"experts\.\d+\.(gate|up)_proj\.", (EXPERT, "hidden_size")),
    (r"experts\.\d+\.down_proj\.", ("hidden_size", EXPERT)),
    (r"mlp\.gate\.", ("num_experts", "hidden_size")),
    (r"(gate|up)_proj\.", ("intermediate_size", "hidden_size")),
    (r"down_proj\.", ("hidden_size", "intermediate_size")),
    (r"[qk]_norm\.", ("head_dim",)),
    (r"norm\.", ("hidden_size",)),
)


def _parent_dims(config: NviumConfig) -> dict[str, tuple[Dim, ...]]:
    """The tensors of the parent's layers, embedding and final norm, as its class in transformers
    saves them: experts one by one, although a model has those of a layer in one tensor."""
    parent = config.parent
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_experts", EXPERT)
    sizes = {name: getattr(parent, name) for name in fields if hasattr(parent, name)}
    sizes["head_dim"] = head_dim_of(parent)
    why = {name: f"{name} = {size}" for name, size in sizes.items()}
    for product in (QUERY, KEY):
        why[product] = f"{product} = {getattr(parent, product.split()[0])} * {head_dim_of(parent)}"
    with torch.device("meta"), init.no_init_weights():
        model = MODEL_MAPPING[type(parent)](parent)
        state = revert_weight_conversion(model, model.state_dict())
    dims: dict[str, tuple[Dim, ...]] = {}
    for name, tensor in state.items():
        names = next((names for pattern, names in _WHY if re.search(pattern, name)), ())
        reasons = [why[name] for name in names] + [f"of a {parent.model_type}"] * tensor.dim()
        dims[f"model.{name}"] = tuple(
            Dim(size, reason) for size, reason in zip(tensor.shape, reasons, strict=False)
        )
    return dims


def expected_dims(config: NviumConfig) -> dict[str, tuple[Dim, ...]]:
    """Every tensor that an N-vium checkpoint of this configuration holds, in the model's order."""

    def field(name: str) -> Dim:
        return Dim(getattr(config, name), f"{name} = {getattr(config, name)}")

    hidden, vocabulary = field("hidden_size"), field("vocab_size")
    dims = _parent_dims(config)

    def linear(name: str, size_out: Dim, size_in: Dim, bias: bool) -> None:
        dims[f"{name}.weight"] = (size_out, size_in)
        if bias:
            dims[f"{name}.bias"] = (size_out,)

    def adapter(name: str, size: Dim) -> None:
        if size.size:
            linear(f"{name}.fc1", size, hidden, False)
            linear(f"{name}.fc2", hidden, size, False)

    router_inner, router_hidden = field("router_intermediate_size"), field("router_hidden_size")
    two = Dim(2, "two logits per router")
    for k in range(len(config.exit_layers)):
        dims[f"exits.{k}.norm.weight"] = (hidden,)
        adapter(f"exits.{k}.adapter", field("exit_adapter_size"))
        for block in range(config.router_num_blocks):
            name = f"exits.{k}.router.blocks.{block}"
            linear(f"{name}.fc1", router_inner, router_hidden if block else hidden, True)
            linear(f"{name}.fc2", router_hidden, router_inner, True)
        dims[f"exits.{k}.router.norm.weight"] = (router_hidden,)
        linear(f"exits.{k}.router.head", two, router_hidden, True)
        if config.exit_head == "own":
            dims[f"exits.{k}.lm_head.weight"] = (vocabulary, hidden)
    adapter("final_adapter", field("final_adapter_size"))
    if not config.tie_word_embeddings:
        dims["lm_head.weight"] = (vocabulary, hidden)
    return dims


def expected_shapes(config: NviumConfig) -> dict[str, Shape]:
    """Every tensor that an N-vium checkpoint of this configuration holds, and its shape."""
    return {name: tuple(dim.size for dim in dims) for name, dims in expected_dims(config).items()}


def indexed_files(folder: Path) -> list[Path] | None:
    """The weight files that the folder's index names, or None when it has no index.

    Raises:
        UserError: the index is not one, or names a file that is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a valid index of weight files.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names {missing[0]}, which is not in the folder.")
    return files


def read_shapes(file: Path) -> dict[str, Shape]:
    """The shape of every tensor in a `.safetensors` file; its data is not touched.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            return {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}).") from error


def check_files(config: NviumConfig, files: Iterable[Path]) -> None:
    """Refuse weight files that do not hold what the configuration asks for.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model.
    """
    found: dict[str, Shape] = {}
    where: dict[str, Path] = {}
    for file in files:
        shapes = read_shapes(file)
        found.update(shapes)
        where.update(dict.fromkeys(shapes, file))
    expected = expected_dims(config)
    _check_shapes(expected, found, where)
    folder = next(iter(where.values())).parent if where else "The checkpoint"
    missing = [name for name in expected if name not in found]
    if missing:
        name = missing[0]
        shape = [dim.size for dim in expected[name]]
        raise UserError(
            f"{folder} has no tensor {name}{_others(missing)}, but config.json asks for one of "
            f"shape {shape} ({_governed_by(config, name)}); {_REMEDY}"
        )
    unexpected = [name for name in found if name not in expected and not _is_ignored(config, name)]
    if unexpected:
        name = unexpected[0]
        raise UserError(
            f"{where[name]} has a tensor {name}{_others(unexpected)} of shape "
            f"{list(found[name])}, but config.json has no place for one "
            f"({_governed_by(config, name)}); {_REMEDY}"
        )


_REMEDY = "correct config.json or convert the checkpoint again."


def _check_shapes(
    expected: Mapping[str, tuple[Dim, ...]],
    found: Mapping[str, Shape],
    where: Mapping[str, Path],
) -> None:
    wrong = [
        name
        for name, dims in expected.items()
        if name in found and found[name] != tuple(dim.size for dim in dims)
    ]
    if not wrong:
        return
    name = wrong[0]
    dims, shape = expected[name], found[name]
    disagree = [
        dim.why for i, dim in enumerate(dims) if len(dims) != len(shape) or dim.size != shape[i]
    ]
    raise UserError(
        f"{name}{_others(wrong)} in {where[name]} has shape {list(shape)}, but config.json asks "
        f"for {[dim.size for dim in dims]} ({', '.join(disagree)}); {_REMEDY}"
    )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _is_ignored(config: NviumConfig, name: str) -> bool:
    """Old checkpoints store the rotary frequencies, and tied ones may repeat the embeddings."""
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


# Which field decides whether a tensor is there at all: the first pattern that fits its name, if the
# configuration has the field; otherwise it is the parent's family.
_FIELDS = (
    (r"model\.layers\.\d+\.self_attn\.\w+\.bias", "attention_bias"),
    (r"model\.layers\.\d+\.mlp\.\w+\.bias", "mlp_bias"),
    (r"model\.layers\.\d+\.mlp\.", "mlp_only_layers"),
    (r"exits\.\d+\.adapter\.", "exit_adapter_size"),
    (r"exits\.\d+\.router\.blocks\.", "router_num_blocks"),
    (r"exits\.\d+\.lm_head\.", "exit_head"),
    (r"exits\.", "exit_layers"),
    (r"final_adapter\.", "final_adapter_size"),
    (r"lm_head\.", "tie_word_embeddings"),
)


def _governed_by(config: NviumConfig, name: str) -> str:
    parent = config.parent
    fields = [field for pattern, field in _FIELDS if re.match(pattern, name)]
    # A layer or exit that should not be there at all is not a matter of its parts.
    number = re.match(r"(?:model\.layers|exits)\.(\d+)\.", name)
    if number and name.startswith("exits.") and int(number[1]) >= len(config.exit_layers):
        fields = ["exit_layers"]
    if number and name.startswith("model.") and int(number[1]) >= config.num_hidden_layers:
        fields = ["num_hidden_layers"]
    for field in fields:
        for holder in (config, parent):
            if hasattr(holder, field):
                return f"{field} = {getattr(holder, field)!r}"
    return (
        f"text_config.model_type = {parent.model_type!r}, "
        f"num_hidden_layers = {config.num_hidden_layers}"
    )
