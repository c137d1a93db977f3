# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train MODEL --out RUN --text ... --validation ...`: gives a dense model exits that
have learned when to leave, or trains an N-vium model from scratch. A run that was interrupted goes
on with `--resume`.
"""

import argparse
import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.console import complain, say
from vllm_nvium.training import TrainingError, require
from vllm_nvium.training.options import TrainOptions, add_arguments, read_options

if TYPE_CHECKING:
    from vllm_nvium.training.controller import BetaController
    from vllm_nvium.training.retrofit import Start
    from vllm_nvium.training.trainer import NviumTrainer

__all__ = ["add_arguments", "run", "train"]

RECORD = "run.json"
SELF_DISTILLED = "self_distilled.jsonl"


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the checkpoint is there, 2 with one line on stderr when not."""
    try:
        model = train(read_options(args))
    except TrainingError as error:
        complain(f"vllm-nvium train: error: {error}")
        return 2
    say(f"vllm-nvium train: wrote {model}")
    return 0


def train(options: TrainOptions) -> Path:
    """Runs, or goes on with, what the options describe.

    Returns:
        the folder of the finished checkpoint, `RUN/model`.

    Raises:
        TrainingError: something given cannot be used; nothing was trained, and a new run's folder
            is as it was before.
    """
    require("accelerate", "datasets", *(["peft"] if options.method == "lora" else []))
    from vllm_nvium.training.retrofit import finish
    from vllm_nvium.training.trainer import last_complete_checkpoint

    out = Path(options.out).expanduser()
    is_new = _claim(out, options)
    try:
        start, trainer = _prepare(options, out)
    except TrainingError:
        if is_new:
            _unclaim(out)
        raise
    checkpoint = last_complete_checkpoint(out)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record = {"options": options.record(), "steps": trainer.state.max_steps}
    finish(start, trainer.model, options, out, record)
    return out / "model"


def _prepare(options: TrainOptions, out: Path) -> "tuple[Start, NviumTrainer]":
    """Everything up to the first step."""
    from transformers import set_seed

    from vllm_nvium.training.data import check_disk_space, check_tokenizer
    from vllm_nvium.training.retrofit import choose_trainable, open_dense, open_routers, open_start
    from vllm_nvium.training.trainer import (
        HISTORY,
        NviumTrainer,
        Schedule,
        Validation,
        training_arguments,
    )

    start = open_start(options, out)
    check_tokenizer(start.tokenizer, start.model.config.vocab_size)
    longest = start.model.config.max_position_embeddings
    if options.block_size > longest:
        raise TrainingError(
            f"--block-size is {options.block_size}, and the model reads at most {longest} tokens."
        )
    blocks, validation = _blocks(options, start, out)
    steps = _steps(options, len(blocks))
    every = options.evaluate_every or max(1, math.ceil(0.05 * steps))
    save_every = options.save_every or max(1, math.ceil(0.05 * steps))
    arguments = training_arguments(out, steps, save_every, options, options.trainer)

    plain: Any = start.model
    autocast = _autocast(options)

    def measure() -> tuple[float, float | None]:
        with autocast():
            return validation_loss(plain, validation, options.batch_size, start.is_dense)

    def measure_parent() -> float:
        if start.has_parent:
            return measure()[0]
        parent = open_dense(options)
        with autocast():
            return validation_loss(parent, validation, options.batch_size, is_dense=True)[0]

    parent_loss = None
    if start.has_parent or options.dense:
        parent_loss = _kept(out / "parent_loss.json", measure_parent)
    if start.has_parent and options.fit_tokens:
        _fit_exits(options, plain, blocks)
    controller, dense_loss = _controller(options, start, parent_loss)
    trained = choose_trainable(plain, options)
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    total = sum(p.numel() for p in plain.parameters())
    # Two checkpoints of float32 weights and AdamW's two moments, and the finished model.
    check_disk_space(out, 2 * 12 * trainable + 2 * total, "the checkpoints of this run")
    schedule = Schedule(
        hazard_warm_up_steps=round(options.hazard_warm_up * steps),
        head_loss_steps=round(options.head_loss_share * steps),
    )
    if not start.is_dense:
        open_routers(plain)
    # A hazard that is still pulled to equal weights says nothing about beta.
    steers_from = schedule.hazard_warm_up_steps if dense_loss is not None else None
    history = out / HISTORY
    callback = Validation(
        measure,
        dense_loss,
        controller,
        steers_from,
        every,
        history,
        start_loss=parent_loss if start.has_parent else None,
    )
    set_seed(options.seed)
    trainer = NviumTrainer(
        model=trained,
        args=arguments,
        train_dataset=blocks,
        callbacks=[callback],
        plain=plain,
        is_dense=start.is_dense,
        schedule=schedule,
        controller=controller,
        autocast=autocast,
    )
    say(
        f"Training {trainable / 1e6:.1f}M of {total / 1e6:.1f}M parameters for {steps} steps of "
        f"{options.batch_size * options.gradient_accumulation * options.block_size} tokens ..."
    )
    return start, trainer


def _blocks(options: TrainOptions, start: "Start", out: Path) -> tuple[Any, Any]:
    """Training and validation blocks."""
    from vllm_nvium.training.data import load_blocks

    texts = list(options.text)
    # Before anything is sampled: text that cannot be read should not cost an hour.
    validation = load_blocks(
        options.validation,
        start.tokenizer,
        options.block_size,
        max_tokens=options.validation_tokens,
        seed=0,  # another seed trains on other text, but is measured on the same
        labels=True,
    )
    if options.self_distill:
        texts.append(str(_self_distilled(options, start, out)))
    blocks = load_blocks(
        texts,
        start.tokenizer,
        options.block_size,
        max_tokens=options.max_text_tokens or None,
        seed=options.seed,
        # Where one sampled text ends unfinished, what follows says nothing about it.
        labels=True,
    )
    return blocks, validation


def _claim(out: Path, options: TrainOptions) -> bool:
    """Makes the run's folder, or checks that it is this run's.

    Returns:
        whether the run is new.

    Raises:
        TrainingError: the folder holds something else, or a run with other options.
    """
    record = out / RECORD
    wanted = json.loads(json.dumps(options.record()))
    if record.is_file():
        if not options.resume:
            raise TrainingError(
                f"--out is {str(out)!r}, which holds a run already: give --resume to go on with "
                "it, or another folder."
            )
        found = json.loads(record.read_text())
        for name, value in wanted.items():
            if name != "out" and found.get(name) != value:
                raise TrainingError(
                    f"--{name.replace('_', '-')} is {value!r}, and the run in {out} was started "
                    f"with {found.get(name)!r}: use that, or another --out."
                )
        return False
    if options.resume:
        raise TrainingError(f"--resume needs a run in --out, and {str(out)!r} holds none.")
    if out.exists() and (not out.is_dir() or any(_not_sampled(out))):
        raise TrainingError(f"--out is {str(out)!r}, and it must be a new or an empty folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.replace(record)
    except OSError as error:
        raise TrainingError(
            f"--out is {str(out)!r}, and it cannot be written ({error.strerror})."
        ) from error
    return True


def _not_sampled(out: Path) -> list[Path]:
    """What is in a run's folder besides sampled text, which another run may use again."""
    stem = Path(SELF_DISTILLED).stem
    return [path for path in out.iterdir() if not path.name.startswith(stem)]


def _unclaim(out: Path) -> None:
    """Leaves nothing of a run that was refused, so that the mended command can be given."""
    for path in _not_sampled(out):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _self_distilled(options: TrainOptions, start: "Start", out: Path) -> Path:
    from vllm_nvium.training.distill import self_distill

    parent = options.model if start.has_parent else options.dense
    if not parent:
        raise TrainingError(
            f"--self-distill samples from a dense parent, and {options.model} is not dense: give "
            "the parent with --dense."
        )
    return self_distill(
        parent,
        out / SELF_DISTILLED,
        options.self_distill,
        prompts=None,
        prompt_files=options.prompts,
        seed=options.seed,
    )


def _fit_exits(options: TrainOptions, model: Any, blocks: Any) -> None:
    from vllm_nvium.console import progress
    from vllm_nvium.training.linear_start import start_linear

    wanted = min(len(blocks), math.ceil(options.fit_tokens / options.block_size))
    size = options.batch_size
    batches = (
        blocks[first : min(first + size, wanted)]["input_ids"] for first in range(0, wanted, size)
    )
    with progress("Fitting linear maps", wanted * options.block_size, "token") as bar:
        start_linear(model, batches, bar.update)


def _steps(options: TrainOptions, blocks: int) -> int:
    per_step = options.batch_size * options.gradient_accumulation
    if blocks < per_step:
        raise TrainingError(
            f"--text gives {blocks} blocks of {options.block_size} tokens, and one step needs "
            f"{per_step}: give more text, or smaller --batch-size and --block-size."
        )
    tokens = options.tokens or blocks * options.block_size
    return max(1, tokens // (per_step * options.block_size))


def _autocast(options: TrainOptions) -> Callable[[], contextlib.AbstractContextManager]:
    import torch

    if options.dtype == "float32":
        return contextlib.nullcontext
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda: torch.autocast(device, dtype=torch.bfloat16)


def _kept(path: Path, measure: Callable[[], float]) -> float:
    """The dense parent's loss on the validation text, measured once per run.

    Of a dense start it is that of the start itself: with all hazards at zero the mixture is the
    final head, whose adapter is still the identity.
    """
    if path.is_file():
        return float(json.loads(path.read_text())["val_loss"])
    loss = measure()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"val_loss": loss}) + "\n")
    partial.replace(path)
    return loss


def _controller(
    options: TrainOptions, start: "Start", parent_loss: float | None
) -> "tuple[BetaController, Callable[[int], float] | None]":
    """The controller, and the dense loss at a step that it steers by (None: beta stays)."""
    from vllm_nvium.training.controller import BetaController, DenseCurve

    controller = BetaController(options.beta, target=options.tolerance)
    kind = options.controller or ("parent" if parent_loss is not None else "off")
    if kind == "off":
        return controller, None
    if start.is_dense:
        raise TrainingError(f"--controller is {kind!r}, and a dense model has nothing to steer.")
    if kind == "parent":
        if parent_loss is None:
            raise TrainingError(
                f"--controller is 'parent', and {options.model} is no dense model whose loss could "
                "be measured: give its parent with --dense, or 'off'."
            )
        loss = parent_loss
        return controller, lambda step: loss
    curve = DenseCurve(Path(kind).expanduser())
    return controller, curve.at


def validation_loss(
    model: Any, blocks: Any, batch_size: int, is_dense: bool = False
) -> tuple[float, float | None]:
    """Mean `-log p` of the next tokens in nats, and the mean share of layers run.

    Args:
        blocks: a dataset of `input_ids` and `labels`, `[T]` each.
    """
    import torch

    from vllm_nvium.model_executor.ops.mixture import expected_depth
    from vllm_nvium.training.loss import IGNORED, mixture_target_log_probs, next_tokens
    from vllm_nvium.training.trainer import dense_target_log_probs

    was_training = model.training
    model.eval()
    loss, depth, count = 0.0, 0.0, 0
    with torch.no_grad():
        for first in range(0, len(blocks), batch_size):
            rows = blocks[first : first + batch_size]
            batch = rows["input_ids"].to(model.device)
            targets = next_tokens(rows["labels"].to(model.device))
            count += int((targets != IGNORED).sum())
            if is_dense:
                loss -= float(dense_target_log_probs(model, batch, targets).double().sum())
                continue
            output = model(input_ids=batch, compute_logits=False, use_cache=False)
            mixture, _ = mixture_target_log_probs(model, output, targets)
            loss -= float(mixture.double().sum())
            config = model.config
            shares = expected_depth(
                output.exit_log_weights[:, :-1], config.exit_layers, config.num_hidden_layers
            )
            depth += float(shares.double().mean()) * len(batch)
    model.train(was_training)
    return loss / count, None if is_dense else depth / len(blocks)
