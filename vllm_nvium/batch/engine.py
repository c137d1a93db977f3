# SPDX-License-Identifier: Apache-2.0
"""The engine of a batch job, from vLLM's own flags: what a replica makes it of, and what of it the
results depend on. vLLM's parser knows the flags of this package once its plugins are loaded."""

import argparse
import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_nvium.batch.journal import WEIGHTS
from vllm_nvium.engine.feature import running
from vllm_nvium.environment import with_libraries
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.weights import digest

# Flags that decide how fast a job runs, and not what it says; a job may go on with others.
SPEED_ONLY = frozenset(
    {"disable_log_stats", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes"}
    | {"max_num_batched_tokens", "max_num_seqs", "engine_logs"}
)
# Not for a file that others may read.
SECRET = frozenset({"hf_token"})
# Variables of the caller's environment that a replica must have too, wherever it runs.
PASSED_ON = ("VLLM_", "HF_", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "LD_PRELOAD", "TOKENIZERS_")


@dataclass(frozen=True)
class Engine:
    """What a replica is made of.

    Attributes:
        model: a folder or a hub id.
        arguments: of vLLM's `AsyncEngineArgs`, without the model; those that were given.
        frontend: every flag of vLLM's OpenAI layer and engine, by name.
        about: what the results depend on, by flag.
        is_cpu: whether this is vLLM's CPU build.
        max_num_seqs: sequences that it runs together.
        workers: processes of one engine.
    """

    model: str
    arguments: dict[str, Any]
    frontend: dict[str, Any]
    about: dict[str, Any]
    is_cpu: bool
    max_num_seqs: int
    workers: int


def add_engine_arguments(parser: Any) -> None:
    """Add the flags of vLLM's engine and of its OpenAI layer.

    Args:
        parser: vLLM's `FlexibleArgumentParser`.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    # Not from where it is defined, which is another module in 0.33 than in 0.32.
    from vllm.entrypoints.launchers.run_batch import BaseFrontendArgs

    BaseFrontendArgs.add_cli_args(parser)
    AsyncEngineArgs.add_cli_args(parser)


def engine_of(args: argparse.Namespace, defaults: argparse.Namespace) -> Engine:
    """The engine that flags ask for.

    Args:
        args: every flag of `add_engine_arguments`.
        defaults: the same for a command that gives the model only.

    Raises:
        UserError: vLLM or this package refuses them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.renderers.chat_utils import load_chat_template

    if (args.data_parallel_size or 1) > 1:
        raise UserError(
            f"--data-parallel-size is {args.data_parallel_size}; a batch job has --replicas for "
            "that, so leave it out."
        )
    is_cpu = current_platform.is_cpu()
    if is_cpu and args.distributed_executor_backend == "ray":
        raise UserError(
            "--distributed-executor-backend is 'ray', which vLLM's CPU build does not have: leave "
            "it out, and use --replicas for more machines."
        )
    given_flags = vars(args)
    args = _with_absolute_paths(args)
    try:
        # Its text: replicas may stand on another machine, and a job goes on with the same only.
        args.chat_template = load_chat_template(args.chat_template)
    except Exception as error:  # noqa: BLE001 - vLLM's own class, which is no ValueError
        raise UserError(
            f"--chat-template is {str(args.chat_template)!r}, which is neither a file that can be "
            "read nor a template."
        ) from error
    try:
        config = _configuration(args)
        # vLLM 0.32 on CPU stops when the prompt of a seeded request is computed in chunks.
        at_once = is_cpu and args.enable_chunked_prefill is None and running(config) is None
        if at_once:
            config = _configuration(args, enable_chunked_prefill=False)
        asked, usual = AsyncEngineArgs.from_cli_args(args), AsyncEngineArgs.from_cli_args(defaults)
        arguments = {
            field.name: value
            for field in fields(asked)
            if (value := getattr(asked, field.name)) != getattr(usual, field.name)
            # Ray's processor sets it itself.
            and field.name != "enable_log_requests"
        }
        if at_once:
            arguments["enable_chunked_prefill"] = False
    except (ValueError, AssertionError, NotImplementedError, OSError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the engine does not start ({_reason(error)}).") from error
    workers = (args.tensor_parallel_size or 1) * (args.pipeline_parallel_size or 1)
    if is_cpu and workers > 1:
        # Without one, Ray's processor takes its own.
        arguments.setdefault("distributed_executor_backend", "mp")
    # As they were given, and without what flags of this package have added; of a template its text.
    flags = given_flags | {
        "chat_template": args.chat_template,
        "additional_config": {
            key: value
            for key, value in dict(given_flags["additional_config"] or {}).items()
            if given_flags.get(key) is None
        },
    }
    given = {
        key: value
        for key, value in flags.items()
        if value != getattr(defaults, key) and key not in SPEED_ONLY | SECRET
    }
    return Engine(
        model=asked.model,
        arguments=arguments,
        # Rows name the model as the command does.
        frontend=vars(args)
        | {"served_model_name": args.served_model_name or [given_flags["model"]]},
        about={"--model": given_flags["model"]}
        | {WEIGHTS: digest(asked.model, asked.revision, asked.download_dir)}
        | {f"--{key.replace('_', '-')}": _plain(value) for key, value in sorted(given.items())},
        is_cpu=is_cpu,
        max_num_seqs=256 if config is None else config.scheduler_config.max_num_seqs,
        workers=workers,
    )


def _configuration(args: argparse.Namespace, **changed: Any) -> Any:
    """vLLM's, or None on a machine that only drives a cluster and has no device to check for."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        return None
    # vLLM writes into what it is given.
    args = argparse.Namespace(**vars(args) | changed)
    args.speculative_config = copy.copy(args.speculative_config)
    with quiet():
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def _with_absolute_paths(args: argparse.Namespace) -> argparse.Namespace:
    """Where flags name files or folders of this one: replicas may stand in another."""
    args = copy.copy(args)
    args.speculative_config = copy.copy(args.speculative_config)
    args.additional_config = copy.copy(args.additional_config)
    for holder, key in (
        (vars(args), "model"),
        (vars(args), "tokenizer"),
        (vars(args), "spec_model"),
        (args.speculative_config, "model"),
        (vars(args), "via_sd_mask"),
        (args.additional_config, "via_sd_mask"),
    ):
        path = holder.get(key) if isinstance(holder, dict) else None
        is_mask = key == "via_sd_mask"
        # A mask may be a list of layers, and a file of that name no mask.
        if not isinstance(path, str) or (is_mask and not path.endswith(".json")):
            continue
        if os.path.exists(path):  # noqa: PTH110 - false for what cannot be a path, too
            holder[key] = str(Path(path).absolute())
    return args


def environment_of_replica(engine: Engine) -> dict[str, str]:
    """The variables that a replica gets, beside those that Ray gives it."""
    whole = with_libraries(os.environ)
    passed = {key: value for key, value in whole.items() if key.startswith(PASSED_ON)}
    if engine.is_cpu:
        # Otherwise every replica of a machine binds its threads to the same cores.
        passed.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return passed


@contextmanager
def quiet() -> Iterator[None]:
    """While vLLM and Ray say in this process what replicas say again."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _plain(value: Any) -> Any:
    """As JSON has it; of vLLM's own records, as those of LoRA modules, what they look like."""
    return json.loads(json.dumps(value, default=str))


def _reason(error: Exception) -> str:
    """vLLM's sentence out of pydantic's wrapping."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ").split("\n")[0].rstrip(".")
    return first_line(error)
