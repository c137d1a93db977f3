# SPDX-License-Identifier: Apache-2.0
"""A batch job on Ray: blocks of rows are read, answered by replicas of the engine through Ray
Data's LLM processor, and come back as they are done. The same on one machine and on a cluster."""

import logging
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.exceptions import RayError

from vllm_nvium.batch.attempts import Attempts, Counts
from vllm_nvium.batch.engine import Engine, environment_of_replica, quiet
from vllm_nvium.batch.feed import Rows, only_results
from vllm_nvium.batch.inputs import Lines
from vllm_nvium.batch.replica import Replica
from vllm_nvium.errors import UserError

STAGE = "vLLMEngineStage"
# The line of a stack trace that names the exception.
RAISED = re.compile(r"[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Cluster:
    """Where a job runs.

    Attributes:
        replicas: engines.
        cpus: of each worker of an engine, on CPU.
        address: of a cluster that runs; None for this machine alone.
        logs: show what replicas print.
    """

    replicas: int = 1
    cpus: float = 1
    address: str | None = None
    logs: bool = False


@contextmanager
def connected(cluster: Cluster, workers: float) -> Iterator[None]:
    """Ray, for as long as the job runs.

    Args:
        workers: CPUs that all replicas take, on this machine.

    Raises:
        UserError: there is no cluster at the address.
    """
    settings: dict[str, Any] = {"address": cluster.address or "local"}
    if cluster.address is None:
        # One more, for reading.
        settings |= {"num_cpus": int(workers) + 1, "include_dashboard": False}
    try:
        ray.init(log_to_driver=cluster.logs, logging_level=logging.ERROR, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address is {cluster.address!r}, and no cluster of Ray answers there "
            f"({_last_line(error)})."
        ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def results(
    engine: Engine, cluster: Cluster, lines: Lines, has: Callable[[int], bool], seed: int | None
) -> Iterator[pa.Table]:
    """Results as they come, with columns index, result and counts; see `Replica`.

    Args:
        has: whether a row has its result already; these are not run.
        seed: see `Replica`.

    Raises:
        UserError: the engine does not start, or Ray stopped.
    """
    todo = [n for n in lines.blocks() if not all(map(has, lines.indices(n)))]
    if not todo:
        return
    with connected(cluster, cluster.replicas * cluster.cpus * engine.workers):
        # On the machine of the command, which alone needs to have the file.
        here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
        counts = ray.remote(Counts).options(num_cpus=0, resources=here).remote()
        try:
            rows = ray.data.read_datasource(
                Rows(lines, todo, has),
                override_num_blocks=len(todo),
                # One process reads faster than any engine answers.
                concurrency=1,
                num_cpus=0,
                resources=here,
            )
            # A quarter more than an engine runs, so that it never waits for rows.
            batches = max(2, min(len(todo), -(-engine.max_num_seqs * 5 // (4 * lines.block))))
            answer = _processor(engine, cluster, lines.block, batches, seed, Attempts(counts))
            yield from answer(rows).iter_batches(batch_size=None, batch_format="pyarrow")
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), UserError):
                raise UserError(str(cause)) from None
            raise UserError(
                f"a replica stopped ({_last_line(error)}): --engine-logs shows what it printed, "
                "and the same command goes on."
            ) from error


def _processor(
    engine: Engine,
    cluster: Cluster,
    block: int,
    batches: int,
    seed: int | None,
    attempts: Attempts,
) -> Callable[[Dataset], Dataset]:
    """Ray's, whose engines answer `batches` blocks of rows at a time."""
    config = vLLMEngineProcessorConfig(
        model_source=engine.model,
        engine_kwargs=dict(engine.arguments),
        # A range, because of a single number Ray starts one, and more when it thinks fit.
        concurrency=(cluster.replicas, cluster.replicas),
        batch_size=block,
        max_concurrent_batches=batches,
        # Ray's default is twice as many, which the first replica that is up would take away.
        max_tasks_in_flight_per_actor=batches,
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        runtime_env={"env_vars": environment_of_replica(engine)},
        placement_group_config=(
            {"bundles": [{"CPU": cluster.cpus}] * engine.workers} if engine.is_cpu else None
        ),
    )
    with quiet():
        processor = build_processor(
            config,
            postprocess=only_results,
            preprocess_map_kwargs={"num_cpus": 0},
            postprocess_map_kwargs={"num_cpus": 0},
        )
    stage = processor.stages[STAGE]
    own = {"frontend": pickle.dumps(engine.frontend), "seed": seed, "attempts": attempts}
    # A copy, because setting an attribute of the stage works out its resources anew.
    processor.stages[STAGE] = stage.model_copy(
        update={"fn": Replica, "fn_constructor_kwargs": {**stage.fn_constructor_kwargs, **own}}
    )
    return processor


def _last_line(error: BaseException) -> str:
    """What an error says that carries another process's stack trace, and advice of Ray's behind."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    raised = [line for line in lines if RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1].rstrip(".")
