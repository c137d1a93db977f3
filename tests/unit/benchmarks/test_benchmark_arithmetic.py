# SPDX-License-Identifier: Apache-2.0
"""The sums behind the tables of `benchmarks/`, on numbers that can be added up by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import copied
from pass_clock import PassClock, at_mean_times, summed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from via_sd_dial import by_cost, construct
from via_sd_modelled import accept_for, plain_speed, via_speed

from tiny_models import make_dense
from vllm_nvium.via_sd.planner.model import PassTimeCurve, StepTimes


def test_slow_moments_are_shared_by_all_plans() -> None:
    """Two plans that make the same passes take as long, whichever met the slow ones."""
    fast = {"passes": summed([("full", 1, 1.0), ("full", 1, 1.0), ("slim", 3, 0.5)])}
    slow = {"passes": summed([("full", 1, 3.0), ("full", 1, 3.0), ("slim", 3, 1.5)])}
    more = {"passes": summed([("full", 1, 2.0)])}
    seconds = at_mean_times({"a": [fast], "b": [slow, more]})
    assert seconds["a"] == [pytest.approx(2 * 2.0 + 1.0)]
    assert seconds["b"] == [pytest.approx(2 * 2.0 + 1.0), pytest.approx(2.0)]
    whole = sum(sum(of_plan) for of_plan in seconds.values())
    assert whole == pytest.approx(2.5 + 7.5 + 2.0), "no time is lost"


def test_given_times_are_told_instead_of_measured_ones() -> None:
    clock = PassClock(4, 8)
    clock.given = {"full": 0.1, "slim": 0.04, "draft": 0.01}
    clock.observe_full_pass(3, 7.0)
    clock.observe_slim_pass(3, 7.0)
    clock.observe_draft_call(1, 4, 7.0)
    clock.observe_draft_call(1, 0, 7.0)
    clock.observe_overhead(1, 7.0)
    assert clock.taken() == [
        ("full", 3, 0.1),
        ("slim", 3, 0.04),
        ("draft", 4, 0.04),
        ("draft", 0, 0.01),
        ("overhead", 1, 0.0),
    ]
    assert not clock.taken()
    assert list(clock.snapshot()["seconds"]["full"].values()) == [0.1]


def test_copied_counts_what_stood_before() -> None:
    assert copied([1, 2, 3, 4], [5, 6, 7, 8]) == 0
    assert copied([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1 / 4), "only the last is whole"
    assert copied([], [7] * 10) == pytest.approx(6 / 10)
    assert copied([7] * 10, []) == 0


def test_passes_cost_their_weight_bytes(tmp_path: Path) -> None:
    """A base that is .4 of the target, and a draft model with one of its four layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    base = LlamaConfig(num_hidden_layers=4, vocab_size=64, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(base)
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    small = LlamaConfig(num_hidden_layers=1, vocab_size=64, tie_word_embeddings=True, **sizes)
    small.save_pretrained(tmp_path)
    assert by_cost(0.4, model, "ngram") == "100:40"
    full, slim, draft = map(float, by_cost(0.4, model, str(tmp_path)).split(":"))
    assert (full, slim) == (100, 40)
    assert draft == pytest.approx(40 * (whole - 3 * layer) / whole, rel=0.01)


def test_a_constructed_target_holds_its_base(tmp_path: Path) -> None:
    """Without the layers of its mask it is the base, and with them it agrees as often as noted."""
    base = make_dense(tmp_path / "base", num_hidden_layers=4, bigrams=0.7, whisper=0.2)
    texts = [[random.Random(t).randrange(3, 200) for _ in range(64)] for t in range(3)]
    construct(tmp_path / "target", base, 0.6, 0.9, texts)
    made = json.loads((tmp_path / "target" / "dial.json").read_text())
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=base.dtype).eval()
    ids = torch.tensor(texts)
    with torch.inference_mode():
        expected = base(ids).logits
        agreement = (target(ids).logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        skipped = [int(layer) for layer in made["mask"].split(",")]
        kept = [layer for i, layer in enumerate(target.model.layers) if i not in skipped]
        target.model.layers = torch.nn.ModuleList(kept)
        found = target(ids, use_cache=False).logits
    assert torch.equal(found, expected)
    assert made["agreement"] == pytest.approx(agreement, abs=1e-6)
    assert 0.5 < agreement < 1, "a random model changes its mind all at once"


def test_modelled_speeds_by_formula() -> None:
    """Plain speculative decoding, and the paper's rule where no token escalates."""
    times = StepTimes(np.arange(6) * 0.3, PassTimeCurve([1.0], [0.6]), PassTimeCurve([1.0], [1.0]))
    accepted = sum(0.8**k for k in range(6))
    assert plain_speed(0.8, times) == pytest.approx(accepted / (1 + 5 * 0.3))
    kept = sum(0.9**k for k in range(5))  # the fifth draft is kept or drawn again
    assert via_speed(0.9, 0.0, times) == pytest.approx(kept / (0.6 + 5 * 0.3), rel=0.03)
    assert accept_for(plain_speed(0.7, times), times) == pytest.approx(0.7, abs=0.002)
