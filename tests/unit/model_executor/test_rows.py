# SPDX-License-Identifier: Apache-2.0
"""Passes on rows of their own leave vLLM's forward context as they found it."""

import copy
from types import SimpleNamespace

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
