# SPDX-License-Identifier: Apache-2.0
"""Whether copies of weights fit: into the machine, or into the part of it that a container has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nvium.errors import UserError
from vllm_nvium.via_sd import loading

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has 100 GiB free; a container on it may have 16 GiB and uses 12, of which files are 3."""
    monkeypatch.setattr(
        loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB)
    )
    monkeypatch.setattr(loading, "get_cgroup_memory_limit", lambda: None)
    monkeypatch.setattr(loading, "get_cgroup_memory_usage", lambda: 12 * GIB)
    monkeypatch.setattr(loading, "_cached_files", lambda _: 3 * GIB)


def check(needed: int, ranks: int = 1) -> None:
    copies: Any = SimpleNamespace(
        layer=SimpleNamespace(kernel="FBGEMM"),
        kind="int8",
        num_bytes=needed,
        num_bytes_copied=4 * needed,
    )
    config = SimpleNamespace(parallel_config=SimpleNamespace(local_world_size=ranks))
    loading._check_memory(copies, SimpleNamespace(device=torch.device("cpu"), vllm_config=config))


def test_a_container_has_what_its_limit_leaves(
    machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(99 * GIB)
    monkeypatch.setattr(loading, "get_cgroup_memory_limit", lambda: 16 * GIB)
    check(7 * GIB)
    with pytest.raises(UserError, match=r"copies need 8.00 GiB, but 7.00 GiB are free"):
        check(8 * GIB)


def test_ranks_of_one_machine_share_its_memory(machine: None) -> None:
    check(50 * GIB, ranks=2)
    with pytest.raises(UserError, match=r"copies need 102.00 GiB"):
        check(51 * GIB, ranks=2)


@pytest.mark.parametrize("of", ["memory.stat", "memory/memory.stat"])
def test_files_of_a_control_group(tmp_path: Path, of: str) -> None:
    assert loading._cached_files(tmp_path) == 0
    (tmp_path / of).parent.mkdir(exist_ok=True)
    (tmp_path / of).write_text("anon 5\ninactive_file 7\nactive_file 20\nunevictable 3\n")
    assert loading._cached_files(tmp_path) == 27
