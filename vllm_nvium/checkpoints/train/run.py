# SPDX-License-Identifier: Apache-2.0
"""One run of training, from its options to the finished checkpoint."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments, set_seed

from vllm_nvium.checkpoints.text import check_disk_space, check_tokenizer
from vllm_nvium.checkpoints.train.calibration import calibrate
from vllm_nvium.checkpoints.train.controller import BetaController, Steering, steering_of
from vllm_nvium.checkpoints.train.folder import claim, unclaim
from vllm_nvium.checkpoints.train.linear_start import start_linear
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import (
    Start,
    choose_trainable,
    finish,
    open_dense,
    open_routers,
    open_start,
    planned_bytes,
)
from vllm_nvium.checkpoints.train.texts import training_blocks, validation_blocks
from vllm_nvium.checkpoints.train.trainer import (
    HISTORY,
    NviumTrainer,
    Schedule,
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
from vllm_nvium.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Run:
    """A run that can begin.

    Attributes:
        out: its folder.
        blocks: what it is trained on.
        validation: what it is measured on, by name.
        parent: what the dense parent loses on that, if there is one.
    """

    options: TrainOptions
    out: Path
    start: Start
    steering: Steering
    arguments: TrainingArguments
    blocks: "Dataset"
    validation: dict[str, "Dataset"]
    parent: Losses | None


def run(options: TrainOptions) -> Path:
    """See `train` in this package, which has checked that the packages are there."""
    out = Path(options.out).expanduser()
    is_new = claim(out, options)
    checkpoint = last_complete_checkpoint(out)
    try:
        run = _prepare(options, out, is_resumed=checkpoint is not None)
        trainer = _trainer(run)
    except UserError:
        if is_new:
            unclaim(out)
        raise
    _take_steps(trainer, checkpoint)
    finish(run.start, trainer.model, options, out, _record(run))
    return out / "model"


def _take_steps(trainer: NviumTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
        # Trainer would take one more step before it looked whether there is one to take.
        trainer.load(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _record(run: Run) -> dict[str, Any]:
    """What the finished exits say about how they were made; calibrates them."""
    # Where a run was on its machine says nothing about its exits.
    left_out = ("model", "out", "dense")
    used = {name: value for name, value in run.options.record().items() if name not in left_out}
    return {"options": used, "steps": run.arguments.max_steps, **_calibration(run)}


def _calibration(run: Run) -> dict[str, Any]:
    options, tokens = run.options, run.options.calibration_tokens
    if run.steering.kind != "parent" or not tokens:
        return {}
    texts = validation_blocks(options, run.start.tokenizer, tokens)
    # Another run of the calibration may ask for more of the texts.
    file = run.out / f"calibration_losses_{tokens}.json"
    parent = _parent_losses(options, run.start, texts, file)
    with autocast_of(options)():
        found = calibrate(run.start.model, texts, parent, options.tolerance, options.batch_size)
    return {"calibration": {"tokens": tokens, **found}}


# --- before the first step ------------------------------------------------------------------------


def _prepare(options: TrainOptions, out: Path, is_resumed: bool) -> Run:
    """Everything that can be refused, then what is measured and fitted before the first step.

    Raises:
        UserError: something given cannot be used.
    """
    start = _open(options, out)
    steering = steering_of(options, start)
    # Before anything is sampled: text that cannot be read should not cost an hour.
    validation = validation_blocks(options, start.tokenizer, options.validation_tokens)
    blocks = training_blocks(options, start, out)
    arguments = training_arguments(out, _steps(options, len(blocks)), options)
    parent = None
    if start.has_parent or options.dense:
        parent = _parent_losses(options, start, validation, out / "parent_losses.json")
    if start.has_parent and options.fit_tokens and not is_resumed:
        _fit_exits(options, start.model, blocks)
    return Run(options, out, start, steering, arguments, blocks, validation, parent)


def _trainer(run: Run) -> NviumTrainer:
    options, start, steps = run.options, run.start, run.arguments.max_steps
    trained = _trained_model(options, start, steps)
    schedule = Schedule.of(options, steps)
    controller = BetaController(options.beta, tolerance=options.tolerance)
    steers = run.steering.kind != "off"
    callback = Validation(
        partial(_losses, options, start.model, run.validation, start.is_dense),
        run.parent if steers or start.has_parent else None,
        run.steering.curve,
        controller,
        # A hazard that is still pulled to equal weights says nothing about beta.
        steers_from=schedule.hazard_warm_up_steps if steers else steps + 1,
        every=interval(options.evaluate_every, steps),
        history=run.out / HISTORY,
        starts_as_parent=start.has_parent,
    )
    set_seed(options.seed)
    return NviumTrainer(
        model=trained,
        args=run.arguments,
        train_dataset=run.blocks,
        callbacks=[callback],
        plain=start.model,
        is_dense=start.is_dense,
        schedule=schedule,
        controller=controller,
        autocast=autocast_of(options),
    )


def _open(options: TrainOptions, out: Path) -> Start:
    """The model and its tokenizer, when they fit each other, the blocks and the disk."""
    start = open_start(options, out)
    check_tokenizer(start.tokenizer, start.model.config.vocab_size)
    longest = start.model.config.max_position_embeddings
    if options.block_size > longest:
        raise UserError(
            f"--block-size is {options.block_size}, and the model reads at most {longest} tokens."
        )
    # Checkpoints of a run that is resumed need no more room.
    files = out.glob("checkpoint-*/*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    check_disk_space(out, planned_bytes(start, options) - written, "the checkpoints of this run")
    return start


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
    options: TrainOptions, model: Any, texts: dict[str, "Dataset"], is_dense: bool
) -> Losses:
    with autocast_of(options)():
        return losses_of(model, texts, options.batch_size, is_dense)


def _parent_losses(
    options: TrainOptions, start: Start, texts: dict[str, "Dataset"], file: Path
) -> Losses:
    """The dense parent's losses, measured once per run and kept in `file`."""
    if file.is_file():
        return Losses(**json.loads(file.read_text()))
    # With all hazards at zero a start is its dense parent: the mixture is the final head, whose
    # adapter is the identity. The model in training may have changed already.
    dense = open_start(options, file.parent).model if start.has_parent else open_dense(options)
    losses = _losses(options, dense, texts, not start.has_parent)
    text = json.dumps(dataclasses.asdict(losses)) + "\n"
    write_atomically(file, lambda beside: beside.write_text(text))
    return losses


def _fit_exits(options: TrainOptions, model: Any, blocks: "Dataset") -> None:
    """See `linear_start.py`."""
    wanted = min(len(blocks), math.ceil(options.fit_tokens / options.block_size))
    size = options.batch_size
    batches = (
        blocks[first : min(first + size, wanted)]["input_ids"] for first in range(0, wanted, size)
    )
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
