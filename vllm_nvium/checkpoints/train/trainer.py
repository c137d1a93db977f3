# SPDX-License-Identifier: Apache-2.0
"""transformers' `Trainer` with the loss of N-vium, a controller that steers its compute penalty,
and checkpoints that hold only what is trained.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_nvium.checkpoints.train.controller import BetaController, Curve
from vllm_nvium.checkpoints.train.loss import (
    dense_target_log_probs,
    mean_of_scored,
    mixture_target_log_probs,
    next_tokens,
    warm_up_penalty,
)
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import trainable_state
from vllm_nvium.checkpoints.train.validation import Losses, worst_text
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.ops.mixture import expected_depth

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"


def nvium_loss(
    model: Any, output: Any, targets: torch.Tensor, warms_up: bool, adds_heads: bool, beta: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one batch, and its terms for the log.

        L = -mean log p_mix(y)
            + mean sum_{k<N} (p_k - 1/(N-k+1))^2    in the hazard warm-up
            + beta * mean E_c                       after it
            - mean_k mean log q_k(y)                while exits learn to speak (ours)

    Args:
        model: the reference model, without peft's wrapper.
        output: of `model(input_ids, compute_logits=False)`.
        targets: `[B, T]` int64, the next token of every position; -100 where it is not learned.
        warms_up: in the first steps hazards are pulled to equal exit weights, and only after them
            the compute penalty counts (arXiv:2605.13190, training).
        adds_heads: in the first steps every head's own cross entropy is added. The mixture's
            gradient reaches a head only as far as the head already explains the next token, so a
            retrofit's exits, which start knowing nothing, would never begin to learn.
        beta: weight of the compute penalty.
    """
    mixture, heads = mixture_target_log_probs(model, output, targets)
    loss = mixture_loss = -mean_of_scored(mixture, targets)
    config = model.config
    # The last position of a block has no target, and so no say in the penalties either.
    depth = expected_depth(
        output.exit_log_weights[:, :-1], config.exit_layers, config.num_hidden_layers
    ).mean()
    loss = loss + (warm_up_penalty(output.margins[:, :-1]) if warms_up else beta * depth)
    if adds_heads:
        loss = loss - mean_of_scored(heads.mean(dim=-1), targets)
    return loss, {"mixture_loss": float(mixture_loss.detach()), "mean_depth": float(depth.detach())}


class NviumTrainer(Trainer):
    """One model, one loss, small checkpoints.

    Args:
        plain: the model without peft's wrapper.
        is_dense: train a dense twin with plain cross entropy.
        autocast: a context in which everything is computed, e.g. bfloat16 autocast. Trainer's own
            mixed precision would hand the heads' inputs over in float32.
        controller: holds the present beta.
    """

    # `compute_loss` returns the mean of a pass; Trainer divides by the passes of a step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        plain: Any,
        is_dense: bool,
        warm_up_steps: int,
        head_loss_steps: int,
        controller: BetaController,
        autocast: Callable[[], contextlib.AbstractContextManager],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.plain, self.is_dense = plain, is_dense
        self.warm_up_steps, self.head_loss_steps = warm_up_steps, head_loss_steps
        self.controller, self.autocast = controller, autocast
        self.terms: dict[str, float] = {}
        self.add_callback(_SavesAsAsked())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        input_ids = inputs["input_ids"]
        targets = next_tokens(inputs.get("labels", input_ids))
        with self.autocast():
            if self.is_dense:
                loss = -mean_of_scored(dense_target_log_probs(model, input_ids, targets), targets)
            else:
                output = model(input_ids=input_ids, compute_logits=False, use_cache=False)
                step = self.state.global_step
                loss, self.terms = nvium_loss(
                    self.plain,
                    output,
                    targets,
                    step < self.warm_up_steps,
                    step < self.head_loss_steps,
                    self.controller.beta,
                )
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.terms:
            logs = logs | {name: round(value, 4) for name, value in self.terms.items()}
            logs["beta"] = round(self.controller.beta, 4)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Only what is trained: the rest is in the checkpoint that the run started from."""
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        state = {name: t.contiguous() for name, t in trainable_state(self.model).items()}
        save_file(state, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        found = self.model.load_state_dict(state, strict=False)
        assert not found.unexpected_keys, found.unexpected_keys


class _SavesAsAsked(TrainerCallback):
    """Lets `--save-every` change when a run goes on: Trainer takes back what its state holds."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.save_steps = int(args.save_steps)


@dataclass(eq=False)
class Validation(TrainerCallback):
    """Measures the validation loss every few steps, steers beta by it, and keeps the history: with
    Trainer's own log, which a resumed run gets back as it was, and as a file beside it.

    Against a parent it steers by the text on which the mixture is worst: by their mean it would
    sell one kind of text for another. A dense twin's curve only has the mean.

    Attributes:
        measure: the model as it is.
        parent: losses of the dense parent by text, or None.
        curve: mean loss of a dense twin at a step, or None.
        controller: holds beta.
        steers_from: the controller changes beta after this step.
        every: steps.
        history: file of all measurements.
        starts_as_parent: before the first step the model is the parent.
    """

    measure: Callable[[], Losses]
    parent: Losses | None
    curve: Curve | None
    controller: BetaController
    steers_from: int
    every: int
    history: Path
    starts_as_parent: bool

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self.starts_as_parent and self.parent is not None:
            self._record(state, self.parent)
        elif lines := self._lines(state):
            self.controller.beta = lines[-1]["beta"]
            self._steer(lines[-1])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        self._steer(self._record(state, self.measure()))

    def _record(self, state: TrainerState, losses: Losses) -> dict[str, Any]:
        dense = None if self.parent is None else self.parent.mean
        line = {
            "step": state.global_step,
            "val_loss": losses.mean,
            "parent_loss": dense if self.curve is None else self.curve(state.global_step),
            "mean_depth": losses.depth,
            "beta": self.controller.beta,
            "val_losses": losses.by_text,
            "parent_losses": None if self.parent is None else self.parent.by_text,
        }
        state.log_history.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self._lines(state))
        write_atomically(self.history, lambda beside: beside.write_text(text))
        return line

    def _lines(self, state: TrainerState) -> list[dict[str, Any]]:
        return [line for line in state.log_history if "val_loss" in line]

    def _steer(self, line: dict[str, Any]) -> None:
        """Changes beta by what was measured last."""
        # At the last step of the warm-up the hazards are still where it pulled them.
        if line["step"] <= self.steers_from:
            return
        if self.curve is not None:
            self.controller.update(line["parent_loss"], line["val_loss"])
        elif self.parent is not None:
            self.controller.update(*worst_text(self.parent.by_text, line["val_losses"]))


def last_complete_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those cut short are removed.

    `trainer_state.json` is the last file of a checkpoint that Trainer writes.
    """
    found: dict[int, Path] = {}
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((folder / STATE).read_text())
            found[step_of(folder)] = folder
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    return found[max(found)] if found else None


def step_of(checkpoint: Path) -> int:
    """Steps that were taken before a checkpoint."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def interval(given: int, steps: int) -> int:
    """Steps between two measurements or checkpoints: 5 % of all, as in the paper, unless given."""
    return given or max(1, math.ceil(0.05 * steps))


def autocast_of(
    options: TrainOptions, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes contexts that compute in `--dtype`."""
    if options.dtype == "float32":
        return contextlib.nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def training_arguments(out: Path, steps: int, options: TrainOptions) -> TrainingArguments:
    """The paper's recipe: AdamW (.9, .95), 1 % warm-up, cosine to a tenth, clip 1.0.

    Raises:
        UserError: `--trainer` holds a name or a value that TrainingArguments does not take.
    """
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.peak_learning_rate,
        "weight_decay": options.weight_decay,
        "adam_beta2": 0.95,
        "warmup_steps": max(1, round(0.01 * steps)),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_grad_norm": 1.0,
        "save_steps": interval(options.save_every, steps),
        # The last one may be cut by a crash; the one before it must still be there.
        "save_total_limit": 2,
        "logging_steps": max(1, steps // 100),
        "seed": options.seed,
        "data_seed": options.seed,
        "report_to": "none",
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        arguments = TrainingArguments(**(fields | options.trainer))
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: {first_line(error)}.") from error
    # Trainer would spread passes over all visible GPUs with DataParallel, which cannot gather what
    # the reference model returns.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
