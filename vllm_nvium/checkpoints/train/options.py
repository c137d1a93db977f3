# SPDX-License-Identifier: Apache-2.0
"""What `vllm-nvium train` can be told: one dataclass that the flags, a YAML or JSON file and the
record of a run (which a resumed run is held against) are all made from.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_nvium.checkpoints.convert.command import comma_separated
from vllm_nvium.errors import UserError

METHODS = ("exits", "lora", "full", "scratch")
# Peak learning rates: new weights take large steps, a finished backbone small ones.
LEARNING_RATES = {"exits": 1e-3, "lora": 5e-4, "full": 5e-5, "scratch": 6e-4}
# Share of the steps that first fit every exit's head on its own; see `head_loss`.
HEAD_LOSS = {"exits": 0.3, "lora": 0.3, "full": 0.2, "scratch": 0.0}
DTYPES = ("bfloat16", "float32")
# What may differ between a run and its continuation.
NOT_IN_THE_RECORD = ("resume", "save_every", "calibration_tokens")


def _option(default: Any, text: str, *, many: bool = False, kind: type = str, **more: Any) -> Any:
    metadata = {"help": text, "many": many, "kind": kind} | more
    if many:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """All options of a run; names are those of the flags with underscores."""

    model: str = _option(
        "",
        "dense checkpoint to start from (folder, hub id, .gguf) or an N-vium one (folder); with "
        "--method scratch a config.json, of an N-vium model or of a dense one (a twin)",
    )
    out: str = _option("", "folder of the run: checkpoints, history.jsonl, exits/ and model/")
    text: list[str] = _option(
        [],
        "training text: files, folders, .jsonl, or names of the datasets library",
        many=True,
    )
    validation: list[str] = _option(
        [],
        "validation texts, never trained on; with --controller the mixture is held at the parent's "
        "loss on each of them",
        many=True,
    )
    method: str = _option(
        "exits",
        "exits: the backbone stays as it is; lora: and low-rank changes of the backbone, merged at "
        "the end; full: everything; scratch: from random weights, the paper's recipe",
        choices=METHODS,
    )
    exit_layers: list[int] = _option(
        [],
        "of a dense start: layers already run at each early exit (default: evenly spaced)",
        many=True,
        kind=int,
        comma=True,
    )
    tokenizer: str = _option("", "with --method scratch: folder or hub id of the tokenizer")
    dense: str = _option(
        "",
        "dense parent of an N-vium start, for --controller parent and --self-distill (a dense "
        "start is its own parent)",
    )
    self_distill: int = _option(
        0, "sample so many tokens from the dense parent (a folder) and train on them too", kind=int
    )
    prompts: list[str] = _option([], "files of prompts for --self-distill", many=True)
    tokens: int = _option(0, "training tokens in all (default: one pass over the text)", kind=int)
    max_text_tokens: int = _option(
        0, "use no more tokens of the text than this (default: all)", kind=int
    )
    validation_tokens: int = _option(32768, "use no more of the validation texts in all", kind=int)
    calibration_tokens: int = _option(
        32768,
        "with --controller parent: after training, shift all hazards by one number so that the "
        "mixture is as good as the parent on so much of the validation texts in all; 0: do not",
        kind=int,
    )
    block_size: int = _option(512, "context length in training, tokens", kind=int)
    batch_size: int = _option(8, "blocks per pass", kind=int)
    gradient_accumulation: int = _option(1, "passes per step", kind=int)
    learning_rate: float | None = _option(
        None, f"peak, then a cosine to a tenth (default: {LEARNING_RATES})", kind=float
    )
    weight_decay: float = _option(0.1, "of AdamW (betas .9, .95)", kind=float)
    beta: float = _option(
        0.15, "weight of the compute penalty, or its start with a controller", kind=float
    )
    controller: str = _option(
        "",
        "what steers beta: 'parent' (the dense parent's loss on the validation text), 'off', or "
        "the history.jsonl of a dense twin (default: parent for a retrofit, else off)",
    )
    tolerance: float = _option(
        0.0,
        "how much worse than the dense model the controller lets the mixture be, nats per token",
        kind=float,
    )
    hazard_warm_up: float = _option(
        0.05, "share of the steps in which hazards are pulled to equal exit weights", kind=float
    )
    head_loss: float | None = _option(
        None,
        "share of the steps in which every exit's own cross entropy is added, before the paper's "
        f"loss alone: a retrofit's exits start knowing nothing (default: {HEAD_LOSS})",
        kind=float,
    )
    fit_tokens: int = _option(
        40000,
        "start the exits of a retrofit at a linear map fitted on so many tokens; 0: do not",
        kind=int,
    )
    adapter_size: int = _option(
        0, "of a dense start: inner width of the adapters (default: the hidden size)", kind=int
    )
    lora_rank: int = _option(16, "with --method lora", kind=int)
    dtype: str = _option(
        "bfloat16",
        "of the arithmetic; weights in training are float32 where they are trained",
        choices=DTYPES,
    )
    evaluate_every: int = _option(0, "steps (default: 5 %% of them, as in the paper)", kind=int)
    save_every: int = _option(0, "steps (default: 5 %% of them)", kind=int)
    seed: int = _option(0, "of weights, data order and sampled text", kind=int)
    resume: bool = _option(False, "go on with the run in --out", kind=bool)
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further TrainingArguments; in a --config file only"},
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option as a flag, and `--config`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON with these options; flags win"
    )
    for entry in dataclasses.fields(TrainOptions):
        about = entry.metadata
        if entry.name == "trainer":
            continue
        flag = "model" if entry.name == "model" else "--" + entry.name.replace("_", "-")
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": about["help"]}
        if entry.name == "model":
            common["nargs"] = "?"
        if about["kind"] is bool:
            parser.add_argument(flag, action="store_true", **common)
            continue
        if about.get("comma"):
            parser.add_argument(flag, type=comma_separated(int), metavar="L1,L2,...", **common)
            continue
        if about["many"]:
            common["nargs"] = "+"
        if "choices" in about:
            common["choices"] = about["choices"]
        parser.add_argument(flag, type=about["kind"], **common)


def read_options(args: argparse.Namespace) -> TrainOptions:
    """Flags over the `--config` file over the defaults, checked.

    Raises:
        UserError: a file that cannot be read, an unknown name, a value out of range.
    """
    known = {entry.name: entry for entry in dataclasses.fields(TrainOptions)}
    values: dict[str, Any] = {}
    if config := getattr(args, "config", None):
        values = _read_config(config)
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{config} holds {name!r}, and the options are {', '.join(known)}.")
            values[name] = _typed(str(config), name, value, known[name])
    values |= {name: value for name, value in vars(args).items() if name in known}
    options = TrainOptions(**values)
    _check(options)
    return options


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except Exception as error:  # noqa: BLE001 - the parsers share no base class
        reason = str(error).split("\n")[0]
        raise UserError(f"--config is {str(path)!r}, which cannot be read: {reason}.") from error
    if not isinstance(found, Mapping):
        raise UserError(f"--config is {str(path)!r}, which holds no options by name.")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def _typed(source: str, name: str, value: Any, entry: dataclasses.Field) -> Any:
    """A value of a configuration file in the option's own type."""
    if name == "trainer":
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: trainer is {value!r}, and names with values are needed.")
        return dict(value)
    kind, many = entry.metadata["kind"], entry.metadata["many"]
    if many:
        values = value if isinstance(value, list) else [value]
        return [_typed_one(source, name, item, kind) for item in values]
    return _typed_one(source, name, value, kind)


def _typed_one(source: str, name: str, value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a word
        except ValueError:
            pass
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{source}: {name} is {value!r}, and {kind.__name__} is needed.")


def _check(options: TrainOptions) -> None:
    for name in ("model", "out", "text", "validation"):
        if getattr(options, name):
            continue
        if name == "text" and options.self_distill:
            continue
        flag = "MODEL" if name == "model" else f"--{name}"
        raise UserError(f"{flag} is missing, and a run needs it.")
    for name, choices in (("method", METHODS), ("dtype", DTYPES)):
        if (value := getattr(options, name)) not in choices:
            raise UserError(f"--{name} is {value!r}, and it must be one of {', '.join(choices)}.")
    smallest = {
        "self_distill": 0, "tokens": 0, "max_text_tokens": 0, "validation_tokens": 1,
        "block_size": 2, "batch_size": 1, "gradient_accumulation": 1, "weight_decay": 0, "beta": 0,
        "tolerance": 0, "lora_rank": 1, "fit_tokens": 0, "adapter_size": 0,
        "calibration_tokens": 0, "evaluate_every": 0,
        "save_every": 0,
    }  # fmt: skip
    for name, bound in smallest.items():
        if (value := getattr(options, name)) < bound:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}, and it must be at least {bound}.")
    if not options.peak_learning_rate > 0:
        raise UserError(
            f"--learning-rate is {options.learning_rate}, and it must be greater than 0."
        )
    for name, share in (
        ("hazard-warm-up", options.hazard_warm_up),
        ("head-loss", options.head_loss_share),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"--{name} is {share}, and a share lies in 0..1.")
    if options.method == "scratch":
        for name in ("exit_layers", "adapter_size"):
            if value := getattr(options, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is {value}, and --method scratch takes the exits "
                    "that the config.json describes: leave it out."
                )
        if not options.tokenizer:
            raise UserError("--tokenizer is missing, and --method scratch needs one.")
        if options.self_distill:
            raise UserError(
                "--self-distill needs a dense parent to sample from, and --method scratch has none."
            )
        if options.controller == "parent":
            raise UserError(
                "--controller is 'parent', and --method scratch has no parent: give the "
                "history.jsonl of a dense twin, or 'off'."
            )
        if options.dense:
            raise UserError(
                f"--dense is {options.dense!r}, and --method scratch has no parent: leave it out."
            )
    elif options.tokenizer:
        raise UserError(
            f"--tokenizer is {options.tokenizer!r}, and a retrofit keeps its model's tokenizer: "
            "leave it out."
        )
