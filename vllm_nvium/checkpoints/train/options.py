# SPDX-License-Identifier: Apache-2.0
"""What `vllm-nvium train` can be told: one dataclass, from which the flags, the names of a YAML or
JSON file and the record of a run (which a resumed run is compared with) are all made.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_nvium.console import comma_separated
from vllm_nvium.errors import UserError

# Peak learning rates: new weights take large steps, a finished backbone small ones.
LEARNING_RATES = {"exits": 1e-3, "lora": 5e-4, "full": 5e-5, "scratch": 6e-4}
# Share of the steps that first fit every exit's head on its own; see `head_loss`.
HEAD_LOSS = {"exits": 0.3, "lora": 0.3, "full": 0.2, "scratch": 0.0}
# What may differ between a run and its continuation.
NOT_IN_THE_RECORD = ("resume", "save_every", "calibration_tokens", "distill_replicas")
# Counts and weights below these are refused.
SMALLEST = {
    "self_distill": 0, "distill_replicas": 1, "tokens": 0, "max_text_tokens": 0,
    "validation_tokens": 1, "block_size": 2, "batch_size": 1,
    "gradient_accumulation": 1, "weight_decay": 0, "beta": 0, "tolerance": 0,
    "lora_rank": 1, "fit_tokens": 0, "adapter_size": 0, "calibration_tokens": 0,
    "evaluate_every": 0, "save_every": 0,
}  # fmt: skip


def _json_object(text: str) -> dict[str, Any]:
    """An argparse type: names with values."""
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object of names with values"
        ) from None


def _option(default: Any, text: str, **flag: Any) -> Any:
    """A field whose metadata is what `FlagParser.add_argument` is given."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": text, **flag})
    shown = " (default: %(default)s)" if default else ""
    return field(default=default, metadata={"help": text + shown, **flag})


@dataclass(frozen=True)
class TrainOptions:
    """All options of a run; names are those of the flags with underscores."""

    model: str = _option(
        "",
        "dense checkpoint to start from (folder, hub id, .gguf) or an N-vium one (folder); with "
        "--method scratch a config.json, of an N-vium model or of a dense one (a twin)",
    )
    out: str = _option("", "folder of the run; makes exits/ and model/ in it")
    text: list[str] = _option(
        [],
        "training text: files, folders, .jsonl, or names of the datasets library",
    )
    validation: list[str] = _option(
        [],
        "never trained on; the mixture is held at the parent's loss on each of them",
    )
    method: Literal["exits", "lora", "full", "scratch"] = _option(
        "exits",
        "what learns: the exits; lora: and low-rank changes of the backbone, merged at the end; "
        "full: everything; scratch: from random weights",
    )
    exit_layers: list[int] = _option(
        [],
        "of a dense start: layers already run at each early exit (default: evenly spaced)",
        reads=comma_separated(int),
        metavar="L1,L2,...",
    )
    tokenizer: str = _option("", "with --method scratch: folder or hub id of the tokenizer")
    dense: str = _option(
        "",
        "dense parent of an N-vium start, for --controller parent and --self-distill (a dense "
        "start is its own parent)",
    )
    self_distill: int = _option(
        0, "sample so many tokens from the dense parent (a folder) and train on them too"
    )
    prompts: list[str] = _option([], "files of prompts for --self-distill")
    distill_replicas: int = _option(1, "engines that sample for --self-distill")
    tokens: int = _option(0, "training tokens in all (default: one pass over the text)")
    max_text_tokens: int = _option(0, "use no more tokens of the text than this (default: all)")
    validation_tokens: int = _option(32768, "use no more of the validation texts in all")
    calibration_tokens: int = _option(
        32768,
        "with --controller parent: after training, shift all hazards by one number so that the "
        "mixture is as good as the parent on so much of the validation texts in all; 0: do not",
    )
    block_size: int = _option(512, "context length in training, tokens")
    batch_size: int = _option(8, "blocks per pass")
    gradient_accumulation: int = _option(1, "passes per step")
    learning_rate: float | None = _option(
        None, f"peak, then a cosine to a tenth (default: {LEARNING_RATES})"
    )
    weight_decay: float = _option(0.1, "of AdamW (betas .9, .95)")
    beta: float = _option(0.15, "weight of the compute penalty, or its start with a controller")
    controller: str = _option(
        "",
        "what steers beta: 'parent' (the dense parent's loss on the validation text), 'off', or "
        "the history.jsonl of a dense twin (default: parent for a retrofit, else off)",
    )
    tolerance: float = _option(
        0.0,
        "how much worse than the dense model the controller lets the mixture be, nats per token",
    )
    hazard_warm_up: float = _option(
        0.05, "share of the steps in which hazards are pulled to equal exit weights"
    )
    head_loss: float | None = _option(
        None,
        "share of the steps in which every exit's own cross entropy is added, before the paper's "
        f"loss alone: a retrofit's exits start knowing nothing (default: {HEAD_LOSS})",
    )
    fit_tokens: int = _option(
        40000,
        "start the exits of a retrofit at a linear map fitted on so many tokens; 0: do not",
    )
    adapter_size: int = _option(
        0, "of a dense start: inner width of the adapters (default: the hidden size)"
    )
    lora_rank: int = _option(16, "with --method lora")
    dtype: Literal["bfloat16", "float32"] = _option(
        "bfloat16",
        "of the arithmetic; weights in training are float32 where they are trained",
    )
    evaluate_every: int = _option(0, "steps (default: 5 %% of them, as in the paper)")
    save_every: int = _option(0, "steps (default: 5 %% of them)")
    seed: int = _option(0, "of weights, data order and sampled text")
    resume: bool = _option(False, "go on with the run in --out")
    trainer: dict[str, Any] = _option(
        {},
        "further TrainingArguments: names with values in a --config file, JSON as a flag",
        reads=_json_object,
        metavar="JSON",
    )

    @property
    def peak_learning_rate(self) -> float:
        given = self.learning_rate
        return LEARNING_RATES[self.method] if given is None else given

    @property
    def head_loss_share(self) -> float:
        return HEAD_LOSS[self.method] if self.head_loss is None else self.head_loss

    def record(self) -> dict[str, Any]:
        """What a continuation of this run must agree with."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in NOT_IN_THE_RECORD}


def check(options: TrainOptions) -> None:
    """Refuses what no run can use; types and choices were checked when the flags were read.

    Raises:
        UserError: an option is missing, out of range, or means nothing beside `--method`.
    """
    _check_presence(options)
    _check_ranges(options)
    if options.method == "scratch":
        _check_scratch(options)
    elif options.tokenizer:
        raise UserError(
            f"--tokenizer is {options.tokenizer!r}, and a retrofit keeps its model's tokenizer: "
            "leave it out."
        )


def flag_of(name: str) -> str:
    """How an option is spelled on the command line."""
    return "--" + name.replace("_", "-")


def _check_presence(options: TrainOptions) -> None:
    for name in ("model", "out", "text", "validation"):
        if getattr(options, name) or (name == "text" and options.self_distill):
            continue
        raise UserError(
            f"{'MODEL' if name == 'model' else flag_of(name)} is missing, and a run needs it."
        )


def _check_ranges(options: TrainOptions) -> None:
    for name, bound in SMALLEST.items():
        if (value := getattr(options, name)) < bound:
            raise UserError(f"{flag_of(name)} is {value}, and it must be at least {bound}.")
    if options.distill_replicas > 1 and not options.self_distill:
        raise UserError(
            f"--distill-replicas is {options.distill_replicas}, but nothing is sampled: add "
            "--self-distill, or leave it out."
        )
    if not options.peak_learning_rate > 0:
        raise UserError(
            f"--learning-rate is {options.learning_rate}, and it must be greater than 0."
        )
    shares = {"hazard_warm_up": options.hazard_warm_up, "head_loss": options.head_loss_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{flag_of(name)} is {share}, and a share lies in 0..1.")


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
