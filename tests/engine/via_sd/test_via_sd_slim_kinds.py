# SPDX-License-Identifier: Apache-2.0
"""Engines whose slim verifier is the target itself at low precision: tokens and KV cache are those
of plain decoding whatever it says, and it says what its weights stand for."""

import copy
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from test_via_sd_traces import MANY, Look, Served, crowd, greedy, play, via_sd_traces
from trace_engine import Arrival
from via_sd_engine import NGRAM, TARGET, ViaSDEngine, slim_logits

from tiny_models import make_dense, make_eagle
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.layers.low_precision_kernels import layers_for
from vllm_nvium.model_executor.layers.low_precision_linear import (
    Int4Linear,
    Int8Linear,
    LowPrecisionLinear,
)
from vllm_nvium.model_executor.via_sd.slim_quantised import Copies
from vllm_nvium.model_executor.via_sd.target_weights import shapes_of
from vllm_nvium.via_sd import loading
from vllm_nvium.via_sd.kinds import Shapes, shapes_of_config

KINDS = {"int4": Int4Linear, "int8": Int8Linear}
WINDOW = 12
# Logits are rounded to bfloat16 in every layer: candidates within this share of their spread may
# change places.
ROUNDING = 0.05


def at_low_precision(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """transformers' model with the weights that the copies stand for."""
    slim = copy.deepcopy(model)
    head = slim.lm_head.weight.data.clone()
    with torch.no_grad():
        for layer in slim.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(KINDS[kind].meant(module.weight))
        # Tied or not, embeddings stay as they are.
        slim.lm_head.weight = torch.nn.Parameter(KINDS[kind].meant(head))
    return slim


def check_slim_tokens(engine: ViaSDEngine, slim: PreTrainedModel, full: PreTrainedModel) -> int:
    """Every token of every window is what the slim verifier says, which reads the full model's
    K/V of verified positions."""
    for window in engine.handed:
        newest = [window.prefix[-1], *window.tokens]
        logits = slim_logits(full, (), window.prefix[:-1], newest, slim)[:-1]
        found = logits.gather(1, torch.tensor(window.tokens)[:, None]).squeeze(1)
        spread = logits.amax(dim=1) - logits.amin(dim=1)
        assert ((logits.amax(dim=1) - found) < ROUNDING * spread).all(), window
    return sum(len(window.tokens) for window in engine.handed)


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("target")
    reference = make_dense(path, "qwen2", seed=1, **TARGET)  # has biases
    options = {"slim": request.param, "window": WINDOW, "rounds": 3, "allow_paper_mode": True}
    # 10 blocks of 32: one long sequence or a few short ones fit, so preemption is common.
    yield Served(reference, ViaSDEngine(str(path), NGRAM, options, num_gpu_blocks_override=10))


@MANY
@given(
    trace=via_sd_traces(), drafts=st.integers(0, 4), rounds=st.sampled_from([1, 3, 12, "auto"]),
    window=st.sampled_from([1, 5, WINDOW]),
)  # fmt: skip
def test_tokens_are_greedy_decodings(served, trace, drafts, rounds, window) -> None:
    """With no drafts the slim verifier drafts for itself; the paper's rule is checked elsewhere."""
    served.engine.set_rounds(min(drafts, window), rounds, window)
    for arrival in trace:
        if arrival.params.temperature == 0.0:
            arrival.params.extra_args = None
    play(served, trace)


@pytest.mark.parametrize("drafts", [0, 4])
def test_the_slim_verifier_says_what_its_weights_stand_for(served: Served, drafts: int) -> None:
    engine = served.engine
    kind = engine.runner.via_sd.kind
    slim = at_low_precision(served.reference, kind)
    engine.set_rounds(drafts, 4, WINDOW)
    before = engine.runner.session.counts.accepted, engine.runner.session.counts.window_tokens
    engine.after_step = look = Look(engine, served.reference)
    try:
        play(served, crowd(5, size=4))
    finally:
        engine.after_step = None
    assert look.compared > 300, "K/V of plain decoding at every computed position"
    assert check_slim_tokens(engine, slim, served.reference) > 100
    counts = engine.runner.session.counts
    share = (counts.accepted - before[0]) / (counts.window_tokens - before[1])
    # Of random weights; what stands behind a token that is refused counts as refused.
    assert share > {"int4": 0.3, "int8": 0.8}[kind]


def test_attention_and_norms_are_the_targets_own(served: Served) -> None:
    runner = served.engine.runner
    model = runner.get_model().model
    for own, slim in zip(model.layers, runner.slim.layers.layers, strict=True):
        assert slim.self_attn.attn is own.self_attn.attn
        assert slim.input_layernorm is own.input_layernorm
        assert type(slim.mlp.down_proj.low_precision) is KINDS[runner.via_sd.kind]
        assert "low_precision" not in dict(own.mlp.down_proj.named_children())
        assert slim.self_attn.qkv_proj.bias is own.self_attn.qkv_proj.bias
    assert runner.slim.layers.embed_tokens is model.embed_tokens


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_family(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def see_shapes(*args: Any) -> Shapes:
        seen.append(shapes_of(*args))
        return seen[-1]

    monkeypatch.setattr(loading, "shapes_of", see_shapes)
    ties = {"tie_word_embeddings": kind.startswith("gemma")}
    reference = make_dense(tmp_path, kind, seed=1, **(TARGET | {"bigrams": 0.0} | ties))
    options = {"slim": "int8", "window": WINDOW, "rounds": 6}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, num_gpu_blocks_override=20)
    config = engine.runner.vllm_config
    assert seen == [shapes_of_config(config.model_config, config.parallel_config)]
    engine.after_step = look = Look(engine, reference)
    play(Served(reference, engine), crowd(3, size=4))
    assert look.compared > 300
    counts = engine.runner.session.counts
    assert counts.accepted / counts.window_tokens > 0.75


def test_layers_left_out_and_low_precision_together(tmp_path: Path) -> None:
    reference = make_dense(tmp_path, seed=1, **TARGET)
    options = {"slim": "int8", "mask": "2", "window": WINDOW, "rounds": 4}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, num_gpu_blocks_override=20)
    assert len(engine.runner.slim.layers.layers) == 3
    play(Served(reference, engine), crowd(3, size=4))
    assert engine.runner.session.counts.accepted > 50


@pytest.mark.parametrize("kind", KINDS)
def test_the_slim_verifier_is_compiled_at_start(kind: str, tmp_path: Path) -> None:
    reference = make_dense(tmp_path, seed=1, **TARGET)
    engine = ViaSDEngine(
        str(tmp_path), NGRAM, {"slim": kind, "window": WINDOW, "rounds": 6},
        num_gpu_blocks_override=20, enforce_eager=False, compilation_config={"backend": "eager"},
    )  # fmt: skip
    assert engine.runner.get_model().model.compiled, "of vLLM"
    assert engine.runner.slim.layers.compiled
    engine.handed.clear()
    play(Served(reference, engine), crowd(3, size=3))
    assert check_slim_tokens(engine, at_low_precision(reference, kind), reference) > 100


def test_a_start_that_names_nothing_but_the_switch(tmp_path: Path) -> None:
    """n-grams draft where the text repeats itself, and the slim verifier everywhere else."""
    reference = make_dense(tmp_path, seed=1, **TARGET)
    engine = ViaSDEngine(str(tmp_path), None, {"rounds": 6}, num_gpu_blocks_override=20)
    assert engine.runner.speculative_config.method == "ngram"
    assert engine.runner.slim is not None, "on this machine some kind is cheaper at some size"
    play(Served(reference, engine), crowd(3, size=4))
    assert max(engine.window_rounds) > 1


def test_where_nothing_is_cheaper_the_tier_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "layers_for", lambda *_: [])
    reference = make_dense(tmp_path, seed=1, **TARGET)
    engine = ViaSDEngine(str(tmp_path), NGRAM, {}, num_gpu_blocks_override=20)
    assert engine.runner.slim is None
    play(Served(reference, engine), crowd(3, size=4))
    counts = engine.runner.session.counts
    assert counts.slim_passes == 0 and counts.full_passes > 0


def test_a_kind_without_a_kernel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dense(tmp_path, seed=1, **(TARGET | {"intermediate_size": 96}))
    with pytest.raises(
        UserError,
        match="--via-sd-slim is 'int4', but 96 inputs do not divide into groups of 128 or 64; "
        "here int8, skip work",
    ):
        ViaSDEngine(str(tmp_path), NGRAM, {"slim": "int4"})
    with pytest.raises(
        UserError, match="--via-sd-slim is 'fp8', but this machine has no kernel for it; here int8"
    ):
        ViaSDEngine(str(tmp_path), NGRAM, {"slim": "fp8"})


def test_copies_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    make_dense(tmp_path, seed=1, **TARGET)
    monkeypatch.setattr(loading.psutil, "virtual_memory", Memory)
    with pytest.raises(UserError, match="--via-sd-slim is 'int8', whose copies need .* GiB, but"):
        ViaSDEngine(str(tmp_path), NGRAM, {"slim": "int8"})


def test_other_weights_are_copied_when_they_are_loaded(tmp_path: Path) -> None:
    """`reload_weights`, as training loops call it."""
    make_dense(tmp_path / "old", seed=1, **TARGET)
    new = make_dense(tmp_path / "new", seed=2, **TARGET)
    options = {"slim": "int8", "window": WINDOW, "rounds": 6}
    engine = ViaSDEngine(str(tmp_path / "old"), NGRAM, options, num_gpu_blocks_override=20)
    engine.runner.reload_weights(weights_path=str(tmp_path / "new"))
    engine.scheduler.reset_prefix_cache()
    play(Served(new, engine), crowd(3, size=4))
    assert check_slim_tokens(engine, at_low_precision(new, "int8"), new) > 100
    counts = engine.runner.session.counts
    assert counts.accepted / counts.window_tokens > 0.75


def test_weights_are_copied_once_when_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through vLLM's worker, which tells of written weights after each was processed."""
    make_dense(tmp_path / "old", seed=1, **TARGET)
    new = make_dense(tmp_path / "new", seed=2, **TARGET)
    copied, copy_one = Counter(), Copies._copy

    def count(self: Copies, module: Any) -> None:
        copied[module] += 1
        copy_one(self, module)

    monkeypatch.setattr(Copies, "_copy", count)
    options = {"slim": "int8", "window": WINDOW, "rounds": 6}
    engine = ViaSDEngine(str(tmp_path / "old"), NGRAM, options, num_gpu_blocks_override=20)
    # Four weights of each layer, and the unembedding.
    assert [*copied.values()] == [1] * (4 * 4 + 1)
    for times in (2, 3):
        engine.engine.collective_rpc(
            "reload_weights", kwargs={"weights_path": str(tmp_path / "new")}
        )
        assert [*copied.values()] == [times] * (4 * 4 + 1)
    engine.scheduler.reset_prefix_cache()
    play(Served(new, engine), crowd(3, size=4))
    assert check_slim_tokens(engine, at_low_precision(new, "int8"), new) > 100
    # Told that weights were written, with none processed: those that are there are copied anew.
    left = [m for m in copied if m.weight is not None and m.weight.numel()]
    engine.runner.get_model().weights_changed()
    assert [copied[module] for module in left] == [4] * len(left)
    # Loaded into the model by somebody's worker, part by part: once, before the next slim pass.
    newest = make_dense(tmp_path / "newest", seed=3, **TARGET).state_dict()
    model = engine.runner.get_model()
    for name in ("lm_head.weight", "model.norm.weight"):
        model.load_weights([(name, newest[name])])
    assert [copied[module] for module in left] == [4] * len(left)
    engine.run(crowd(4, size=2))
    assert [copied[module] for module in left] == [5] * len(left)
    head = engine.runner.slim._head.lm_head.low_precision
    x = torch.randn(3, newest["lm_head.weight"].shape[1])
    fresh = type(head)(newest["lm_head.weight"]).multiply(x)
    torch.testing.assert_close(head.multiply(x), fresh, rtol=0, atol=0)


# Layers of a checkpoint that are one in vLLM.
FUSED = {
    "self_attn.qkv_proj": [f"self_attn.{name}_proj" for name in "qkv"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


def check_all_copies(engine: ViaSDEngine, model: PreTrainedModel) -> None:
    """Each is what a copy of the model's weight is that was made just now."""
    slim, weights = engine.runner.slim, model.state_dict()
    pairs = [(slim._head.lm_head.low_precision, weights["lm_head.weight"])]
    for number, layer in enumerate(slim.layers.layers):
        for name, parts in FUSED.items():
            found = [weights[f"model.layers.{number}.{part}.weight"] for part in parts]
            pairs.append((layer.get_submodule(name).low_precision, torch.cat(found)))
    assert len(pairs) == 4 * len(slim.layers.layers) + 1
    for copied, weight in pairs:
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        fresh = type(copied)(weight).multiply(x)
        torch.testing.assert_close(copied.multiply(x), fresh, rtol=0, atol=0)


@pytest.mark.parametrize("layer", layers_for("cpu"), ids=lambda layer: layer.kernel)
def test_all_kernels_have_the_weights_that_were_loaded_last(
    layer: type[LowPrecisionLinear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "layers_for", lambda *_: [layer])
    models = [make_dense(tmp_path / str(seed), seed=seed, **TARGET) for seed in (1, 2, 3)]
    options = {"slim": layer.kind, "window": WINDOW, "rounds": 6}
    engine = ViaSDEngine(str(tmp_path / "1"), NGRAM, options, num_gpu_blocks_override=20)
    check_all_copies(engine, models[0])
    for seed in (2, 3):
        path = {"weights_path": str(tmp_path / str(seed))}
        engine.engine.collective_rpc("reload_weights", kwargs=path)
        # Nothing of them is left for the next step to make.
        copies = [each for each in engine.runner.slim.layers.modules() if isinstance(each, layer)]
        assert copies and not any(getattr(each, "_unpacked", None) is not None for each in copies)
        check_all_copies(engine, models[seed - 1])


def test_without_rounds_no_layers_are_left_out(tmp_path: Path) -> None:
    """The usual mask needs three layers, and nobody gave one."""
    make_dense(tmp_path, num_hidden_layers=2, **TARGET)
    engine = ViaSDEngine(str(tmp_path), NGRAM, {"rounds": 0, "window": WINDOW})
    assert engine.runner.slim.skipped == ()


def test_eagle_is_followed_by_the_slim_verifier_alone(tmp_path: Path) -> None:
    """Drafters that answer once per window: more rounds are the slim verifier's own."""
    reference = make_dense(tmp_path / "target", seed=1, **TARGET)
    make_eagle(tmp_path / "eagle", "eagle", reference)
    drafter = {"method": "eagle", "model": str(tmp_path / "eagle"), "num_speculative_tokens": 3}
    options = {"slim": "int8", "window": WINDOW, "rounds": 6}
    engine = ViaSDEngine(str(tmp_path / "target"), drafter, options, num_gpu_blocks_override=20)
    play(Served(reference, engine), crowd(3, size=4))
    assert max(engine.window_rounds) == 6


def test_one_prompt_alone(served: Served) -> None:
    """Long windows: the slim verifier's own tokens up to the last one that fits."""
    served.engine.set_rounds(0, 12, WINDOW)
    play(served, [Arrival(0, [5, 9, 33], greedy(60))])
    assert max(len(window.tokens) for window in served.engine.handed) == WINDOW
