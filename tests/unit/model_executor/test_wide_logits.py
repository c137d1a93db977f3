# SPDX-License-Identifier: Apache-2.0
"""Logits of rows that carry several heads: against each row's heads multiplied and mixed by
themselves, and how often an unembedding is read for them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vllm_nvium.model_executor.models import nvium
from vllm_nvium.model_executor.models.nvium import NviumForCausalLM, unembeddings_of_heads
from vllm_nvium.model_executor.ops.head_rows import HeadRows
from vllm_nvium.model_executor.ops.mixture import exit_log_weights, mixture_log_probs
from vllm_nvium.model_executor.ops.ragged import stretches

HEADS, HIDDEN = 4, 8
# Which unembedding each head has.
KINDS = {
    "shared": ({"exit_head": "final"}, [0, 0, 0, 0]),
    "tied": ({"exit_head": "embeddings", "tie_word_embeddings": True}, [0, 0, 0, 0]),
    "embeddings": ({"exit_head": "embeddings"}, [0, 0, 0, 1]),
    "own": ({"exit_head": "own"}, [0, 1, 2, 3]),
}


class Heads(NviumForCausalLM):
    """A model that is nothing but its unembeddings."""

    def __init__(self, kind: str, vocab_size: int) -> None:
        nn.Module.__init__(self)
        fields, self.expected_unembeddings = KINDS[kind]
        self.config: Any = SimpleNamespace(
            hidden_size=HIDDEN,
            vocab_size=vocab_size,
            num_heads_of_mixture=HEADS,
            **{"tie_word_embeddings": False} | fields,
        )
        self.num_heads, self.exits = HEADS, nn.ModuleList(nn.Identity() for _ in range(HEADS - 1))
        self.unembedding_of = unembeddings_of_heads(self.config)
        self.heads_differ = bool(self.unembedding_of.any())
        self.matrices = integers(max(self.expected_unembeddings) + 1, vocab_size, HIDDEN)
        self.products: list[int] = []

    def head_logits(self, head_inputs: torch.Tensor, head: int) -> torch.Tensor:
        self.products.append(len(head_inputs))
        return head_inputs @ self.matrices[self.expected_unembeddings[head]].T


def integers(*shape: int) -> torch.Tensor:
    """Small ones, so that a product has the same bits however many rows it has."""
    return torch.randint(-4, 5, shape).float() / 4


@dataclass
class Made:
    """Rows of every kind, and what speaks for each: a head, a token, weights [N], or nothing."""

    rows: HeadRows
    expected: torch.Tensor  # [T, V]


def make_rows(model: Heads, kinds: list[str]) -> Made:
    vocab_size = model.config.vocab_size
    rows = HeadRows(len(kinds), HEADS, HIDDEN, torch.empty(0))
    rows.heads.copy_(integers(len(kinds), HEADS, HIDDEN))
    expected = torch.empty(len(kinds), vocab_size)
    margins = torch.randn(len(kinds), HEADS - 1)
    for row, kind in enumerate(kinds):
        # [N, V]
        heads = torch.stack(
            [
                rows.heads[row, head] @ model.matrices[which].T
                for head, which in enumerate(model.expected_unembeddings)
            ]
        )
        weights = exit_log_weights(margins[row])
        if kind == "none":
            expected[row] = 0.0
            continue
        if kind == "alone":
            rows.fields[row, 0] = row % HEADS
            expected[row] = heads[row % HEADS]
            continue
        if kind == "never":  # exits that nobody leaves at, whose heads were not computed
            weights = exit_log_weights(torch.tensor([-torch.inf, 0.5, -torch.inf]))
            rows.heads[row, 0] = rows.heads[row, 2] = torch.nan
        elif kind == "all":  # of the weight, in one head
            weights = exit_log_weights(torch.tensor([-torch.inf, torch.inf, 0.5]))
            rows.heads[row, 0] = rows.heads[row, 3] = torch.nan
        elif kind == "nan":
            weights = torch.full((HEADS,), torch.nan)
        rows.log_weights[row] = weights
        shares = weights.exp()
        constant = (shares * torch.logsumexp(heads, dim=-1))[shares > 0].sum()
        expected[row] = mixture_log_probs(heads, weights) + constant
        if kind == "decided":
            rows.fields[row, 1] = row
            expected[row] = -torch.inf
            expected[row, row] = 0.0
        elif kind == "all":
            expected[row] = heads[1]
        elif kind == "nan":
            expected[row] = torch.nan
    return Made(rows, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_a_time", [1, 130, 1 << 22])
def test_rows_of_every_kind(kind: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(at_a_time)
    monkeypatch.setattr(nvium, "LOGITS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(nvium, "INPUTS_AT_A_TIME", min(at_a_time, 7))
    model = Heads(kind, vocab_size=64)
    assert model.unembedding_of.tolist() == model.expected_unembeddings
    names = ["alone", "mixture", "decided", "none", "never", "all", "nan"]
    kinds = [names[int(i)] for i in torch.randint(len(names), (60,))] + names
    made = make_rows(model, kinds)
    got = model.compute_logits(made.rows.packed)
    assert got is not None and got.dtype == torch.float32
    for row, name in enumerate(kinds):
        if name in ("mixture", "never"):
            torch.testing.assert_close(got[row], made.expected[row], atol=1e-4, rtol=0)
        elif name == "nan":
            assert got[row].isnan().all()
        else:
            assert torch.equal(got[row], made.expected[row]), name


@pytest.mark.parametrize("kinds", [[], ["none"], ["decided"] * 3, ["alone"]])
def test_few_rows(kinds: list[str]) -> None:
    model = Heads("shared", vocab_size=64)
    made = make_rows(model, kinds)
    got = model.compute_logits(made.rows.packed)
    assert got is not None and torch.equal(got, made.expected)
    assert len(model.products) == ("alone" in kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_one_mixture_in_a_batch_costs_no_further_product(kind: str) -> None:
    """With a large vocabulary, of which few rows of logits are computed with at a time."""
    torch.manual_seed(0)
    model = Heads(kind, vocab_size=152_000)
    made = make_rows(model, ["alone"] * 64 + ["mixture"])
    got = model.compute_logits(made.rows.packed)
    assert got is not None and torch.equal(got[:64], made.expected[:64])
    torch.testing.assert_close(got[64], made.expected[64], atol=1e-4, rtol=0)
    assert len(model.products) == max(model.expected_unembeddings) + 1
    assert sum(model.products) == 64 + HEADS


def test_a_long_prompt_reads_the_unembedding_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvium, "LOGITS_AT_A_TIME", 27 * 64)
    model = Heads("shared", vocab_size=64)
    made = make_rows(model, ["mixture"] * 1024)
    got = model.compute_logits(made.rows.packed)
    torch.testing.assert_close(got, made.expected, atol=1e-4, rtol=0)
    assert model.products == [512] * (1024 * HEADS // 512)


def test_stretches() -> None:
    assert stretches(np.array([], dtype=np.int64), 3) == []
    values = np.array([5, 5, 5, 5, 5, 2, 7, 7])
    assert stretches(values, 8) == [slice(0, 5), slice(5, 6), slice(6, 8)]
    assert stretches(values, 2) == [
        slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6), slice(6, 8)
    ]  # fmt: skip
