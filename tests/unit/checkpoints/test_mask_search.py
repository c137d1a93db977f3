# SPDX-License-Identifier: Apache-2.0
"""The search for a slim verifier's layers: objectives against formulas written out, skipped layers
against models that never had them, a planted best mask that is found, and searches that are stopped
and go on as if they had not been."""

import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedModel,
)

from tiny_models import DENSE_KINDS, SIZES, make_dense, save_tokenizer
from vllm_nvium.checkpoints.mask_search import command as search_command
from vllm_nvium.checkpoints.mask_search import search as mask_search
from vllm_nvium.checkpoints.mask_search.command import WEIGHTS, best_so_far
from vllm_nvium.checkpoints.mask_search.search import (
    Journal,
    Plan,
    Score,
    Space,
    SpeedRun,
    TeacherForcing,
    Trial,
    agreement,
    best_of,
    divergence,
    measure_speed,
    most_tokens,
    propose,
    ranked_layers,
    search,
    without_layers,
)
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
    if kind in DENSE_KINDS:
        config_class, model_class = DENSE_KINDS[kind]
        sizes |= {"head_dim": 32} if kind == "qwen3" else {}
        return model_class(config_class(**sizes)).eval()
    windows = ["sliding_attention", "sliding_attention", "full_attention"] * num_layers
    sizes |= {"head_dim": 32, "sliding_window": 4, "layer_types": windows[:num_layers]}
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", [*DENSE_KINDS, "gemma2", "gemma3_text"])
def test_without_layers_is_a_model_that_never_had_them(kind: str) -> None:
    model, kept = make_model(kind, 6), [0, 2, 5]
    ids = torch.randint(3, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full = model(input_ids=ids, use_cache=False).logits
        with without_layers(model, (1, 3, 4)):
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
    with pytest.raises(RuntimeError), without_layers(model, (1,)):
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
        with without_layers(model, (1, 2)):
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


def distance_to(target: tuple[int, ...]) -> Score:
    """A landscape with one best mask: layers that are in one mask and not in the other."""
    return lambda mask: float(len(set(mask) ^ set(target)))


def tried(space: Space, plan: Plan, score: Score) -> list[Trial]:
    journal = Journal()
    search(space, plan, score, journal)
    return journal.trials


def test_order_of_sources() -> None:
    space, target = Space(24, 9), tuple(range(5, 14))
    trials = tried(space, Plan(40), distance_to(target))
    sources = [trial.source for trial in trials]
    assert sources[:2] == ["even", "ranking"]
    assert trials[0].skipped == even_layers(24, 9)
    # Until there is something to learn from every draw is uniform, then they take turns.
    assert set(sources[2:10]) == {"random"}
    assert sources[10:] == ["bayes", "random"] * 15


@pytest.mark.parametrize(
    ("number", "expected"),
    [(2, ["random"]), (6, ["random"] * 3 + ["bayes", "random"]),
     (8, ["random"] * 3 + ["bayes", "random"] * 2)],
)  # fmt: skip
def test_few_trials_are_not_all_uniform(number: int, expected: list[str]) -> None:
    """Where an engine is started for every mask, few are tried."""
    trials = tried(Space(24, 9), Plan(number, ranking=False), distance_to(tuple(range(5, 14))))
    assert [trial.source for trial in trials] == ["even", *expected]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_random_share(share: float, expected: int) -> None:
    trials = tried(Space(30, 13), Plan(30, random_share=share, ranking=False), lambda mask: mask[0])
    assert Counter(trial.source for trial in trials[10:])["random"] == expected


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 12), st.booleans(), st.integers(0, 3), st.data())
def test_masks_are_as_wanted_and_new(
    num_layers: int, allow_ends: bool, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_layers - 2))
    space = Space(num_layers, count, allow_ends)
    plan = Plan(25, seed=seed, ranking=data.draw(st.booleans()))
    trials = tried(space, plan, lambda mask: float(sum(mask) % 5))
    assert len(trials) == min(25, space.size)
    assert len({trial.skipped for trial in trials}) == len(trials)
    for trial in trials:
        assert len(trial.skipped) == count
        assert list(trial.skipped) == sorted(set(trial.skipped) & set(space.free))
    if not allow_ends:
        assert not any({0, num_layers - 1} & set(trial.skipped) for trial in trials)


def test_ends_are_skipped_when_they_may_be() -> None:
    trials = tried(Space(6, 2, allow_ends=True), Plan(100), distance_to((0, 5)))
    assert len(trials) == 15, "all that there are"
    assert best_of(trials, maximise=False).skipped == (0, 5)


def test_uniform_draws_are_uniform() -> None:
    space, plan = Space(30, 14), Plan(2000, random_share=1.0, ranking=False)
    counts = Counter(
        layer
        for number in range(1, 500)
        for layer in propose(space, plan, [Trial("even", (number,), 0.0)] * number, {})[1]
    )
    assert set(counts) == set(range(1, 29))
    assert all(abs(count - 499 / 2) < 5 * math.sqrt(499 / 4) for count in counts.values())


@pytest.mark.parametrize("maximise", [False, True])
def test_bayesian_draws_beat_uniform_ones(maximise: bool) -> None:
    space, target = Space(30, 13), tuple(sorted(random.Random(3).sample(range(1, 29), 13)))
    sign = -1.0 if maximise else 1.0
    trials = tried(
        space,
        Plan(120, ranking=False, maximise=maximise),
        lambda mask: sign * distance_to(target)(mask),
    )
    by_source = {
        source: [sign * t.score for t in trials[60:] if t.source == source]
        for source in ("bayes", "random")
    }
    mean = {source: sum(scores) / len(scores) for source, scores in by_source.items()}
    assert mean["bayes"] < mean["random"] - 3
    best = best_of(trials, maximise)
    assert sign * best.score <= 6 < min(by_source["random"]) + 3 and best.source == "bayes"


def test_ranked_layers_cost_least() -> None:
    alone = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.1}
    assert ranked_layers(Space(6, 2), Plan(1), alone) == (2, 4)
    assert ranked_layers(Space(6, 2), Plan(1, maximise=True), alone) == (1, 3)


def test_the_first_of_equal_masks_is_best() -> None:
    trials = [Trial("a", (1,), 2.0), Trial("b", (2,), 1.0), Trial("c", (3,), 1.0)]
    assert best_of(trials, maximise=False).source == "b"
    assert best_of(trials, maximise=True).source == "a"


# --- a planted best mask --------------------------------------------------------------------------


def plant(model: PreTrainedModel, free: tuple[int, ...]) -> None:
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
    journal = Journal()
    plan = Plan(3 if ranking else 40, ranking=ranking, maximise=objective == "agreement")
    space = Space(10, 3)
    assert space.size == 56, "more than there are trials"
    best = search(space, plan, score, journal)
    assert best.skipped == planted
    assert best.source == "ranking" if ranking else best.source in ("random", "bayes")
    assert best.score == (1.0 if objective == "agreement" else pytest.approx(0, abs=2e-3))
    others = [trial.score for trial in journal.trials if trial.skipped != planted]
    assert max(others) < 1 if objective == "agreement" else min(others) > 0.01


# --- stopping and going on ------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(score: Score, after: int) -> Score:
    """A score that cannot be computed more than so many times."""
    calls = iter(range(after))

    def stopped(mask: tuple[int, ...]) -> float:
        if next(calls, None) is None:
            raise Stop
        return score(mask)

    return stopped


def rugged(mask: tuple[int, ...]) -> float:
    """No two masks cost the same."""
    return random.Random(repr(mask)).random() + len(set(mask) ^ set(range(4, 10)))


@pytest.mark.parametrize("after", [0, 1, 5, 14, 15, 26, 27, 40, 54])
def test_resumed_is_unbroken(tmp_path: Path, after: int) -> None:
    space, plan = Space(16, 6), Plan(40, seed=7)
    whole = Journal.create(tmp_path / "whole", {})
    expected = search(space, plan, rugged, whole)

    path = tmp_path / "stopped"
    journal = Journal.create(path, {})
    # 14 layers alone, then 40 masks.
    if after < 54:
        with pytest.raises(Stop):
            search(space, plan, stopping(rugged, after), journal)
    else:
        search(space, plan, rugged, journal)
    resumed = Journal.resume(path, {})
    assert search(space, plan, stopping(rugged, 54 - after), resumed) == expected
    assert path.read_text() == whole.path.read_text()
    assert resumed.trials == whole.trials and resumed.alone == whole.alone


def test_a_longer_search_begins_like_a_shorter_one(tmp_path: Path) -> None:
    space = Space(16, 6)
    short = Journal.create(tmp_path / "a", {})
    search(space, Plan(20), rugged, short)
    search(space, Plan(30), rugged, resumed := Journal.resume(tmp_path / "a", {}))
    assert resumed.trials == tried(space, Plan(30), rugged)


def test_other_seeds_try_other_masks() -> None:
    one, other = (tried(Space(16, 6), Plan(20, seed=seed), rugged) for seed in (0, 1))
    assert one[:2] == other[:2]
    assert len({trial.skipped for trial in one[2:]} & {trial.skipped for trial in other[2:]}) < 5


def test_a_line_cut_short_is_done_again(tmp_path: Path) -> None:
    path, space, plan = tmp_path / "a", Space(16, 6), Plan(12, ranking=False)
    search(space, plan, rugged, Journal.create(path, {}))
    whole = path.read_text()
    path.write_text(whole[:-20])
    resumed = Journal.resume(path, {})
    assert len(resumed.trials) == 11
    search(space, plan, rugged, resumed)
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}\n",
        "[]\n",
        "x\n",
        '{"told": 3}\n',
        '{"told": {}}\nx\n',
        '{"told": {}}\n{"source": "a"}\n',
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_text(content)
    with pytest.raises(UserError, match="is no record of a search: move it away"):
        Journal.resume(tmp_path / "a", {})


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
    monkeypatch.setattr(mask_search, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = SpeedRun(**{**vars(RUN), "drafter": drafter})
    assert mask_search._generate(run, [1, 2, 5]) == 8.0  # 16 tokens in 1, 2 or 4 seconds
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
        mask_search._generate(run, [1])


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let the engine's process be this program."""
    program = tmp_path / "child.py"
    program.write_text(code)
    start = mask_search.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "vllm_nvium.checkpoints.mask_search.search"]
        return start([command[0], str(program), *command[3:]], **options)

    monkeypatch.setattr(mask_search.subprocess, "run", run)


def test_speed_is_measured_in_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import sys; from vllm_nvium.checkpoints.mask_search import search as m\n"
        "m._generate = lambda run, skipped: run.new_tokens + sum(skipped) / 4\n"
        "m.main(sys.argv[1:])\n"
    )
    child(monkeypatch, tmp_path, code)
    assert measure_speed(RUN, (1, 2)) == 8.75


def test_an_engine_on_a_cpu_leaves_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise vLLM asks for most of it; what the environment says counts."""
    code = (
        "import os, sys; from vllm_nvium.checkpoints.mask_search import search as m\n"
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
        "from vllm_nvium.checkpoints.mask_search import search as m\n"
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
    lines = [json.loads(line) for line in (tmp_path / "mask.trials.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + (LAYERS - 2) + 12
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert rows["best"][2] == rows["ranking"][2] == "1,4,6"
    assert rows["even"][1] == f"{mask.even_score:.4g}"
    assert rows["mask"] == ["mask", "nats", "layers", "skipped"]


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

    def speed(run: SpeedRun, skipped: tuple[int, ...]) -> float:
        runs.append(run)
        return 100.0 - distance_to((2, 3, 5))(skipped)

    monkeypatch.setattr(mask_search, "measure_speed", speed)
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

    def stop(run: SpeedRun, skipped: tuple[int, ...]) -> float:
        raise UserError("vLLM stopped.")

    monkeypatch.setattr(mask_search, "measure_speed", stop)
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
    whole, out = tmp_path / "whole.json", tmp_path / "mask.json"
    assert main(command(target, text, whole, "--seed", "3")) == 0
    with monkeypatch.context() as patch:
        score, calls = TeacherForcing.__call__, iter(range(13))

        def interrupted(self: TeacherForcing, skipped: tuple[int, ...]) -> float:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return score(self, skipped)

        patch.setattr(TeacherForcing, "__call__", interrupted)
        assert main(command(target, text, out, "--seed", "3")) == 130
    assert "interrupted; the same command with --resume goes on." in capsys.readouterr().err
    assert not out.exists()
    assert main(command(target, text, out, "--seed", "3", "--resume")) == 0
    assert read_mask_file(out) == read_mask_file(whole)
    records = [path.with_suffix(".trials.jsonl").read_text() for path in (out, whole)]
    assert records[0] == records[1]
    # More of the same.
    assert main(command(target, text, out, "--seed", "3", "--resume", "--trials", "15")) == 0
    assert read_mask_file(out).trials == 15


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    refusals = [line for line in lines if line.startswith("vllm-nvium search-mask: error: ")]
    assert len(refusals) == 1 and lines[-1] == refusals[0] and refusals[0].endswith(".")
    return refusals[0].removeprefix("vllm-nvium search-mask: error: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "kl"], "--objective is 'kl', and it must be one of divergence, agree"),
        (["--dtype", "int8"], "--dtype is 'int8', and it must be one of float32, bfloat16"),
        (["--trials", "0"], "--trials is 0, and it must be at least 1"),
        (["--block-size", "1"], "--block-size is 1, and it must be at least 2"),
        (["--seed", "-1"], "--seed is -1, and it must be at least 0"),
        (["--tokens", "31"], "--tokens is 31, which is less than one block of --block-size 32"),
        (["--skip-ratio", "0"], "--skip-ratio is 0.0, and it must be greater than 0"),
        (["--skip-ratio", "1"], "--skip-ratio is 1.0, and it must be greater than 0"),
        (["--skip-ratio", "nan"], "--skip-ratio is nan, and it must be greater than 0"),
        (["--skip-ratio", "0.05"], "skips 0 of TARGET's 8 layers, and from 1 to 6 can be"),
        (["--skip-ratio", "0.9"], "skips 7 of TARGET's 8 layers, and from 1 to 6 can be"),
        (["--random-share", "1.5"], "--random-share is 1.5, and a share lies in 0..1"),
        (["--alpha", "1"], "--alpha is 1.0, and it must be at least 0 and less than 1"),
        (["--alpha", "-0.1"], "--alpha is -0.1, and it must be at least 0 and less than 1"),
        (["--beta", "0.9"], "--beta is 0.9, and it must be a number of at least 1 - alpha = 1"),
        (["--alpha", "0.3", "--beta", "0.6"], "of at least 1 - alpha = 0.7"),
        (["--beta", "inf"], "--beta is inf, and it must be a number of at least"),
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
    lines = record.read_text().splitlines(keepends=True)
    told = json.loads(lines[0])["told"]
    weights = told.pop(WEIGHTS)
    assert weights == fingerprint(str(copy), LAYERS)
    # Records of before the weights were looked at lack them, others could not tell them.
    for began in (told, told | {WEIGHTS: None}):
        record.write_text("".join([json.dumps({"told": began}) + "\n", *lines[1:]]))
        assert main(command(copy, text, out, "--resume")) == 0
        assert read_mask_file(out).weights == weights
    record.write_text("".join(lines))
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
    monkeypatch.setattr(search_command, "find_spec", lambda name: None)
    said = refusal(capsys, command(target, text, tmp_path / "mask.json"))
    assert said == "the package 'optuna' is not installed: pip install 'vllm-nvium[search]'."


def test_best_so_far() -> None:
    assert best_so_far([3.0, 4.0, 2.0, 5.0], min) == [3.0, 3.0, 2.0, 2.0]
    assert best_so_far([3.0, 4.0, 2.0, 5.0], max) == [3.0, 4.0, 4.0, 5.0]
