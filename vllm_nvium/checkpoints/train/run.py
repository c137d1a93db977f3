# SPDX-License-Identifier: Apache-2.0
"""One run of training, from its options to the finished checkpoint."""

import json
import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.evaluate.history import HISTORY
from vllm_nvium.checkpoints.inputs import check_block_size, load_model, refusing
from vllm_nvium.checkpoints.text import check_disk_space, check_tokenizer, load_blocks
from vllm_nvium.checkpoints.train.calibration import calibrate
from vllm_nvium.checkpoints.train.controller import BetaController, steering_of
from vllm_nvium.checkpoints.train.distill import self_distill
from vllm_nvium.checkpoints.train.folder import SELF_DISTILLED, check_model, claim, unclaim
from vllm_nvium.checkpoints.train.linear_start import start_linear
from vllm_nvium.checkpoints.train.options import TrainOptions, check
from vllm_nvium.checkpoints.train.retrofit import (
    Start,
    choose_trainable,
    finish,
    open_routers,
    open_start,
    planned_bytes,
)
from vllm_nvium.checkpoints.train.trainer import (
    NviumTrainer,
    Validation,
    autocast_of,
    interval,
    last_complete_checkpoint,
    step_of,
    training_arguments,
)
from vllm_nvium.checkpoints.train.validation import Losses, losses_of
from vllm_nvium.console import progress, say
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def train(options: TrainOptions) -> Path:
    """Makes the run that the options describe, or goes on with it.

    Returns:
        the folder of the finished checkpoint, `RUN/model`.

    Raises:
        UserError: something given cannot be used; nothing was trained, and a new run's folder
            is as it was before.
    """
    check(options)
    if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE is {processes}, and training runs in one process on one device: start it "
            "without torchrun."
        )
    require("accelerate", "datasets", *(["peft"] if options.method == "lora" else []))
    out = Path(options.out).expanduser()
    with claim(out, options):
        return _train(options, out)


def _train(options: TrainOptions, out: Path) -> Path:
    """`train`, in a folder that this process has."""
    checkpoint = last_complete_checkpoint(out)
    if checkpoint is None and (out / "model").exists():
        raise UserError(
            f"--out {out} has a model and no checkpoint to go on from: give another folder."
        )
    try:
        start = _open(options, out)
        trainer = _trainer(options, out, start, is_resumed=checkpoint is not None)
    except Exception:
        # One that was interrupted goes on with --resume.
        if checkpoint is None:
            unclaim(out)
        raise
    steps = trainer.args.max_steps
    if checkpoint is not None and step_of(checkpoint) >= steps:
        # Trainer would take one more step before it looked whether there is one to take.
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Where a run was on its machine says nothing about its exits.
    left_out = ("model", "out", "dense")
    used = {name: value for name, value in options.record().items() if name not in left_out}
    record = {"options": used, "steps": steps, **_calibration(options, out, start)}
    check_model(out, options)
    finish(start, trainer.model, options, out, record)
    return out / "model"


def _calibration(options: TrainOptions, out: Path, start: Start) -> dict[str, Any]:
    """Calibrates the model where a parent steered it; what the record says of that."""
    tokens = options.calibration_tokens
    if steering_of(options, start) != "parent" or not tokens:
        return {}
    texts = _validation_blocks(options, start, tokens)
    device = start.model.device
    start.model.to("cpu")  # so that a GPU need not hold both
    parent = _parent_losses(options, out, start, texts, device)
    start.model.to(device)
    with autocast_of(options, device)():
        found = calibrate(start.model, texts, parent, options.tolerance, options.batch_size)
    return {"calibration": {"tokens": tokens, **found}}


# --- before the first step ------------------------------------------------------------------------


def _open(options: TrainOptions, out: Path) -> Start:
    """The model and its tokenizer, when they fit each other, the blocks and the disk."""
    start = open_start(options, out)
    check_tokenizer(start.tokenizer, start.model.config.vocab_size)
    check_block_size(options.block_size, start.model.config.max_position_embeddings, "MODEL")
    # Checkpoints of a run that is resumed need no more room.
    files = out.glob("checkpoint-*/*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    check_disk_space(out, planned_bytes(start, options) - written, "the checkpoints of this run")
    return start


def _trainer(options: TrainOptions, out: Path, start: Start, is_resumed: bool) -> NviumTrainer:
    """Everything that can be refused, then what is measured and fitted before the first step."""
    steering = steering_of(options, start)
    # Before anything is sampled: text that cannot be read should not cost an hour.
    validation = _validation_blocks(options, start, options.validation_tokens)
    blocks = _training_blocks(options, start, out)
    steps = _steps(options, len(blocks))
    arguments = training_arguments(out, steps, options)
    parent = None
    if start.has_parent or steering == "parent":
        parent = _parent_losses(options, out, start, validation, arguments.device)
    # After the parent was there, so that a GPU need not hold both.
    start.model.to(arguments.device)
    if start.has_parent and options.fit_tokens and not is_resumed:
        _fit_exits(options, start.model, blocks)
    trained = _trained_model(options, start, steps)
    warm_up_steps = round(options.hazard_warm_up * steps)
    controller = BetaController(options.beta, tolerance=options.tolerance)
    callback = Validation(
        partial(_losses, options, start.model, validation, start.is_dense),
        parent,
        steering if callable(steering) else None,
        controller,
        # A hazard that is still pulled to equal weights says nothing about beta.
        steers_from=steps + 1 if steering == "off" else warm_up_steps,
        every=interval(options.evaluate_every, steps),
        history=out / HISTORY,
        starts_as_parent=start.has_parent,
    )
    set_seed(options.seed)
    what = f"no Trainer can be made with --trainer {json.dumps(options.trainer)}"
    with refusing(what) if options.trainer else nullcontext():
        return NviumTrainer(
            model=trained,
            args=arguments,
            train_dataset=blocks,
            callbacks=[callback],
            plain=start.model,
            is_dense=start.is_dense,
            warm_up_steps=warm_up_steps,
            head_loss_steps=round(options.head_loss_share * steps),
            controller=controller,
            autocast=autocast_of(options, arguments.device),
        )


def _training_blocks(options: TrainOptions, start: Start, out: Path) -> "Dataset":
    """Blocks of `--text` and of what the dense parent samples."""
    texts = list(options.text)
    if options.self_distill:
        parent = options.model if start.has_parent else options.dense
        if not parent:
            raise UserError(
                f"--self-distill samples from a dense parent, and {options.model} is not dense: "
                "give the parent with --dense."
            )
        sampled = self_distill(
            parent,
            out / SELF_DISTILLED,
            options.self_distill,
            prompt_files=options.prompts,
            seed=options.seed,
            replicas=options.distill_replicas,
        )
        texts.append(str(sampled))
    return load_blocks(
        texts,
        start.tokenizer,
        options.block_size,
        vocab_size=start.model.config.vocab_size,
        max_tokens=options.max_text_tokens or None,
        seed=options.seed,
        # Where one sampled text ends unfinished, what follows says nothing about it.
        labels=True,
    )


def _validation_blocks(options: TrainOptions, start: Start, tokens: int) -> "dict[str, Dataset]":
    """Blocks of every validation text, by its name on the command line; so many tokens in all."""
    size = options.block_size
    share = max(size, tokens // len(options.validation))
    # Another seed trains on other text, but is measured on the same.
    return {
        source: load_blocks(
            [source],
            start.tokenizer,
            size,
            vocab_size=start.model.config.vocab_size,
            max_tokens=share,
            seed=0,
            split="validation",
            labels=True,
        )
        for source in options.validation
    }


def _steps(options: TrainOptions, blocks: int) -> int:
    per_step = options.batch_size * options.gradient_accumulation
    if blocks < per_step:
        raise UserError(
            f"--text gives {blocks} blocks of {options.block_size} tokens, and one step needs "
            f"{per_step}: give more text, or smaller --batch-size and --block-size."
        )
    tokens = options.tokens or blocks * options.block_size
    return max(1, tokens // (per_step * options.block_size))


def _losses(
    options: TrainOptions, model: Any, texts: "dict[str, Dataset]", is_dense: bool
) -> Losses:
    with autocast_of(options, model.device)():
        return losses_of(model, texts, options.batch_size, is_dense)


def _parent_losses(
    options: TrainOptions,
    out: Path,
    start: Start,
    texts: "dict[str, Dataset]",
    device: torch.device,
) -> Losses:
    """With all hazards at zero a start is its dense parent: the mixture is the final head, whose
    adapter is the identity. It is opened again, because the model in training may have changed."""
    if start.has_parent:
        model = open_start(options, out).model
    else:
        model = load_model(options.dense, "--dense", options.dtype)
    return _losses(options, model.to(device), texts, is_dense=not start.has_parent)


def _fit_exits(options: TrainOptions, model: Any, blocks: "Dataset") -> None:
    """See `linear_start.py`."""
    wanted = min(len(blocks), math.ceil(options.fit_tokens / options.block_size))
    batches = (rows["input_ids"] for rows in blocks.take(wanted).iter(options.batch_size))
    with progress("Fitting linear maps", wanted * options.block_size, "token") as bar:
        start_linear(model, batches, bar.update)


def _trained_model(options: TrainOptions, start: Start, steps: int) -> Any:
    """The model with the weights to train chosen, and a line that says how many they are."""
    trained = choose_trainable(start.model, options)
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    total = sum(p.numel() for p in start.model.parameters())
    per_step = options.batch_size * options.gradient_accumulation * options.block_size
    say(
        f"Training {trainable / 1e6:.1f}M of {total / 1e6:.1f}M parameters for {steps} steps of "
        f"{per_step} tokens ..."
    )
    if not start.is_dense:
        open_routers(start.model)
    return trained
