# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train MODEL --out RUN --text ... --validation ...`: gives a dense model exits that
have learned when to leave, or trains an N-vium model from scratch. A run that was interrupted goes
on with `--resume`.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.train.options import TrainOptions, add_arguments, read_options
from vllm_nvium.console import complain, say, table
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.train.retrofit import Start
    from vllm_nvium.checkpoints.train.trainer import NviumTrainer
    from vllm_nvium.checkpoints.train.validation import Losses

__all__ = ["add_arguments", "run", "train"]

RECORD = "run.json"
SELF_DISTILLED = "self_distilled.jsonl"


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the checkpoint is there, 2 with one line on stderr when not."""

    try:
        model = train(read_options(args))
    except UserError as error:
        complain(f"vllm-nvium train: error: {error}")
        return 2
    say(f"vllm-nvium train: wrote {model}")
    return 0


def train(options: TrainOptions) -> Path:
    """Runs, or goes on with, what the options describe.

    Returns:
        the folder of the finished checkpoint, `RUN/model`.

    Raises:
        UserError: something given cannot be used; nothing was trained, and a new run's folder
            is as it was before.
    """
    require("accelerate", "datasets", *(["peft"] if options.method == "lora" else []))
    from vllm_nvium.checkpoints.train.retrofit import finish
    from vllm_nvium.checkpoints.train.trainer import last_complete_checkpoint, step_of

    out = Path(options.out).expanduser()
    is_new = _claim(out, options)
    checkpoint = last_complete_checkpoint(out)
    try:
        start, trainer, calibrate = _prepare(options, out, is_resumed=checkpoint is not None)
    except UserError:
        if is_new:
            _unclaim(out)
        raise
    steps = trainer.args.max_steps
    if checkpoint is not None and step_of(checkpoint) >= steps:
        # Trainer would take one more step before it looked whether there is one to take.
        trainer.load(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Where a run was on its machine says nothing about its exits.
    used = {k: v for k, v in options.record().items() if k not in ("model", "out", "dense")}
    record = {"options": used, "steps": steps, **calibrate()}
    finish(start, trainer.model, options, out, record)
    return out / "model"


def _prepare(
    options: TrainOptions, out: Path, is_resumed: bool
) -> "tuple[Start, NviumTrainer, Callable[[], dict[str, Any]]]":
    """Everything up to the first step, and what to do after the last one."""
    from transformers import set_seed

    from vllm_nvium.checkpoints.text import check_disk_space, check_tokenizer
    from vllm_nvium.checkpoints.train.controller import BetaController
    from vllm_nvium.checkpoints.train.retrofit import (
        choose_trainable,
        open_dense,
        open_routers,
        open_start,
        planned_bytes,
    )
    from vllm_nvium.checkpoints.train.trainer import (
        HISTORY,
        NviumTrainer,
        Schedule,
        Validation,
        training_arguments,
    )
    from vllm_nvium.checkpoints.train.validation import losses_of

    start = open_start(options, out)
    check_tokenizer(start.tokenizer, start.model.config.vocab_size)
    longest = start.model.config.max_position_embeddings
    if options.block_size > longest:
        raise UserError(
            f"--block-size is {options.block_size}, and the model reads at most {longest} tokens."
        )
    # Before anything is sampled, measured or fitted; what is there already needs no more room.
    needed = planned_bytes(start, options) - _size_of(out.glob("checkpoint-*/*"))
    check_disk_space(out, needed, "the checkpoints of this run")
    blocks, validation = _blocks(options, start, out)
    steps = _steps(options, len(blocks))
    every = options.evaluate_every or max(1, math.ceil(0.05 * steps))
    save_every = options.save_every or max(1, math.ceil(0.05 * steps))
    arguments = training_arguments(out, steps, save_every, options, options.trainer)

    plain: Any = start.model
    autocast = _autocast(options)

    def measure() -> "Losses":
        with autocast():
            return losses_of(plain, validation, options.batch_size, start.is_dense)

    def parent_losses_on(texts: dict[str, Any]) -> "Losses":
        # With all hazards at zero a start is its dense parent: the mixture is the final head,
        # whose adapter is the identity.
        dense = open_start(options, out).model if start.has_parent else open_dense(options)
        with autocast():
            return losses_of(dense, texts, options.batch_size, not start.has_parent)

    parent = None
    if start.has_parent or options.dense:
        parent = _kept(out / "parent_losses.json", lambda: parent_losses_on(validation))
    if start.has_parent and options.fit_tokens and not is_resumed:
        _fit_exits(options, plain, blocks)
    controller = BetaController(options.beta, tolerance=options.tolerance)
    kind, curve = _controller_kind(options, start, parent)
    trained = choose_trainable(plain, options)
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    total = sum(p.numel() for p in plain.parameters())
    schedule = Schedule(
        hazard_warm_up_steps=round(options.hazard_warm_up * steps),
        head_loss_steps=round(options.head_loss_share * steps),
    )
    if not start.is_dense:
        open_routers(plain)
    callback = Validation(
        measure,
        parent if kind != "off" or start.has_parent else None,
        curve,
        controller,
        # A hazard that is still pulled to equal weights says nothing about beta.
        steers_from=schedule.hazard_warm_up_steps if kind != "off" else steps + 1,
        every=every,
        history=out / HISTORY,
        starts_as_parent=start.has_parent,
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

    def calibrate() -> dict[str, Any]:
        if kind != "parent" or not options.calibration_tokens:
            return {}
        texts = _validation_texts(options, start, options.calibration_tokens)
        # Another run of the calibration may ask for more of the texts.
        file = out / f"calibration_losses_{options.calibration_tokens}.json"
        largest = _kept(file, lambda: parent_losses_on(texts))
        with autocast():
            return _calibrate(options, plain, texts, largest)

    return start, trainer, calibrate


def _calibrate(
    options: TrainOptions, model: Any, texts: dict[str, Any], parent: "Losses"
) -> dict[str, Any]:
    """See `calibration.py`; what to record of it."""
    from vllm_nvium.checkpoints.train.calibration import (
        depths_of,
        find_greedy_margin,
        find_shift,
        observe,
        shift_margins,
    )

    model.eval()
    observed = {name: observe(model, text, options.batch_size) for name, text in texts.items()}
    largest = {name: loss + options.tolerance for name, loss in parent.by_text.items()}
    found = find_shift(observed, largest, depths_of(model))
    shift_margins(model, found.shift)
    shifted = {name: text.shifted(found.shift) for name, text in observed.items()}
    greedy_margin = model.config.greedy_margin = find_greedy_margin(shifted, largest)
    greedy = {name: text.greedy_loss(greedy_margin) for name, text in shifted.items()}
    say(f"Calibrated: margins shifted by {found.shift:+.2f}, {found.depth:.1%} of the layers run.")
    say(f"At temperature 0 tokens leave where the margin exceeds {greedy_margin:.2f}.")
    rows = [
        (name, f"{loss:.4f}", f"{greedy[name]:.4f}", f"{parent.by_text[name]:.4f}")
        for name, loss in found.losses.items()
    ]
    table([("text", "loss", "greedy", "parent's"), *rows])
    if not found.reached:
        say("No shift makes the mixture as good as the parent on every text.")
    more = {
        "tokens": options.calibration_tokens,
        "greedy_margin": greedy_margin,
        "greedy_losses": greedy,
    }
    return {"calibration": dataclasses.asdict(found) | more}


def _size_of(files: Iterable[Path]) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in files if file.is_file())


def _blocks(options: TrainOptions, start: "Start", out: Path) -> tuple[Any, Any]:
    """Training and validation blocks."""
    from vllm_nvium.checkpoints.text import load_blocks

    texts = list(options.text)
    # Before anything is sampled: text that cannot be read should not cost an hour.
    validation = _validation_texts(options, start, options.validation_tokens)
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
        UserError: the folder holds something else, or a run with other options.
    """
    record = out / RECORD
    wanted = json.loads(json.dumps(options.record()))
    if record.is_file():
        if not options.resume:
            raise UserError(
                f"--out is {str(out)!r}, which holds a run already: give --resume to go on with "
                "it, or another folder."
            )
        found = json.loads(record.read_text())
        for name, value in wanted.items():
            if name != "out" and found.get(name) != value:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value!r}, and the run in {out} was started "
                    f"with {found.get(name)!r}: use that, or another --out."
                )
        return False
    if options.resume:
        raise UserError(f"--resume needs a run in --out, and {str(out)!r} holds none.")
    if out.exists() and (not out.is_dir() or any(_not_sampled(out))):
        raise UserError(f"--out is {str(out)!r}, and it must be a new or an empty folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(record, lambda path: path.write_text(json.dumps(wanted, indent=2) + "\n"))
    except OSError as error:
        raise UserError(
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
    from vllm_nvium.checkpoints.train.distill import self_distill

    parent = options.model if start.has_parent else options.dense
    if not parent:
        raise UserError(
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


def _validation_texts(options: TrainOptions, start: "Start", tokens: int) -> dict[str, Any]:
    """Blocks of every validation text, by its name on the command line."""
    from vllm_nvium.checkpoints.text import load_blocks

    share = max(options.block_size, tokens // len(options.validation))
    return {
        source: load_blocks(
            [source],
            start.tokenizer,
            options.block_size,
            max_tokens=share,
            seed=0,  # another seed trains on other text, but is measured on the same
            labels=True,
        )
        for source in options.validation
    }


def _fit_exits(options: TrainOptions, model: Any, blocks: Any) -> None:
    from vllm_nvium.checkpoints.train.linear_start import start_linear
    from vllm_nvium.console import progress

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
        raise UserError(
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


def _kept(path: Path, measure: "Callable[[], Losses]") -> "Losses":
    """The dense parent's losses, measured once per run."""
    from vllm_nvium.checkpoints.train.validation import Losses

    if path.is_file():
        return Losses(**json.loads(path.read_text()))
    losses = measure()
    text = json.dumps(dataclasses.asdict(losses)) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))
    return losses


def _controller_kind(
    options: TrainOptions, start: "Start", parent: "Losses | None"
) -> tuple[str, Callable[[int], float] | None]:
    """`off`, `parent`, or `curve` with the dense twin's loss at a step."""
    from vllm_nvium.checkpoints.train.controller import DenseCurve

    kind = options.controller or ("parent" if parent is not None else "off")
    if kind == "off":
        return kind, None
    if start.is_dense:
        raise UserError(f"--controller is {kind!r}, and a dense model has nothing to steer.")
    if kind == "parent":
        if parent is None:
            raise UserError(
                f"--controller is 'parent', and {options.model} is no dense model whose loss could "
                "be measured: give its parent with --dense, or 'off'."
            )
        return kind, None
    history = Path(kind).expanduser()
    _check_twin(history, options)
    return "curve", DenseCurve(history).at


def _check_twin(history: Path, options: TrainOptions) -> None:
    """A twin's losses say something about this run only on the same text in the same tokens."""
    record = history.with_name(RECORD)
    if not record.is_file():
        return  # made by something else, which the user has to know
    found = json.loads(record.read_text())
    for name in ("tokenizer", "validation", "validation_tokens", "block_size"):
        mine, theirs = getattr(options, name), found.get(name)
        if mine != theirs:
            raise UserError(
                f"--{name.replace('_', '-')} is {mine!r}, and the twin whose curve --controller "
                f"{str(history)!r} names was measured with {theirs!r}: give the same to both."
            )
