# SPDX-License-Identifier: Apache-2.0
"""The rules of the slim tier on small vocabularies, against their formulas: laws by chi-square over
many draws, and cases by hand."""

import pytest
import torch
from scipy import stats

from vllm_nvium.model_executor.ops.tiers import (
    ACCEPT,
    ESCALATE,
    REGENERATE,
    check_greedy,
    check_paper,
    check_sampled,
    paper_law,
    paper_tiers,
)

VOCABULARY = 8
DRAWS = 40_000
# Fixed seeds make every run the same run.
SIGNIFICANCE = 1e-3


def laws(count: int, seed: int, temperature: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(count, VOCABULARY, generator=generator)
    return torch.softmax(logits / temperature, dim=-1)


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    seen = torch.bincount(tokens, minlength=VOCABULARY).double()
    due = law.double() / law.double().sum() * len(tokens)
    return float(stats.chisquare(seen.numpy(), due.numpy())[1])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("drawn", [True, False], ids=["random drafter", "greedy drafter"])
def test_a_lossless_check_leaves_a_draw_of_the_slim_law(temperature: float, drawn: bool) -> None:
    """Whatever was drafted: each position reached has the slim law, the last one too."""
    depth = 3
    p, slim = laws(depth, 1, temperature), laws(depth + 1, 2, temperature)
    generator = torch.Generator().manual_seed(3)
    if drawn:
        columns = [
            torch.multinomial(p[i].expand(DRAWS, -1), 1, generator=generator) for i in range(depth)
        ]
        drafts, probs = torch.cat(columns, dim=1), p.expand(DRAWS, -1, -1)
    else:
        drafts, probs = p.argmax(dim=1).expand(DRAWS, -1), None
    counts = torch.full((DRAWS,), depth)
    found = check_sampled(drafts, counts, probs, slim.expand(DRAWS, -1, -1), generator)
    assert 0 < found.accepted.double().mean() < depth
    rows = torch.arange(DRAWS)
    tokens = torch.cat([drafts, torch.full((DRAWS, 1), -1)], dim=1).clone()
    tokens[rows, found.accepted] = found.token
    for position in range(depth + 1):
        reached = found.accepted >= position
        if reached.sum() < 500:  # too few for the chi-square; only deep positions are that rare
            assert position > 0
            continue
        assert p_value(tokens[reached, position], slim[position]) > SIGNIFICANCE


def test_a_draft_that_is_not_there_is_not_accepted() -> None:
    slim = torch.zeros(2, 3, VOCABULARY)
    slim[:, :, 5] = 1.0
    drafts = torch.tensor([[5, 5], [5, 5]])
    found = check_sampled(drafts, torch.tensor([1, 0]), None, slim)
    assert found.accepted.tolist() == [1, 0] and found.token.tolist() == [5, 5]
    found = check_greedy(drafts, torch.tensor([1, 0]), slim.argmax(dim=2))
    assert found.accepted.tolist() == [1, 0] and found.token.tolist() == [5, 5]
    found = check_sampled(torch.empty(2, 0, dtype=torch.long), torch.tensor([0, 0]), None, slim)
    assert found.accepted.tolist() == [0, 0] and found.token.tolist() == [5, 5]


def test_greedy_check_by_hand() -> None:
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [4, 5, 6]])
    top = torch.tensor([[1, 2, 3, 7], [1, 2, 3, 7], [1, 5, 6, 7]])
    found = check_greedy(drafts, torch.tensor([3, 3, 3]), top)
    assert found.accepted.tolist() == [3, 1, 0]
    assert found.token.tolist() == [7, 2, 1]


def test_paper_tiers_by_hand() -> None:
    slim = torch.tensor([0.4, 0.25, 0.17, 0.1, 0.08]).expand(1, 6, 5)
    drafts = torch.arange(5)[None, :]
    tiers = paper_tiers(drafts, slim, torch.tensor([0.5]), torch.tensor([0.4]))
    assert tiers.tolist() == [[ACCEPT, ACCEPT, REGENERATE, ESCALATE, ESCALATE]]
    # With equal thresholds tier B is empty.
    tiers = paper_tiers(drafts, slim, torch.tensor([0.4]), torch.tensor([0.4]))
    assert tiers.tolist() == [[ACCEPT, ACCEPT, ACCEPT, ESCALATE, ESCALATE]]


def test_the_papers_scan_by_hand() -> None:
    """Up to the first B, which is drawn again; what escalates stays."""
    slim = torch.tensor([0.5, 0.2, 0.05, 0.25]).expand(4, 5, 4).contiguous()
    drafts = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 2, 0, 0]])
    counts = torch.tensor([4, 4, 4, 2])
    half, third = torch.full((4,), 0.5), torch.full((4,), 0.3)
    greedy = torch.full((4,), True)
    found = check_paper(drafts, counts, slim, half, third, greedy)
    assert found.accepted.tolist() == [4, 1, 2, 2]
    assert found.token.tolist() == [-1, 0, 0, -1]
    assert found.tiers[1, :2].tolist() == [ACCEPT, REGENERATE]
    assert found.tiers[2, :3].tolist() == [ESCALATE, ACCEPT, REGENERATE]
    assert found.tiers[3, :2].tolist() == [ACCEPT, ESCALATE]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("drawn", [True, False], ids=["random drafter", "greedy drafter"])
def test_the_papers_law(temperature: float, drawn: bool) -> None:
    """One token, from the drafter through the tiers to the full model."""
    p, slim, q = laws(3, 7, temperature)
    accept, escalate = 0.6, 0.15
    generator = torch.Generator().manual_seed(5)
    drafter = p if drawn else torch.nn.functional.one_hot(p.argmax(), VOCABULARY).to(p.dtype)
    drafts = torch.multinomial(drafter.expand(DRAWS, -1), 1, generator=generator)
    counts = torch.ones(DRAWS, dtype=torch.long)
    found = check_paper(
        drafts,
        counts,
        slim.expand(DRAWS, 2, -1),
        torch.full((DRAWS,), accept),
        torch.full((DRAWS,), escalate),
        torch.full((DRAWS,), False),
        generator,
    )
    tokens = torch.where(found.accepted == 1, drafts[:, 0], found.token)
    escalated = (found.accepted == 1) & (found.tiers[:, 0] == ESCALATE)
    probs = drafter.expand(DRAWS, 1, -1) if drawn else None
    decided = check_sampled(drafts, counts, probs, q.expand(DRAWS, 2, -1), generator)
    final = torch.where(decided.accepted == 1, drafts[:, 0], decided.token)
    tokens = torch.where(escalated, final, tokens)
    law = paper_law(drafter.double(), slim.double(), q.double(), accept, escalate)
    assert float(law.sum()) == pytest.approx(1.0)
    kinds = paper_tiers(
        torch.arange(VOCABULARY)[None], slim.expand(1, VOCABULARY + 1, -1),
        torch.tensor([accept]), torch.tensor([escalate]),
    )  # fmt: skip
    if drawn and temperature == 1.0:
        assert set(kinds[0].tolist()) == {ACCEPT, REGENERATE, ESCALATE}
    possible = law > 0
    assert not (~possible)[tokens].any()
    seen = torch.bincount(tokens, minlength=VOCABULARY).double()[possible]
    due = law[possible] / law.sum() * DRAWS
    if len(seen) > 1:
        assert stats.chisquare(seen.numpy(), due.numpy())[1] > SIGNIFICANCE
