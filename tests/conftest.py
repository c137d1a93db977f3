# SPDX-License-Identifier: Apache-2.0
"""What every test needs: an environment in which vLLM starts quickly and asks no network, and tiny
checkpoints made once per run."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch or vLLM, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM's n-gram drafter is compiled by numba. Where that has more threads than OpenMP has, every
# engine that follows in the same process computes wrong attention on processors without AVX-512:
# seen on stock vLLM 0.32 with this package switched off.
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# How long an example takes is a matter of what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(
        "VIA-SD on real models", "tests/engine/via_sd/test_via_sd_real_models.py"
    )
    group.addoption("--via-sd-target", default="", help="checkpoint of the target")
    group.addoption(
        "--via-sd-drafter",
        default="ngram",
        help="ngram, a draft model, or none for no --speculative-config; several with commas",
    )
    group.addoption("--via-sd-kind", default="skip", help="values of --via-sd-slim, with commas")
    group.addoption("--via-sd-rounds", default="auto,2", help="values of it, with commas")
    group.addoption("--via-sd-dtype", default="float32", choices=["float32", "bfloat16"])
    group.addoption("--via-sd-temperature", default=0.0, type=float, help="above 0: with seeds")
    group.addoption("--via-sd-at-once", default=32, type=int, help="most requests in a batch")
    group.addoption("--via-sd-prompts", default="", help="JSON lines with `prompt`")
    group.addoption("--via-sd-most-prompts", default=164, type=int, help="use so many of them")
    group.addoption("--via-sd-skip-prompts", default=0, type=int, help="leave out the first ones")


# Files that take minutes, the longest first. With two processes they are started first: one that is
# left for the end keeps one process waiting for the other.
LONG_FILES = (
    "gpu/test_model_runner_v2.py",
    "unit/via_sd/test_planner.py",
    "engine/nvium/test_dense_equality.py",
    "engine/nvium/test_families.py",
    "engine/nvium/test_traces.py",
    "engine/nvium/test_tensor_parallel.py",
    "engine/nvium/test_state_pool.py",
    "engine/nvium/test_memory.py",
    "engine/via_sd/test_via_sd_tensor_parallel.py",
    "engine/via_sd/test_via_sd_traces.py",
    "engine/via_sd/test_via_sd_left_behind.py",
    "engine/via_sd/test_via_sd_metrics.py",
    "engine/batch/test_batch_kills.py",
    "server/test_http_fuzz.py",
    "server/test_serve.py",
    "engine/checkpoints/test_distill.py",
    "engine/test_plugin.py",
    "engine/test_demo_runs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is marked by the folder that it stands in; long files come first."""
    root = Path(__file__).parent
    turn = {root / name: i for i, name in enumerate(LONG_FILES)}
    if gone := [str(path) for path in turn if not path.is_file()]:
        raise pytest.UsageError(f"LONG_FILES of {__file__} names {', '.join(gone)}, which is gone.")
    items.sort(key=lambda item: turn.get(item.path, len(turn)))  # keeps the order otherwise
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        if folder in ("engine", "server", "gpu"):
            item.add_marker(folder)


def pytest_unconfigure() -> None:
    # Each engine of this process is shut down at exit, and collects garbage among all objects that
    # the session has left: minutes, for nothing.
    gc.freeze()


@pytest.fixture(scope="session")
def nvium_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random N-vium checkpoint with a tokenizer and a chat template."""
    from tiny_models import make_nvium

    path = tmp_path_factory.mktemp("checkpoints") / "nvium"
    make_nvium(path)
    return path


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint with a tokenizer and a chat template."""
    from tiny_models import make_dense

    path = tmp_path_factory.mktemp("checkpoints") / "llama"
    make_dense(path)
    return path


@pytest.fixture(scope="session")
def parser() -> Any:
    """vLLM's parser of engine arguments, with the flags of this package."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_nvium import plugin

    plugin.register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.fixture
def read_environment() -> None:
    """vLLM remembers environment variables once an engine has run in this process: for tests that
    set them."""
    import vllm.envs

    vllm.envs.disable_envs_cache()


@pytest.fixture
def nvium_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """`caplog` that sees the plugin's logger: vLLM stops its loggers from reaching the root."""
    logger = logging.getLogger("vllm.nvium")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)
