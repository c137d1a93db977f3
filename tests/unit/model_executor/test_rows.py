# SPDX-License-Identifier: Apache-2.0
"""Passes on rows of their own leave vLLM's forward context as they found it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context

from vllm_nvium.model_executor import rows


@pytest.mark.parametrize("fails", [False, True])
def test_the_forward_context_is_the_callers_again(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """And inside, nothing of it is about vLLM's rows: not the mask by which experts leave some of
    those out, which another pass has not as many of."""
    group = SimpleNamespace(layer_names=["a"], build_metadata=lambda _: "own")
    monkeypatch.setattr(rows, "common_attention_metadata", lambda _: None)
    with set_forward_context(
        {"a": "vLLM's"},
        VllmConfig(),
        num_tokens=2,
        slot_mapping={"a": torch.tensor([4, 5])},
        is_padding=torch.tensor([False, True]),
    ):
        context = get_forward_context()
        given = copy.copy(vars(context))
        try:
            with rows.own_forward_context():
                rows.enter_rows([group], SimpleNamespace(slots_device=torch.arange(3)))
                assert context.attn_metadata == {"a": "own"}
                assert len(context.slot_mapping["a"]) == 3
                assert context.is_padding is None
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
        assert all(vars(context)[name] is value for name, value in given.items())


@pytest.mark.parametrize("table_rows", [None, [3, 0, 2]])
def test_slots_are_found_in_whichever_row_a_request_has(table_rows: list[int] | None) -> None:
    table = np.random.default_rng(0).permutation(np.arange(1, 21, dtype=np.int32)).reshape(4, 5)
    batch = rows.Batch(
        query_start=np.arange(4, dtype=np.int32),
        first=np.array([9, 4, 0]),
        last=np.array([9, 4, 0]),
        complete=np.zeros(3, dtype=np.int64),
        block_table=table,
        block_table_device=torch.from_numpy(table[:3]),
        slots_device=torch.zeros(3, dtype=torch.int64),
        table_rows=None if table_rows is None else np.array(table_rows),
    )
    sequence, positions = np.array([0, 0, 1, 2, 2]), np.array([3, 9, 4, 0, 1])
    expected = [
        int(table[(table_rows or [0, 1, 2])[request], position // 2]) * 2 + position % 2
        for request, position in zip(sequence.tolist(), positions.tolist(), strict=True)
    ]
    assert batch.slots_of(sequence, positions, 2).tolist() == expected
