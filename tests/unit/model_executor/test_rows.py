# SPDX-License-Identifier: Apache-2.0
"""Passes on rows of their own leave vLLM's forward context as they found it."""

from types import SimpleNamespace

import pytest

from vllm_nvium.model_executor import rows


@pytest.mark.parametrize("fails", [False, True])
def test_the_forward_context_is_the_callers_again(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    given = {"attn_metadata": {"a": 1}, "slot_mapping": {"b": 2}, "cudagraph_runtime_mode": 3}
    context = SimpleNamespace(**given)
    monkeypatch.setattr(rows, "get_forward_context", lambda: context)
    try:
        with rows.own_forward_context():
            context.attn_metadata = context.slot_mapping = context.cudagraph_runtime_mode = None
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert vars(context) == given
