# SPDX-License-Identifier: Apache-2.0
"""What `vllm-nvium train` can be told: one class, from which the flags, the names of a YAML or JSON
file and the record of a run (which a resumed run is compared with) are all made.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vllm_nvium.checkpoints.options import (
    Integers,
    JsonObject,
    Options,
    Words,
    flag_of,
    option,
)
from vllm_nvium.errors import UserError, first_line

# Peak learning rates: new weights take large steps, a finished backbone small ones.
LEARNING_RATES = {"exits": 1e-3, "lora": 5e-4, "full": 5e-5, "scratch": 6e-4}
# Share of the steps that first fit every exit's head on its own; see `head_loss`.
HEAD_LOSS = {"exits": 0.3, "lora": 0.3, "full": 0.2, "scratch": 0.0}
# What may differ between a run and its continuation.
NOT_IN_THE_RECORD = {"resume", "save_every", "calibration_tokens", "distill_replicas"}
# Fields of TrainingArguments that other options say: schedules and --resume go by those.
NOT_FOR_TRAINER = {
    "output_dir": "out",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "save_steps": "save_every",
    "resume_from_checkpoint": "resume",
    "seed": "seed",
    "data_seed": "seed",
}


class TrainOptions(Options):
    """All options of a run; names are those of the flags with underscores."""

    model: str = option(
        "",
        "dense checkpoint to start from (folder, hub id, .gguf) or an N-vium one (folder); with "
        "--method scratch a config.json, of an N-vium model or of a dense one (a twin)",
    )
    out: str = option("", "folder of the run; makes exits/ and model/ in it")
    text: Words = option(
        [], "training text: files, folders, .jsonl, or names of the datasets library"
    )
    validation: Words = option(
        [],
        "not trained on (of data sets the validation split, or NAME:CONFIG:SPLIT); the parent's "
        "loss on each is held",
    )
    method: Literal["exits", "lora", "full", "scratch"] = option(
        "exits",
        "what learns: the exits; lora: and low-rank changes of the backbone, merged at the end; "
        "full: everything; scratch: from random weights",
    )
    exit_layers: Integers = option(
        [],
        "of a dense start: layers already run at each early exit (default: evenly spaced)",
        "L1,L2,...",
    )
    tokenizer: str = option("", "with --method scratch: folder or hub id of the tokenizer")
    dense: str = option(
        "",
        "dense parent of an N-vium start, for --controller parent and --self-distill (a dense "
        "start is its own parent)",
    )
    self_distill: int = option(
        0, "sample so many tokens from the dense parent (a folder) and train on them too", ge=0
    )
    prompts: Words = option([], "files of prompts for --self-distill")
    distill_replicas: int = option(1, "engines that sample for --self-distill", ge=1)
    tokens: int = option(0, "training tokens in all (default: one pass over the text)", ge=0)
    max_text_tokens: int = option(
        0, "use no more tokens of the text than this (default: all)", ge=0
    )
    validation_tokens: int = option(32768, "use no more of the validation texts in all", ge=1)
    calibration_tokens: int = option(
        32768,
        "with --controller parent: after training, shift all hazards by one number so that the "
        "mixture is as good as the parent on so much of the validation texts in all; 0: do not",
        ge=0,
    )
    block_size: int = option(512, "context length in training, tokens", ge=2)
    batch_size: int = option(8, "blocks per pass", ge=1)
    gradient_accumulation: int = option(1, "passes per step", ge=1)
    learning_rate: Annotated[float, Field(gt=0)] | None = option(
        None, f"peak, then a cosine to a tenth (default: {LEARNING_RATES})"
    )
    weight_decay: float = option(0.1, "of AdamW (betas .9, .95)", ge=0)
    beta: float = option(
        0.15, "weight of the compute penalty, or its start with a controller", ge=0
    )
    controller: str = option(
        "",
        "what steers beta: 'parent' (the dense parent's loss on the validation text), 'off', or "
        "the history.jsonl of a dense twin (default: parent for a retrofit, else off)",
    )
    tolerance: float = option(
        0.0,
        "how much worse than the dense model the controller lets the mixture be, nats per token",
        ge=0,
    )
    hazard_warm_up: float = option(
        0.05, "share of the steps in which hazards are pulled to equal exit weights", ge=0, le=1
    )
    head_loss: Annotated[float, Field(ge=0, le=1)] | None = option(
        None,
        "share of the steps in which every exit's own cross entropy is added, before the paper's "
        f"loss alone: a retrofit's exits start knowing nothing (default: {HEAD_LOSS})",
    )
    fit_tokens: int = option(
        40000,
        "start the exits of a retrofit at a linear map fitted on so many tokens; 0: do not",
        ge=0,
    )
    adapter_size: int = option(
        0, "of a dense start: inner width of the adapters (default: the hidden size)", ge=0
    )
    lora_rank: int = option(16, "with --method lora", ge=1)
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "of the arithmetic; weights in training are float32 where they are trained"
    )
    evaluate_every: int = option(0, "steps (default: 5 % of them, as in the paper)", ge=0)
    save_every: int = option(0, "steps (default: 5 % of them)", ge=0)
    seed: int = option(0, "of weights, data order and sampled text", ge=0, le=2**32 - 1)
    resume: bool = option(False, "go on with the run in --out")
    trainer: JsonObject = option(
        {},
        "further TrainingArguments: names with values in a --config file, JSON as a flag",
        "JSON",
    )

    @field_validator("trainer")
    @classmethod
    def _has_only_further_fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given.keys() & NOT_FOR_TRAINER.keys():
            raise ValueError(f"{name} is what {flag_of(NOT_FOR_TRAINER[name])} is for")
        return given

    @property
    def peak_learning_rate(self) -> float:
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def head_loss_share(self) -> float:
        return HEAD_LOSS[self.method] if self.head_loss is None else self.head_loss

    def record(self) -> dict[str, Any]:
        """What a continuation of this run must agree with."""
        return self.model_dump(exclude=NOT_IN_THE_RECORD)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML or JSON file."""
    import yaml

    try:
        text = path.read_text()
        if path.suffix == ".json":
            text = yaml.safe_dump(json.loads(text))
        # To YAML `off` is false and `1e-3` a word: only the options know what they should be.
        plain, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: it cannot be read ({first_line(error)}).") from error
    if not isinstance(plain, dict) or not isinstance(typed, dict):
        raise UserError(f"--config {path}: it holds no options by name.")
    if len(plain) != len(typed):
        raise UserError(f"--config {path}: YAML reads names of it in another way: quote them.")
    found = {}
    # A name may be such a word, too.
    for (name, value), meant in zip(plain.items(), typed.values(), strict=True):
        if meant is None:
            raise UserError(
                f"--config {path}: {flag_of(name)} has no value: give one, or leave the option out."
            )
        found[name.replace("-", "_")] = meant if name == "trainer" else value
    try:
        TrainOptions(**found)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    return found


def check(options: TrainOptions) -> None:
    """Refuses options that are missing, or mean nothing beside others."""
    for name in ("model", "out", "text", "validation"):
        if getattr(options, name) or (name == "text" and options.self_distill):
            continue
        raise UserError(
            f"{'MODEL' if name == 'model' else flag_of(name)} is missing, and a run needs it."
        )
    if options.distill_replicas > 1 and not options.self_distill:
        raise UserError(
            f"--distill-replicas is {options.distill_replicas}, but nothing is sampled: add "
            "--self-distill, or leave it out."
        )
    if options.prompts and not options.self_distill:
        raise UserError(
            f"--prompts is {options.prompts}, but nothing is sampled: add --self-distill, or leave "
            "it out."
        )
    if options.method == "scratch":
        _check_scratch(options)
    elif options.tokenizer:
        raise UserError(
            f"--tokenizer is {options.tokenizer!r}, and a retrofit keeps its model's tokenizer: "
            "leave it out."
        )


def _check_scratch(options: TrainOptions) -> None:
    for name in ("exit_layers", "adapter_size"):
        if value := getattr(options, name):
            raise UserError(
                f"{flag_of(name)} is {value}, and --method scratch takes the exits that the "
                "config.json describes: leave it out."
            )
    if not options.tokenizer:
        raise UserError("--tokenizer is missing, and --method scratch needs one.")
    if options.self_distill:
        raise UserError(
            "--self-distill needs a dense parent to sample from, and --method scratch has none."
        )
    if options.controller == "parent":
        raise UserError(
            "--controller is 'parent', and --method scratch has no parent: give the history.jsonl "
            "of a dense twin, or 'off'."
        )
    if options.dense:
        raise UserError(
            f"--dense is {options.dense!r}, and --method scratch has no parent: leave it out."
        )
