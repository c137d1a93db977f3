# SPDX-License-Identifier: Apache-2.0
"""What a run starts from and what it leaves behind: a dense model with fresh exits, which of its
weights are trained, and afterwards the folder of trained exits and the finished checkpoint.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.core_model_loading import revert_weight_conversion

from vllm_nvium.checkpoints.convert import convert, open_source
from vllm_nvium.checkpoints.convert.checkpoint import (
    Source,
    TensorPlan,
    open_folder,
    source_dtype,
    write_checkpoint,
)
from vllm_nvium.checkpoints.convert.dense import CERTAIN
from vllm_nvium.checkpoints.convert.exits import OWN, fingerprint, write_exits
from vllm_nvium.checkpoints.convert.options import DenseOptions
from vllm_nvium.checkpoints.inputs import (
    attention_for,
    check_parent,
    check_tokenizers_agree,
    load_tokenizer,
    open_model,
    open_parent,
    refusing,
)
from vllm_nvium.checkpoints.train.options import TrainOptions, flag_of
from vllm_nvium.errors import UserError
from vllm_nvium.files import staged_folder
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import (
    NviumForCausalLM,
    register_with_transformers,
)

START = "start"
# The matrices that --method lora changes: only layers of the backbone have these names.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A change of the backbone is `LORA_SCALE * B A`, whatever its rank.
LORA_SCALE = 2
# peft's names around those of the model it wraps.
LORA_PREFIX = "base_model.model."


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        model: the reference model, or with `--method scratch` perhaps a dense one.
        tokenizer: of the model.
        is_dense: a dense twin is trained: no exits, no penalty.
        has_parent: the start computes what a dense parent does, so its loss is the parent's.
        folder: checkpoint that `model` was loaded from; None with `--method scratch`.
    """

    model: PreTrainedModel
    tokenizer: Any
    is_dense: bool
    has_parent: bool
    folder: Path | None


def open_start(options: TrainOptions, out: Path) -> Start:
    """Loads, or first makes, what the run starts from.

    Args:
        out: folder of the run; a converted dense start is kept in it.
    """
    register_with_transformers()
    if options.method == "scratch":
        return _from_scratch(options)
    folder = Path(options.model).expanduser()
    if _model_type(folder) == NviumConfig.model_type:
        for name in ("exit_layers", "adapter_size"):
            if value := getattr(options, name):
                raise UserError(
                    f"{flag_of(name)} is {value}, and {options.model} has its exits already: leave "
                    "it out."
                )
        config = open_model(folder)
        if options.dense:
            check_parent(options.dense, config, open_parent(options.dense), options.block_size)
            check_tokenizers_agree(options.dense, load_tokenizer(str(folder), "MODEL"))
        has_parent = False
    else:
        if options.dense:
            raise UserError(
                f"--dense is {options.dense!r}, and {options.model} is dense itself: leave it out."
            )
        converted = out / START
        if not (converted / "config.json").is_file():
            exits = DenseOptions(
                exit_layers=options.exit_layers or None,
                adapter_size=options.adapter_size or None,
                seed=options.seed,
            )
            convert(options.model, converted, exits)
        folder, has_parent = converted, True
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    model = NviumForCausalLM.from_pretrained(folder, dtype=dtype)
    return Start(model, load_tokenizer(str(folder), "MODEL"), False, has_parent, folder)


def _from_scratch(options: TrainOptions) -> Start:
    path = Path(options.model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    with refusing(
        f"MODEL is {options.model!r}, and --method scratch needs the config.json of a model"
    ):
        config = AutoConfig.for_model(**json.loads(path.read_text()))
    set_seed(options.seed)
    with refusing(f"MODEL is {options.model!r}, which transformers makes no language model of"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, **attention_for(config)
        )
    is_dense = not isinstance(config, NviumConfig)
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    return Start(model, tokenizer, is_dense, False, None)


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def warm_up_margins(num_exits: int) -> list[float]:
    """Margins whose hazards are `1 / (N - k + 1)`, so that every exit has weight `1 / N`."""
    return [-math.log(num_exits - k) for k in range(num_exits)]


@torch.no_grad()
def open_routers(model: NviumForCausalLM) -> None:
    """Lets routers that a conversion closed learn again.

    A hazard of exactly 0 or 1 has no gradient, so such routers start where the hazard warm-up leads
    to: equal weight on every exit.
    """
    for exit_, margin in zip(model.exits, warm_up_margins(len(model.exits)), strict=True):
        head = exit_.router.head
        if not head.weight.any() and float((head.bias[1] - head.bias[0]).abs()) >= 0.9 * CERTAIN:
            head.bias.copy_(torch.tensor([0.0, margin]))


def planned_bytes(start: Start, options: TrainOptions) -> int:
    """What a run writes in all: its checkpoints and the finished model.

    A checkpoint is float32 weights and AdamW's two moments of what is trained. Two are kept, and
    the next is complete before the oldest goes.
    """
    trained = 0
    for name, parameter in start.model.named_parameters():
        if options.method in ("full", "scratch") or name.startswith(OWN):
            trained += parameter.numel()
        elif options.method == "lora" and ".layers." in name and parameter.ndim == 2:
            trained += options.lora_rank * sum(parameter.shape)
    finished = 2 * sum(parameter.numel() for parameter in start.model.parameters())
    if start.folder is not None:
        # Written in the start's own dtype.
        finished = sum(file.stat().st_size for file in start.folder.glob("*.safetensors"))
    return 3 * 12 * trained + finished


def choose_trainable(model: PreTrainedModel, options: TrainOptions) -> nn.Module:
    """Freezes what is not trained; what is becomes float32, whatever the rest is in.

    Returns:
        the model to train: with `--method lora` peft's wrapper, which shares its weights.
    """
    trained: nn.Module = model
    if options.method in ("full", "scratch"):
        return model.float().requires_grad_(True)
    model.requires_grad_(False)
    if options.method == "lora":
        from peft import LoraConfig, get_peft_model

        set_seed(options.seed)
        trained = get_peft_model(
            model,
            LoraConfig(
                r=options.lora_rank,
                lora_alpha=LORA_SCALE * options.lora_rank,
                target_modules=LORA_TARGETS,
            ),
        )
    for name, parameter in model.named_parameters():
        if name.startswith(OWN):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return trained


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def trained_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of `convert/exits.py` for a state of `--method exits` or `lora`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix(LORA_PREFIX)
        for ours, theirs in (("A", ".lora_A.default.weight"), ("B", ".lora_B.default.weight")):
            if plain.endswith(theirs):
                plain = f"lora.{plain.removesuffix(theirs)}.weight.{ours}"
        tensors[plain] = tensor.cpu()
    return tensors


def finish(
    start: Start, trained: nn.Module, options: TrainOptions, out: Path, record: Mapping[str, Any]
) -> None:
    """Writes `out/exits` (when there is something smaller than the model) and `out/model`.

    The checkpoint of a dense start is made from parent and exits by the converter, so what is
    served is what `vllm-nvium convert PARENT OUT --exits FOLDER` gives. That of another start has
    the start's dtype, and its weights wherever none were trained. From scratch it is bfloat16.
    """
    model_folder = out / "model"
    if start.folder is None:
        model = start.model.to(torch.bfloat16)
        model.config.get_text_config().dtype = torch.bfloat16
        size = sum(parameter.nbytes for parameter in model.parameters())
        with staged_folder(model_folder, True, size) as stage:
            model.save_pretrained(stage)
            start.tokenizer.save_pretrained(stage)
        return
    state = trainable_state(trained)
    if start.has_parent and options.method in ("exits", "lora"):
        tensors = {name: t.to(torch.bfloat16) for name, t in trained_tensors(state).items()}
        source = open_source(options.model)
        record = {
            "parent": Path(options.model).name,
            "parent_fingerprint": fingerprint(source),
            **record,
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        with staged_folder(out / "exits", True, size) as stage:
            write_exits(stage, start.model.config, tensors, LORA_SCALE, record)
        convert(options.model, model_folder, exits=out / "exits", force=True)
        return
    if options.method == "full":
        state = revert_weight_conversion(start.model, state)  # names as in a folder
    source = open_folder(start.folder, options.model)
    config = start.model.config
    plan = _plan(source, expected_shapes(config), trained_tensors(state))
    write_checkpoint(model_folder, source, config, plan, source_dtype(source, "auto"), force=True)


def _plan(source: Source, names: Iterable[str], trained: Mapping[str, torch.Tensor]) -> TensorPlan:
    """How to make each tensor of an N-vium model from those of its start."""

    def merged(name: str) -> torch.Tensor:
        down, up = trained[f"lora.{name}.A"], trained[f"lora.{name}.B"]
        return source.load(name).float() + LORA_SCALE * (up @ down)

    tensors: TensorPlan = {}
    for name in names:
        if name in trained:
            # Experts may be views of one tensor, which safetensors does not take.
            tensors[name] = trained[name].clone
        else:
            tensors[name] = partial(merged if f"lora.{name}.A" in trained else source.load, name)
    return tensors
