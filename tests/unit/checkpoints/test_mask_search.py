# SPDX-License-Identifier: Apache-2.0
"""The search for a slim verifier's layers: objectives against formulas written out, skipped layers
against models that never had them, a planted best mask that is found, and stopped searches that go
on without trying a mask again."""

import math
import random
import re
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedModel,
)

from tiny_models import DENSE_KINDS, SIZES, SLIDING_KINDS, make_dense, save_tokenizer
from vllm_nvium.checkpoints.mask_search import speed
from vllm_nvium.checkpoints.mask_search import target as search_target
from vllm_nvium.checkpoints.mask_search.find import WEIGHTS
from vllm_nvium.checkpoints.mask_search.objectives import (
    TeacherForcing,
    agreement,
    divergence,
    most_tokens,
    skipping_layers,
)
from vllm_nvium.checkpoints.mask_search.report import draw_history
from vllm_nvium.checkpoints.mask_search.search import (
    Mask,
    Score,
    SearchSettings,
    begin_study,
    cheapest_layers,
    mask_of,
    resume_study,
    scored_masks,
    scores_alone,
    scores_left,
    search,
)
from vllm_nvium.checkpoints.mask_search.speed import SpeedRun, measure_speed
from vllm_nvium.cli import main
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd.mask import even_layers, read_mask_file, skipped_layers
from vllm_nvium.weights import fingerprint

LAYERS = 8
PLANTED = (1, 4, 6)

# --- formulas -------------------------------------------------------------------------------------


def written_out(q: list[float], p: list[float], alpha: float, beta: float) -> float:
    """R(q || p) token by token."""
    total = 0.0
    for q_v, p_v in zip(q, p, strict=True):
        total += p_v * max(0.0, math.log((1 - alpha) * p_v / q_v))
        total += q_v * max(0.0, math.log(beta * p_v / q_v))
    return total


def logs(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_divergence_by_hand() -> None:
    log_q, log_p = logs([[0.5, 0.25, 0.25]]), logs([[0.25, 0.5, 0.25]])
    # Only the second token has too much: twice as much, weighed by p = 1/2 and by q = 1/4.
    assert divergence(log_q, log_p, 0.0, 1.0).item() == pytest.approx(0.75 * math.log(2))
    # alpha = 1/2 forgives twice as much in p's term; beta = 1/2 does in q's.
    assert divergence(log_q, log_p, 0.5, 1.0).item() == pytest.approx(0.25 * math.log(2))
    assert divergence(log_q, log_p, 0.5, 0.5).item() == pytest.approx(0.0)
    # beta = 2 counts what is equal, too: ln 4 for the second token, ln 2 for the third.
    assert divergence(log_q, log_p, 0.5, 2.0).item() == pytest.approx(
        0.25 * math.log(4) + 0.25 * math.log(2)
    )


@given(st.integers(0, 10_000), st.floats(0, 0.9), st.floats(0, 2))
def test_divergence_against_the_formula(seed: int, alpha: float, more: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, p = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64).softmax(-1)
    beta = 1 - alpha + more
    found = divergence(q.log(), p.log(), alpha, beta)
    assert found.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = written_out(q[i, j].tolist(), p[i, j].tolist(), alpha, beta)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if alpha == 0 and beta == 1:
        assert (found > 0).all()
    assert divergence(q.log(), q.log(), alpha, 1.0).abs().max() < 1e-12


def test_agreement_by_hand() -> None:
    found = agreement(torch.tensor([3, 5, 2]), torch.tensor([3, 4, 2]))
    assert found.tolist() == [1.0, 0.0, 1.0] and found.dtype == torch.float64


# --- slim models ----------------------------------------------------------------------------------


def make_model(kind: str, num_layers: int) -> PreTrainedModel:
    sizes = SIZES | {"num_hidden_layers": num_layers}
    torch.manual_seed(0)
    if kind not in SLIDING_KINDS:
        config_class, model_class = DENSE_KINDS[kind]
        sizes |= {"head_dim": 32} if kind == "qwen3" else {}
        return model_class(config_class(**sizes)).eval()
    windows = ["sliding_attention", "sliding_attention", "full_attention"] * num_layers
    sizes |= {"head_dim": 32, "sliding_window": 4, "layer_types": windows[:num_layers]}
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", [kind for kind in DENSE_KINDS if kind != "qwen3_moe"])
def test_a_slim_model_is_a_model_that_never_had_them(kind: str) -> None:
    model, kept = make_model(kind, 6), [0, 2, 5]
    ids = torch.randint(3, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full = model(input_ids=ids, use_cache=False).logits
        with skipping_layers(model, (1, 3, 4)):
            slim = model(input_ids=ids, use_cache=False).logits
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(full, again), "the model is whole again"

    smaller = make_model(kind, 3)
    if layer_types := getattr(model.config, "layer_types", None):
        smaller.config.layer_types = [layer_types[layer] for layer in kept]
        for layer, target in zip(kept, smaller.model.layers, strict=True):
            for name in ("sliding_window", "is_sliding", "layer_type", "attention_type"):
                for one, other in (
                    (model.model.layers[layer], target),
                    (model.model.layers[layer].self_attn, target.self_attn),
                ):
                    if hasattr(one, name):
                        setattr(other, name, getattr(one, name))
    weights = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    for place, layer in enumerate(kept):
        prefix = f"model.layers.{layer}."
        for name, tensor in model.state_dict().items():
            if name.startswith(prefix):
                weights[f"model.layers.{place}.{name.removeprefix(prefix)}"] = tensor
    smaller.load_state_dict(weights)
    with torch.inference_mode():
        expected = smaller(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(slim, expected)
    assert not torch.allclose(slim, full, atol=1e-2), "it is another model than the full one"


def test_the_model_is_whole_after_an_error() -> None:
    model = make_model("llama", 3)
    layers = list(model.model.layers)
    with pytest.raises(RuntimeError), skipping_layers(model, (1,)):
        raise RuntimeError
    assert list(model.model.layers) == layers


@pytest.mark.parametrize(
    ("objective", "alpha", "beta"), [("divergence", 0.0, 1.0), ("divergence", 0.3, 0.8),
                                     ("agreement", 0.0, 1.0)]
)  # fmt: skip
def test_scores_are_means_over_every_prefix(objective: str, alpha: float, beta: float) -> None:
    model = make_model("llama", 4)
    # Longer than a chunk, and more than one block.
    blocks = torch.randint(3, 256, (3, 150), generator=torch.Generator().manual_seed(1))
    found = TeacherForcing(model, blocks, objective, alpha, beta)((1, 2))
    with torch.inference_mode():
        q = model(input_ids=blocks, use_cache=False).logits.double().log_softmax(-1)
        with skipping_layers(model, (1, 2)):
            p = model(input_ids=blocks, use_cache=False).logits.double().log_softmax(-1)
    if objective == "agreement":
        expected = (q.argmax(-1) == p.argmax(-1)).double().mean().item()
        assert 0 < expected < 1
    else:
        expected = divergence(q, p, alpha, beta).mean().item()
    # The full model's numbers are kept in 16 bits.
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("objective", ["divergence", "agreement"])
def test_what_is_not_finite_is_refused(objective: str) -> None:
    model = make_model("llama", 4)
    blocks = torch.randint(3, 256, (1, 16))
    score = TeacherForcing(model, blocks, objective)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match="Without layers 1-2 .* not finite in torch.float32"):
        score((1, 2))
    with pytest.raises(UserError, match="^TARGET's predictions are not finite"):
        TeacherForcing(model, blocks, objective)


def test_the_cache_is_bounded() -> None:
    assert most_tokens(2**18) == 8192  # 4 GiB of 2 bytes each


# --- which mask is tried next ---------------------------------------------------------------------


def distance_to(target: Mask) -> Score:
    """A landscape with one best mask: layers that are in one mask and not in the other."""
    return lambda mask: float(len(set(mask) ^ set(target)))


def new_study(maximise: bool = False) -> Study:
    return optuna.create_study(direction="maximize" if maximise else "minimize")


def tried(settings: SearchSettings, score: Score, maximise: bool = False) -> list[FrozenTrial]:
    study = new_study(maximise)
    search(study, settings, score)
    return list(scored_masks(study).values())


def masks(trials: list[FrozenTrial]) -> list[Mask]:
    return [mask_of(trial) for trial in trials]


def sources(trials: list[FrozenTrial]) -> list[str]:
    return [trial.user_attrs["source"] for trial in trials]


def test_order_of_sources() -> None:
    trials = tried(SearchSettings(24, 9, 40), distance_to(tuple(range(5, 14))))
    found = sources(trials)
    assert found[:2] == ["even", "ranking"]
    assert mask_of(trials[0]) == even_layers(24, 9)
    # Until there is something to learn from every draw is uniform, then they take turns.
    assert set(found[2:10]) == {"random"}
    assert found[10:] == ["bayes", "random"] * 15


@pytest.mark.parametrize(
    ("number", "expected"),
    [(2, ["random"]), (6, ["random"] * 3 + ["bayes", "random"]),
     (8, ["random"] * 3 + ["bayes", "random"] * 2)],
)  # fmt: skip
def test_few_trials_are_not_all_uniform(number: int, expected: list[str]) -> None:
    """Where an engine is started for every mask, few are tried."""
    settings = SearchSettings(24, 9, number, ranking=False)
    trials = tried(settings, distance_to(tuple(range(5, 14))))
    assert sources(trials) == ["even", *expected]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_random_share(share: float, expected: int) -> None:
    settings = SearchSettings(30, 13, 30, random_share=share, ranking=False)
    trials = tried(settings, lambda mask: mask[0])
    assert Counter(sources(trials)[10:])["random"] == expected


@settings(max_examples=15)
@given(st.integers(4, 12), st.booleans(), st.integers(0, 3), st.data())
def test_masks_are_as_wanted_and_new(
    num_layers: int, allow_ends: bool, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_layers - 2))
    settings = SearchSettings(
        num_layers, count, 25, allow_ends, seed=seed, ranking=data.draw(st.booleans())
    )
    study = new_study()
    search(study, settings, lambda mask: float(sum(mask) % 5))
    found = masks(study.trials)
    assert len(found) == settings.masks == min(25, math.comb(len(settings.free), count))
    assert len(set(found)) == len(found) == len(scored_masks(study))
    for mask in found:
        assert len(mask) == count
        assert list(mask) == sorted(set(mask) & set(settings.free))
    if not allow_ends:
        assert not any({0, num_layers - 1} & set(mask) for mask in found)


def test_ends_are_skipped_when_they_may_be() -> None:
    study = new_study()
    best = search(study, SearchSettings(6, 2, 100, allow_ends=True), distance_to((0, 5)))
    assert len(study.trials) == 15, "all that there are"
    assert mask_of(best) == (0, 5)


def test_uniform_draws_are_uniform() -> None:
    settings = SearchSettings(30, 14, 400, random_share=1.0, ranking=False)
    trials = tried(settings, lambda mask: 0.0)[1:]
    counts = Counter(layer for mask in masks(trials) for layer in mask)
    assert set(counts) == set(range(1, 29))
    assert all(abs(count - 399 / 2) < 5 * math.sqrt(399 / 4) for count in counts.values())


@pytest.mark.parametrize("maximise", [False, True])
def test_bayesian_draws_beat_uniform_ones(maximise: bool) -> None:
    target = tuple(sorted(random.Random(3).sample(range(1, 29), 13)))
    sign = -1.0 if maximise else 1.0
    study = new_study(maximise)
    settings = SearchSettings(30, 13, 120, ranking=False)
    best = search(study, settings, lambda mask: sign * distance_to(target)(mask))
    by_source = {
        source: [sign * t.value for t in study.trials[60:] if t.user_attrs["source"] == source]
        for source in ("bayes", "random")
    }
    mean = {source: sum(scores) / len(scores) for source, scores in by_source.items()}
    assert mean["bayes"] < mean["random"] - 3
    assert sign * best.value <= 6 < min(by_source["random"]) + 3
    assert best.user_attrs["source"] == "bayes"


def test_the_same_seed_tries_the_same_masks() -> None:
    one, other, third = (
        masks(tried(SearchSettings(16, 6, 20, seed=seed), rugged)) for seed in (0, 0, 1)
    )
    assert one == other
    assert one[:2] == third[:2]
    assert len(set(one[2:]) & set(third[2:])) < 5


def test_cheapest_layers() -> None:
    alone = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.1}
    assert cheapest_layers(alone, 2, maximise=False) == (2, 4)
    assert cheapest_layers(alone, 2, maximise=True) == (1, 3)


@pytest.mark.parametrize("maximise", [False, True])
def test_the_first_of_equal_masks_is_best(tmp_path: Path, maximise: bool) -> None:
    for study in (new_study(maximise), begin_study(tmp_path / "a", {}, maximise)):
        best = search(study, SearchSettings(8, 3, 6, ranking=False), lambda mask: 1.0)
        assert best.number == 0 and best.user_attrs["source"] == "even"


# --- a planted best mask --------------------------------------------------------------------------


def plant(model: PreTrainedModel, free: Mask) -> None:
    """Layers that add nothing: skipping them changes no prediction."""
    with torch.no_grad():
        for layer in free:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("objective", ["divergence", "agreement"])
@pytest.mark.parametrize("ranking", [False, True])
def test_the_planted_mask_is_found(objective: str, ranking: bool) -> None:
    model = make_model("llama", 10)
    planted = (2, 3, 7)
    plant(model, planted)
    blocks = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    score = TeacherForcing(model, blocks, objective)
    study = new_study(maximise=objective == "agreement")
    assert math.comb(8, 3) == 56, "more than there are trials"
    best = search(study, SearchSettings(10, 3, 3 if ranking else 40, ranking=ranking), score)
    assert mask_of(best) == planted
    source = best.user_attrs["source"]
    assert source == "ranking" if ranking else source in ("random", "bayes")
    assert best.value == (1.0 if objective == "agreement" else pytest.approx(0, abs=2e-3))
    others = [trial.value for trial in study.trials if mask_of(trial) != planted]
    assert max(others) < 1 if objective == "agreement" else min(others) > 0.01


# --- stopping and going on ------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(score: Score, after: int) -> Score:
    """A score that cannot be computed more than so many times."""
    calls = iter(range(after))

    def stopped(mask: Mask) -> float:
        if next(calls, None) is None:
            raise Stop
        return score(mask)

    return stopped


def rugged(mask: Mask) -> float:
    """No two masks cost the same."""
    return random.Random(repr(mask)).random() + len(set(mask) ^ set(range(4, 10)))


@pytest.mark.parametrize("after", [0, 1, 5, 14, 15, 26, 27, 40, 54])
def test_a_resumed_search_tries_nothing_again(tmp_path: Path, after: int) -> None:
    settings, path = SearchSettings(16, 6, 40, seed=7), tmp_path / "record"
    asked = []

    def score(mask: Mask) -> float:
        asked.append(mask)
        return rugged(mask)

    study = begin_study(path, {}, maximise=False)
    assert scores_left(study, settings) == 54  # 14 layers alone, then 40 masks
    if after < 54:
        with pytest.raises(Stop):
            search(study, settings, stopping(score, after))
    else:
        search(study, settings, score)
    resumed = resume_study(path, {})
    before = scored_masks(resumed)
    assert (
        masks(list(before.values())) == asked[14:] and scores_left(resumed, settings) == 54 - after
    )
    best = search(resumed, settings, score)
    assert len(asked) == len(set(asked)) == 54, "whatever has a score is not scored again"
    assert scores_alone(resumed) == {layer: rugged((layer,)) for layer in range(1, 15)}
    again = scored_masks(resume_study(path, {}))
    assert {mask: trial.value for mask, trial in again.items()} == {
        mask: rugged(mask) for mask in asked[14:]
    }
    assert list(again)[: len(before)] == list(before)
    assert sources(list(again.values()))[:2] == ["even", "ranking"]
    assert mask_of(best) == min(asked[14:], key=rugged)


def test_a_resumed_search_goes_elsewhere(tmp_path: Path) -> None:
    """Its draws are not those that the first part began with."""
    settings = SearchSettings(30, 14, 20, ranking=False, random_share=1.0)
    search(begin_study(tmp_path / "a", {}, maximise=False), settings, rugged)
    draws = []

    def score(mask: Mask) -> float:
        draws.append(mask)
        return 0.0

    study = resume_study(tmp_path / "a", {})
    search(study, replace(settings, trials=40), score)
    assert len(draws) == 20 and not set(draws) & set(list(scored_masks(study))[:20])


def test_a_mask_that_waits_is_scored_once(tmp_path: Path) -> None:
    """A search may be killed after it put a mask into the queue and before it took it out."""
    study, settings = begin_study(tmp_path / "a", {}, maximise=False), SearchSettings(8, 3, 6)
    for _ in range(2):
        even = even_layers(8, 3)
        study.enqueue_trial({str(layer): layer in even for layer in settings.free})
    asked = []

    def score(mask: Mask) -> float:
        asked.append(mask)
        return rugged(mask)

    study = resume_study(tmp_path / "a", {})
    search(study, settings, score)
    assert len(asked) == len(set(asked)) == 6 + 6 and len(scored_masks(study)) == 6


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    path, settings = tmp_path / "a", SearchSettings(16, 6, 12, ranking=False)
    search(begin_study(path, {}, maximise=False), settings, rugged)
    path.write_text(path.read_text()[:-cut])
    resumed = resume_study(path, {})
    assert len(scored_masks(resumed)) == 11
    search(resumed, settings, rugged)
    assert len(scored_masks(resume_study(path, {}))) == 12


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\n",
        b"{}\n",
        b"[]\n",
        b"x\n",
        b'{"op_code": 99}\n',
        b'{"told": {}}\n',
        b'{"op_code":0,"worker_id":"a","study_name":"via-sd-mask","directions":[1]}\n',
        b'{"op_code":0,"worker_id":"a","study_name":"another","directions":[1]}\n',
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="is no record of a search: move it away"):
        resume_study(tmp_path / "a", {})
    assert (tmp_path / "a").read_bytes() == content


def test_a_record_with_a_broken_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    search(begin_study(path, {}, maximise=False), SearchSettings(8, 3, 3, ranking=False), rugged)
    path.write_text(path.read_text() + "x\n")
    with pytest.raises(UserError, match="is no record of a search: move it away"):
        resume_study(path, {})


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = tmp_path / "a", SearchSettings(8, 3, 6, ranking=False)
    study = begin_study(path, {}, maximise=False)
    search(study, replace(settings, trials=3), rugged)

    def full(self: JournalFileBackend, logs: list[Any]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(UserError, match="other could not be written"):
            begin_study(tmp_path / "other", {}, maximise=False)
        with pytest.raises(UserError) as refused:
            search(study, settings, rugged)
    assert not (tmp_path / "other").exists()
    assert str(refused.value) == f"{path} could not be written (No space left on device)."
    search(resume_study(path, {}), settings, rugged)
    assert len(scored_masks(resume_study(path, {}))) == 6


# --- speed ----------------------------------------------------------------------------------------

RUN = SpeedRun("target", None, [[3, 4, 5], [6, 7]], 8, "float32")


@pytest.mark.parametrize("drafter", [None, "small"])
def test_speed_is_tokens_by_seconds(monkeypatch: pytest.MonkeyPatch, drafter: str | None) -> None:
    """The engine's part, with an engine that says what it was asked."""
    made, asked, clock = [], [], iter([10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    worker = ["vllm_nvium.via_sd.cpu_worker.ViaSDCPUWorker"]

    class Engine:
        def __init__(self, model: str, **options: Any) -> None:
            made.append((model, options))
            parallel = SimpleNamespace(worker_cls=worker[0])
            config = SimpleNamespace(parallel_config=parallel)
            self.llm_engine = SimpleNamespace(vllm_config=config)

        def generate(self, prompts: list[Any], sampling: Any, use_tqdm: bool) -> list[Any]:
            asked.append((len(prompts), sampling))
            output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * sampling.max_tokens)])
            return [output] * len(prompts)

    fake = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = SpeedRun(**{**vars(RUN), "drafter": drafter})
    assert speed._generate(run, [1, 2, 5]) == 8.0  # 16 tokens in 1, 2 or 4 seconds
    (model, options), sampling = made[0], asked[-1][1]
    assert model == "target" and [count for count, _ in asked] == [2, 2, 2, 2]
    assert options["additional_config"] == {
        "via_sd": True, "via_sd_mask": "1-2,5", "via_sd_rounds": 2, "via_sd_window": 16
    }  # fmt: skip
    assert options["max_model_len"] == 3 + 8 + 16 and options["dtype"] == "float32"
    assert options["speculative_config"]["num_speculative_tokens"] == 5
    assert options["speculative_config"]["method"] == ("draft_model" if drafter else "ngram")
    assert options["speculative_config"].get("model") == drafter
    assert sampling.temperature == 0 and sampling.ignore_eos
    worker[0] = "vllm.v1.worker.cpu_worker.CPUWorker"
    with pytest.raises(UserError, match="VLLM_PLUGINS leaves vllm-nvium out"):
        speed._generate(run, [1])


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let the engine's process be this program."""
    program = tmp_path / "child.py"
    program.write_text(code)
    start = speed.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "vllm_nvium.checkpoints.mask_search.speed"]
        return start([command[0], str(program), *command[3:]], **options)

    monkeypatch.setattr(speed.subprocess, "run", run)


def test_speed_is_measured_in_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import sys; from vllm_nvium.checkpoints.mask_search import speed as m\n"
        "m._generate = lambda run, skipped: run.new_tokens + sum(skipped) / 4\n"
        "m.main(sys.argv[1:])\n"
    )
    child(monkeypatch, tmp_path, code)
    assert measure_speed(RUN, (1, 2)) == 8.75


def test_an_engine_on_a_cpu_leaves_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise vLLM asks for most of it; what the environment says counts."""
    code = (
        "import os, sys; from vllm_nvium.checkpoints.mask_search import speed as m\n"
        "m._generate = lambda run, skipped: float(os.environ['VLLM_CPU_KVCACHE_SPACE'])\n"
        "m.main(sys.argv[1:])\n"
    )
    child(monkeypatch, tmp_path, code)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert measure_speed(RUN, (1,)) == 7
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert measure_speed(RUN, (1,)) == 2


def test_an_engine_that_stops_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, tmp_path, "raise SystemExit('one\\nno memory.')")
    with pytest.raises(UserError, match=r"status 1 .* without layers 1,3 .* \(no memory\)\.$"):
        measure_speed(RUN, (1, 3))


def test_why_an_engine_stops_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the words of what was raised, not of what else was printed."""
    code = (
        "import sys; from pydantic import BaseModel\n"
        "from vllm_nvium.checkpoints.mask_search import speed as m\n"
        "class Drafter(BaseModel):\n    count: int\n"
        "def stop(run, skipped):\n"
        "    if skipped == [1]: raise ValueError('no memory.\\nmore')\n"
        "    Drafter(count='x')\n"
        "m._generate = stop\n"
        "print('other lines', file=sys.stderr)\n"
        "m.main(sys.argv[1:])\n"
    )
    child(monkeypatch, tmp_path, code)
    with pytest.raises(UserError, match=r"status 1 .* without layers 1 .* \(no memory\)\.$"):
        measure_speed(RUN, (1,))
    with pytest.raises(UserError, match=r"\(Input should be a valid integer"):
        measure_speed(RUN, (2,))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 layers, of which three can be skipped for nothing."""
    folder = tmp_path_factory.mktemp("targets") / "target"
    model = make_dense(folder, num_hidden_layers=LAYERS)
    plant(model, PLANTED)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(3, 256)}" for _ in range(2000)))
    return path


def command(target: Path | str, text: Path, out: Path, *more: str) -> list[str]:
    return ["search-mask", str(target), "--data", str(text), "-o", str(out), "--skip-ratio", "0.4",
            "--tokens", "128", "--block-size", "32", "--trials", "12", *more]  # fmt: skip


def test_command(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mask.json"
    assert main(command(target, text, out)) == 0
    mask = read_mask_file(out)
    assert mask.skipped == PLANTED == skipped_layers(str(out), LAYERS, mask.identity)
    assert (mask.trials, mask.objective, mask.alpha, mask.beta) == (12, "divergence", 0.0, 1.0)
    assert mask.calibration.prefixes == 128 and mask.calibration.sources == (str(text),)
    assert mask.score < 0.01 < mask.even_score and mask.made_with["optuna"]
    assert mask.weights == fingerprint(str(target), LAYERS) is not None
    assert {file.name for file in tmp_path.iterdir()} == {
        "mask.json",
        "mask.png",
        "mask.trials.jsonl",
    }
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    record = JournalStorage(JournalFileBackend(str(tmp_path / "mask.trials.jsonl")))
    study = optuna.load_study(study_name="via-sd-mask", storage=record)
    assert len(scores_alone(study)) == LAYERS - 2 and len(study.trials) == 12
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert rows["best"][2] == rows["ranking"][2] == "1,4,6"
    assert rows["even"][1] == f"{mask.even_score:.4g}"
    assert rows["mask"] == ["mask", "nats", "layers", "skipped"]


def test_a_picture_leaves_no_traces(tmp_path: Path) -> None:
    study = new_study()
    search(study, SearchSettings(8, 3, 6, ranking=False), rugged)
    study.ask()  # a trial without a score, as an interrupted search leaves it
    matplotlib.use("Agg")
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_history(tmp_path / "picture", study, "divergence")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before and not pyplot.get_fignums()


def test_command_by_agreement(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.json"
    more = ["--objective", "agreement", "--no-ranking", "--trials", "100", "--dtype", "bfloat16"]
    assert main(command(target, text, out, *more)) == 0
    mask = read_mask_file(out)
    assert mask.skipped == PLANTED and mask.score == 1.0 > mask.even_score
    assert (mask.alpha, mask.beta, mask.ranked) == (None, None, False)
    assert mask.trials == math.comb(LAYERS - 2, 3), "all that there are"


def test_command_by_speed(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def measured(run: SpeedRun, skipped: Mask) -> float:
        runs.append(run)
        return 100.0 - distance_to((2, 3, 5))(skipped)

    monkeypatch.setattr(search_target, "measure_speed", measured)
    out = tmp_path / "mask.json"
    more = ["--objective", "speed", "--drafter", str(target), "--trials", "20"]
    assert main(command(target, text, out, *more)) == 0
    mask = read_mask_file(out)
    assert (mask.skipped, mask.score, mask.drafter) == ((2, 3, 5), 100.0, str(target))
    assert not mask.ranked and len(runs) == 20, "engines are started for whole masks only"
    assert runs[0].new_tokens == 16 and len(runs[0].prompts) == 4 and len(runs[0].prompts[0]) == 16


def test_a_first_trial_that_fails_leaves_nothing(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The corrected command would be refused because of its record."""

    def stop(run: SpeedRun, skipped: Mask) -> float:
        raise UserError("vLLM stopped.")

    monkeypatch.setattr(search_target, "measure_speed", stop)
    out = tmp_path / "mask.json"
    assert "vLLM stopped" in refusal(capsys, command(target, text, out, "--objective", "speed"))
    assert not list(tmp_path.iterdir())


def test_command_goes_on(
    target: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, record = tmp_path / "mask.json", tmp_path / "mask.trials.jsonl"
    asked = []
    score, calls = TeacherForcing.__call__, iter(range(13))

    def counted(self: TeacherForcing, skipped: Mask) -> float:
        found = score(self, skipped)
        asked.extend([skipped] if skipped else [])
        return found

    def interrupted(self: TeacherForcing, skipped: Mask) -> float:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return counted(self, skipped)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherForcing, "__call__", interrupted)
        assert main(command(target, text, out, "--seed", "3")) == 130
    assert "interrupted; the same command with --resume goes on." in capsys.readouterr().err
    assert not out.exists() and record.is_file()
    monkeypatch.setattr(TeacherForcing, "__call__", counted)
    assert main(command(target, text, out, "--seed", "3", "--resume")) == 0
    mask = read_mask_file(out)
    assert (mask.skipped, mask.trials) == (PLANTED, 12)
    # More of the same.
    assert main(command(target, text, out, "--seed", "3", "--resume", "--trials", "15")) == 0
    assert read_mask_file(out).trials == 15 and read_mask_file(out).skipped == PLANTED
    assert len(asked) == len(set(asked)) == (LAYERS - 2) + 15
    # As many as there are: nothing is scored, and the results are written again.
    before = record.read_bytes()
    assert main(command(target, text, out, "--seed", "3", "--resume", "--trials", "12")) == 0
    assert read_mask_file(out).trials == 15 and record.read_bytes() == before


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    refusals = [line for line in lines if line.startswith("vllm-nvium search-mask: error: ")]
    assert len(refusals) == 1 and lines[-1] == refusals[0] and refusals[0].endswith(".")
    return refusals[0].removeprefix("vllm-nvium search-mask: error: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "kl"], "--objective is 'kl': input should be 'divergence', 'agree"),
        (["--dtype", "int8"], "--dtype is 'int8': input should be 'float32' or 'bfloat16'"),
        (["--trials", "0"], "--trials is '0': input should be greater than or equal to 1"),
        (["--block-size", "1"], "--block-size is '1': input should be greater than or"),
        (["--seed", "-1"], "--seed is '-1': input should be greater than or equal to 0"),
        (["--tokens", "31"], "--tokens is 31, which is less than one block of --block-size 32"),
        (["--skip-ratio", "0"], "--skip-ratio is '0': input should be greater than 0"),
        (["--skip-ratio", "1"], "--skip-ratio is '1': input should be less than 1"),
        (["--skip-ratio", "nan"], "--skip-ratio is 'nan': input should be"),
        (["--skip-ratio", "0.05"], "skips 0 of TARGET's 8 layers, and from 1 to 6 can be"),
        (["--skip-ratio", "0.9"], "skips 7 of TARGET's 8 layers, and from 1 to 6 can be"),
        (["--random-share", "1.5"], "--random-share is '1.5': input should be less than or"),
        (["--alpha", "1"], "--alpha is '1': input should be less than 1"),
        (["--alpha", "-0.1"], "--alpha is '-0.1': input should be greater than or equal"),
        (["--beta", "0.9"], "--beta is 0.9, and it must be a number of at least 1 - alpha = 1"),
        (["--alpha", "0.3", "--beta", "0.6"], "of at least 1 - alpha = 0.7"),
        (["--beta", "inf"], "--beta is 'inf': input should be a finite number"),
        (["--objective", "speed", "--beta", "1"], "--beta is 1.0, and --objective speed has none"),
        (["--objective", "agreement", "--alpha", "0"], "--alpha is 0.0, and --objective agreement"),
        (["--drafter", "x"], "--drafter is 'x', and --objective divergence drafts nothing"),
        (["--objective", "speed", "--no-ranking"], "--objective speed ranks no layers"),
        (["--objective", "speed", "--drafter", "none"], "--drafter is 'none', whose configuration"),
        (["--objective", "speed", "--block-size", "500", "--tokens", "500"], "a window of 16"),
        (["--resume"], "--resume needs the record of a search, and there is no"),
        (["--block-size", "1024", "--tokens", "1024"], "max_position_embeddings = 512, which"),
        (["--data", "none.txt"], "'none.txt' does not exist"),
        (["--tokens", "100000000"], "kept in memory for at most 8388608: give fewer"),
    ],
)
def test_refused_flags(
    target: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    said = refusal(capsys, command(target, text, tmp_path / "mask.json", *more))
    assert message in said
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_refused_outputs(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, message in (
        (tmp_path / "mask.yaml", "and the name of a mask file ends in .json"),
        (Path("/"), "-o is '/', and the name of a mask file ends in .json"),
        (tmp_path / "none" / "mask.json", "none does not exist"),
    ):
        assert message in refusal(capsys, command(target, text, out))
    for name in ("mask.json", "mask.png"):
        (tmp_path / name).write_text("precious")
        said = refusal(capsys, command(target, text, tmp_path / "mask.json"))
        assert f"{name} exists already" in said
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    (tmp_path / "folder.json").mkdir()
    said = refusal(capsys, command(target, text, tmp_path / "folder.json"))
    assert "which is a folder" in said


def test_refused_targets(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], nvium_checkpoint: Path
) -> None:
    out = tmp_path / "mask.json"
    assert "an N-vium model, which chooses" in refusal(capsys, command(nvium_checkpoint, text, out))
    GPT2Config(n_layer=2).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", 256)
    said = refusal(capsys, command(tmp_path / "gpt2", text, out))
    assert "whose model_type is 'gpt2', and masks can be searched for llama, mistral" in said
    said = refusal(capsys, command(tmp_path / "none", text, out))
    assert "whose configuration transformers cannot read" in said
    make_dense(tmp_path / "bare", num_hidden_layers=LAYERS)
    (tmp_path / "bare" / "model.safetensors").unlink()
    said = refusal(capsys, command(tmp_path / "bare", text, out))
    assert "whose weights cannot be loaded" in said
    assert not (tmp_path / "mask.trials.jsonl").exists()


def test_another_search_is_not_gone_on_with(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mask.json"
    assert main(command(target, text, out)) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    capsys.readouterr()
    said = refusal(capsys, command(target, text, out))
    assert "beside which mask.trials.jsonl holds a search already: give --resume" in said
    for more, message in (
        (["--seed", "1"], "--seed is 1, and the search in .* was begun with 0"),
        (["--skip-ratio", "0.5"], "--skip-ratio is 0.5, and .* begun with 0.4"),
        (["--beta", "1.5"], "--beta is 1.5, and .* begun with 1.0"),
        (["--objective", "agreement"], "--objective is 'agreement', and .* with 'divergence'"),
        (["--allow-ends"], "--allow-ends is True, and .* with False"),
        (["--no-ranking"], "--no-ranking is True, and .* with False"),
        (["--tokens", "160"], "--tokens is 160, and .* with 128"),
    ):
        said = refusal(capsys, command(target, text, out, "--resume", *more))
        assert re.search(message, said), said
        assert said.endswith("use that, or another -o.")
    # The same names, and something else in the files.
    other = tmp_path.parent / f"{tmp_path.name}-other"
    make_dense(other, num_hidden_layers=LAYERS, intermediate_size=64)
    content = text.read_text()
    try:
        text.write_text("w3 w4 w5 " * 1000)
        said = refusal(capsys, command(target, text, out, "--resume"))
        assert said.startswith("the SHA-256 of the text's tokens is")
    finally:
        text.write_text(content)
    said = refusal(capsys, command(other, text, out, "--resume"))
    assert said.startswith(f"TARGET is {str(other)!r}, and the search in")
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_weights_of_a_search_that_goes_on(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "mask.json"
    shutil.copytree(target, copy)
    assert main(command(copy, text, out)) == 0
    record = tmp_path / "mask.trials.jsonl"
    content, weights = record.read_text(), read_mask_file(out).weights
    assert weights == fingerprint(str(copy), LAYERS) and content.count(f'"{weights}"') == 1
    # A search that could not tell the weights.
    record.write_text(content.replace(f'"{weights}"', "null"))
    assert main(command(copy, text, out, "--resume")) == 0
    assert read_mask_file(out).weights == weights
    record.write_text(content)
    make_dense(tmp_path / "other", num_hidden_layers=LAYERS, seed=5)
    shutil.copy(tmp_path / "other" / "model.safetensors", copy)
    capsys.readouterr()
    said = refusal(capsys, command(copy, text, out, "--resume"))
    assert said.startswith(f"{WEIGHTS} is '") and f"was begun with '{weights}'" in said


def test_a_package_that_is_missing(
    target: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm_nvium.checkpoints.find_spec", lambda name: None)
    said = refusal(capsys, command(target, text, tmp_path / "mask.json"))
    assert said == "the package 'optuna' is not installed: pip install 'vllm-nvium[search]'."
