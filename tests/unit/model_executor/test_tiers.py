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
    check_lossless,
    check_paper,
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


def noise(count: int, positions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, positions, VOCABULARY).exponential_(generator=generator)


@pytest.mark.parametrize("kind", ["random drafter", "greedy drafter", "the slim verifier's draws"])
def test_a_lossless_check_leaves_what_the_noise_draws(kind: str) -> None:
    """Whatever was drafted, and though the slim verifier shares the noise of the full model."""
    depth = 3
    p, slim, full = laws(depth, 1), laws(depth + 1, 2), laws(depth + 1, 3)
    shared = noise(DRAWS, depth + 1, 4)
    by_slim, by_full = ((law / shared).argmax(dim=2) for law in (slim, full))
    drafts = {
        "random drafter": (p / noise(DRAWS, depth, 5)).argmax(dim=2),
        "greedy drafter": p.argmax(dim=1).expand(DRAWS, -1),
        "the slim verifier's draws": by_slim[:, :-1],
    }[kind]
    counts = torch.full((DRAWS,), depth)
    rows = torch.arange(DRAWS)
    window = check_lossless(drafts, counts, by_slim)
    tokens = torch.cat([drafts, torch.full((DRAWS, 1), -1)], dim=1).clone()
    tokens[rows, window.accepted] = window.token
    # The window has one token more than it has accepted; the full model checks all of them.
    found = check_lossless(tokens, window.accepted + 1, torch.cat([by_full, by_full[:, :1]], 1))
    tokens = torch.cat([tokens, torch.full((DRAWS, 1), -1)], dim=1)
    tokens[rows, found.accepted] = found.token
    assert 0 < found.accepted.double().mean() <= depth + 1
    for position in range(depth + 1):
        reached = found.accepted >= position
        assert torch.equal(tokens[reached, position], by_full[reached, position])
        # Those that are reached are a draw of the law, too: the position's noise is not in what
        # decides whether it is.
        assert reached.sum() < 500 or p_value(tokens[reached, position], full[position]) > (
            SIGNIFICANCE
        )


def test_models_that_share_the_noise_agree_as_often_as_the_formula_says() -> None:
    slim, full = laws(1, 2)[0], (0.8 * laws(1, 2) + 0.2 * laws(1, 3))[0]
    shared, other = noise(DRAWS, 1, 4)[:, 0], noise(DRAWS, 1, 5)[:, 0]
    drawn = (full / shared).argmax(dim=1)
    with_it, without = (
        float(((slim / each).argmax(dim=1) == drawn).double().mean()) for each in (shared, other)
    )
    ratios = torch.maximum(slim[None] / slim[:, None], full[None] / full[:, None])
    due = float((1 / ratios.sum(dim=1)).sum())
    assert with_it == pytest.approx(due, abs=4 * (due * (1 - due) / DRAWS) ** 0.5)
    d = float((slim - full).abs().sum()) / 2
    assert with_it > (1 - d) / (1 + d) > without + 0.3


def test_a_draft_that_is_not_there_is_not_accepted() -> None:
    drawn = torch.full((2, 3), 5)
    drafts = torch.tensor([[5, 5], [5, 5]])
    found = check_lossless(drafts, torch.tensor([1, 0]), drawn)
    assert found.accepted.tolist() == [1, 0] and found.token.tolist() == [5, 5]
    none = torch.empty(2, 0, dtype=torch.long)
    found = check_lossless(none, torch.tensor([0, 0]), drawn[:, :1])
    assert found.accepted.tolist() == [0, 0] and found.token.tolist() == [5, 5]


def test_a_lossless_check_by_hand() -> None:
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [4, 5, 6]])
    drawn = torch.tensor([[1, 2, 3, 7], [1, 2, 3, 7], [1, 5, 6, 7]])
    found = check_lossless(drafts, torch.tensor([3, 3, 3]), drawn)
    assert found.accepted.tolist() == [3, 1, 0]
    assert found.token.tolist() == [7, 2, 1]
    assert (found.tiers == ACCEPT).all()


def test_paper_tiers_by_hand() -> None:
    slim = torch.tensor([0.4, 0.25, 0.17, 0.1, 0.08])
    shares = (slim / slim.max())[None]
    tiers = paper_tiers(shares, torch.tensor([0.5]), torch.tensor([0.4]))
    assert tiers.tolist() == [[ACCEPT, ACCEPT, REGENERATE, ESCALATE, ESCALATE]]
    # With equal thresholds tier B is empty.
    tiers = paper_tiers(shares, torch.tensor([0.4]), torch.tensor([0.4]))
    assert tiers.tolist() == [[ACCEPT, ACCEPT, ACCEPT, ESCALATE, ESCALATE]]


def test_the_papers_scan_by_hand() -> None:
    """Up to the first B, which is drawn again; what escalates stays."""
    slim = torch.tensor([0.5, 0.2, 0.05, 0.25])
    drafts = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 2, 0, 0]])
    counts = torch.tensor([4, 4, 4, 2])
    half, third = torch.full((4,), 0.5), torch.full((4,), 0.3)
    drawn = torch.tensor([3, 0, 2, 1, 0]).expand(4, -1)
    found = check_paper(counts, (slim / slim.max())[drafts], drawn, half, third)
    assert found.accepted.tolist() == [4, 1, 2, 2]
    assert found.token.tolist() == [-1, 0, 2, -1]
    assert found.tiers[1, :2].tolist() == [ACCEPT, REGENERATE]
    assert found.tiers[2, :3].tolist() == [ESCALATE, ACCEPT, REGENERATE]
    assert found.tiers[3, :2].tolist() == [ACCEPT, ESCALATE]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("drawn", [True, False], ids=["random drafter", "greedy drafter"])
@pytest.mark.parametrize("forbidden", [False, True], ids=["", "a token is forbidden"])
def test_the_papers_law(temperature: float, drawn: bool, forbidden: bool) -> None:
    """One token, from the drafter through the tiers to the full model; also where a grammar cuts
    what the slim verifier draws, and the full model draws in its place."""
    p, slim, q = laws(3, 7, temperature)
    accept, escalate = 0.6, 0.15
    drafter = p if drawn else torch.nn.functional.one_hot(p.argmax(), VOCABULARY).to(p.dtype)
    drafts = (drafter / noise(DRAWS, 1, 5)).argmax(dim=2)
    shares = slim / slim.max()
    thresholds = torch.full((DRAWS,), accept), torch.full((DRAWS,), escalate)
    again = (slim / noise(DRAWS, 2, 6)).argmax(dim=2)
    found = check_paper(torch.ones(DRAWS, dtype=torch.long), shares[drafts], again, *thresholds)
    no = int(slim.argmax()) if forbidden else -1
    allowed = q.clone()
    if forbidden:
        allowed[no] = 0.0
    by_full = (allowed / noise(DRAWS, 1, 8)[:, 0]).argmax(dim=1)
    tokens = torch.where(found.accepted == 1, drafts[:, 0], found.token)
    escalated = (found.accepted == 1) & (found.tiers[:, 0] == ESCALATE)
    tokens = torch.where(escalated | (tokens == no), by_full, tokens)
    p_, slim_, q_ = (each.double() for each in (drafter, slim, allowed / allowed.sum()))
    law = paper_law(p_, slim_, q_, accept, escalate)
    assert float(law.sum()) == pytest.approx(1.0)
    if forbidden:
        law = torch.where(torch.arange(VOCABULARY) == no, 0.0, law) + law[no] * q_
    kinds = paper_tiers(shares[None], torch.tensor([accept]), torch.tensor([escalate]))
    if drawn and temperature == 1.0:
        assert set(kinds[0].tolist()) == {ACCEPT, REGENERATE, ESCALATE}
    possible = law > 0
    assert not (~possible)[tokens].any()
    seen = torch.bincount(tokens, minlength=VOCABULARY).double()[possible]
    due = law[possible] / law.sum() * DRAWS
    if len(seen) > 1:
        assert stats.chisquare(seen.numpy(), due.numpy())[1] > SIGNIFICANCE


def test_a_redraw_that_is_cut_tells_of_its_noise() -> None:
    """Why the slim verifier has noise of its own under the paper's rule: where its token is
    forbidden, the full model's draw follows its law with that and another law without."""
    slim, q = torch.tensor([0.4, 0.2, 0.2, 0.2]), torch.tensor([0.0, 0.7, 0.2, 0.1])
    noise_of_full, own = (
        torch.empty(DRAWS, 4).exponential_(generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    drawn = (q / noise_of_full).argmax(dim=1)
    values = []
    for each in (own, noise_of_full):
        cut = (slim / each).argmax(dim=1) == 0
        seen = torch.bincount(drawn[cut], minlength=4)[1:].double()
        values.append(
            float(stats.chisquare(seen.numpy(), (q[1:].double() * seen.sum()).numpy())[1])
        )
    assert values[0] > SIGNIFICANCE > 1e-9 > values[1]
