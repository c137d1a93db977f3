# SPDX-License-Identifier: Apache-2.0
"""How an engine comes to its slim verifier: of the kind that was asked for, or of the one that
promises most on this machine, with copies of weights that are made while vLLM loads the target.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

from vllm_nvium.engine.patches.model_loader import loaded_model_is_shown
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.layers.low_precision_kernels import layers_for
from vllm_nvium.model_executor.layers.low_precision_linear import LowPrecisionLinear
from vllm_nvium.model_executor.ranks import is_first_rank, number_of_ranks, told_by_first_rank
from vllm_nvium.model_executor.via_sd.mask import skipped_layers
from vllm_nvium.model_executor.via_sd.slim import SlimPass, SlimVerifier
from vllm_nvium.model_executor.via_sd.slim_quantised import Copies
from vllm_nvium.model_executor.via_sd.slim_timing import Windows
from vllm_nvium.model_executor.via_sd.target_weights import cheaper_kinds, shapes_of
from vllm_nvium.via_sd.kinds import candidates_for
from vllm_nvium.via_sd.options import AUTO, DEFAULT_MASK, SKIP, ViaSDOptions

logger = logging.getLogger("vllm.via_sd")

GIB = 1 << 30
# What vLLM calls the processes of engines and of tensor-parallel ranks.
OF_VLLM = ("EngineCore", "VllmWorker")


@contextmanager
def refusal_is_a_sentence() -> Iterator[None]:
    """A refusal inside, in a process that vLLM has started for an engine or a worker, is logged and
    ends that process: vLLM, which would log it inside stack traces, says then that a start has
    failed for a reason in the log.

    Raises:
        UserError: the refusal, in the user's own process.
    """
    try:
        yield
    except UserError as error:
        if not multiprocessing.current_process().name.startswith(OF_VLLM):
            raise
        logger.error("%s", error)
        raise SystemExit(1) from None


@refusal_is_a_sentence()
def load_with_slim_verifier(
    runner: Any, options: ViaSDOptions, load: Callable[[], None]
) -> SlimPass | None:
    """Loads the target, and makes the slim verifier of it.

    Args:
        runner: vLLM's model runner; load: its own way to load the target.

    Returns:
        None where no kind of copy is cheaper than the target: the tier is off.

    Raises:
        UserError: there is no kernel for the kind that was asked for, or no memory for the copies.
    """
    config, num_layers = runner.vllm_config, runner.model_config.hf_text_config.num_hidden_layers
    kind = options.kind
    mask = options.mask or (DEFAULT_MASK if kind == SKIP else None)
    skipped = () if mask is None else skipped_layers(mask, num_layers)
    # Without rounds nobody asks the slim verifier: copies would lie there for nothing.
    if kind == SKIP or options.rounds == 0:
        load()
        return SlimVerifier(runner.get_model(), skipped, config)
    made: list[Copies] = []

    def show(model: nn.Module) -> None:
        layers = [layer for i, layer in enumerate(model.model.layers) if i not in skipped]
        made.append(_copies_of(model, layers, options, runner))

    with loaded_model_is_shown(runner.model_config, show):
        load()
    if not made:
        raise UserError(
            f"--load-format is {config.load_config.load_format!r}, whose loader does not show the "
            f"weights before it has packed them, so that --via-sd-slim {kind} cannot copy them; "
            "give --via-sd-slim skip."
        )
    [copies] = made
    if copies.kind is None:
        return None
    copies.forget_what_was_new()
    model = runner.get_model()
    # A patch tells models whose weights were written; what workers of others do, nobody tells.
    model.weights_changed = copies.make_anew
    copies.notice_loading(model)
    assert copies.layer is not None
    name, anew = copies.layer.__name__, copies.make_anew_if_old
    return SlimVerifier(model, skipped, config, copies.of, name, anew)


def _copies_of(
    model: nn.Module, layers: list[nn.Module], options: ViaSDOptions, runner: Any
) -> Copies:
    start, kind, device = time.perf_counter(), options.kind, runner.device
    candidates = candidates_for(
        kind,
        cheaper_kinds(layers),
        shapes_of(model, layers),
        number_of_ranks(),
        partial(layers_for, device.type),
    )
    # Of so many rounds, each with a token of the slim verifier, where no drafter has any.
    own = None if options.rounds == AUTO else min(int(options.rounds), options.window)
    windows = Windows(
        shortest=own or 0,
        longest=own or options.window,
        most_requests=options.most_with_windows(runner.max_num_reqs),
        most_rows=runner.max_num_tokens,
    )
    copies = Copies(model, layers, candidates, windows)
    seconds = time.perf_counter() - start
    if kind != AUTO:
        copies.take(kind)
    copies.layer = _choice_of_first_rank(copies.layer, candidates)
    if is_first_rank():
        logger.info(
            "Slim verifier: milliseconds of all linear layers in a pass, and tokens per time of "
            "plain decoding that each kind promises (timed in %.1f s)\n%s",
            seconds,
            copies.table(),
        )
    if copies.kind is None:
        logger.warning(
            "VIA-SD: no kind of copy is cheaper here than the target itself, so the slim tier is "
            "off and drafts go straight to the target; --via-sd-slim skip leaves layers out instead"
        )
        return copies
    _check_memory(copies, runner)
    copies.install()
    return copies


def _choice_of_first_rank(
    own: type[LowPrecisionLinear] | None, candidates: list[type[LowPrecisionLinear]]
) -> type[LowPrecisionLinear] | None:
    """What rank 0 has chosen by its own clock: parts of one weight are copied in one way."""
    name = told_by_first_rank(None if own is None else own.__name__)
    chosen = {each.__name__: each for each in candidates}
    if name is not None and name not in chosen:
        raise UserError(
            f"--tensor-parallel-size is {number_of_ranks()}, but a rank has no kernel {name}, "
            "which the first rank has chosen for --via-sd-slim; give --via-sd-slim skip."
        )
    return None if name is None else chosen[name]


def _check_memory(copies: Copies, runner: Any) -> None:
    assert copies.layer is not None
    needed, weights = copies.num_bytes, copies.num_bytes_copied
    if runner.device.type == "cpu":
        # Ranks of one machine have one memory. (So have data-parallel engines, but vLLM tells each
        # that it is alone.)
        sharing = runner.vllm_config.parallel_config.local_world_size
        needed, weights = needed * sharing, weights * sharing
        free = _free_memory_of_host()
    else:
        free = torch.accelerator.get_memory_info()[0]
    if needed > free:
        raise UserError(
            f"--via-sd-slim is {copies.kind!r}, whose copies need {needed / GIB:.2f} GiB, but "
            f"{free / GIB:.2f} GiB are free; give --via-sd-slim skip, which needs none."
        )
    logger.info(
        "VIA-SD: %s copies of %.2f GiB of weights take %.2f GiB (%.0f %%), kernel %s",
        copies.kind,
        weights / GIB,
        needed / GIB,
        100 * needed / weights,
        copies.layer.kernel,
    )


def _free_memory_of_host() -> int:
    """Bytes that the machine has left, or the container where it is given less (control group)."""
    free = psutil.virtual_memory().available
    limit, used = get_cgroup_memory_limit(), get_cgroup_memory_usage()
    if limit is None or used is None:
        return free
    return min(free, limit - used + _cached_files(Path("/sys/fs/cgroup")))


def _cached_files(control_group: Path) -> int:
    """Bytes of files that a control group keeps in memory, such as weights that were read: they
    count as used, and are given up when a process needs memory."""
    for path in (control_group / "memory.stat", control_group / "memory/memory.stat"):
        if path.exists():
            rows = dict(line.split() for line in path.read_text().splitlines())
            return int(rows.get("active_file", 0)) + int(rows.get("inactive_file", 0))
    return 0
