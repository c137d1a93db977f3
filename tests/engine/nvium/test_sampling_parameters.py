# SPDX-License-Identifier: Apache-2.0
"""With hazards of zero an N-vium model answers as the dense model it was made from, whatever a
request asks of the sampler and under both laws. And what is not a number stays none, weights that
are loaded again are the ones that count, and logits processors of the user's own see the mixture.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)
from vllm.v1.sample.logits_processor import LogitsProcessor

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine

from tiny_models import make_dense, make_nvium, save_character_tokenizer
from vllm_nvium.checkpoints.convert import convert
from vllm_nvium.checkpoints.convert.dense import DenseOptions

PROMPTS = [[60, 60, 9, 8, 7], [5] * 12, [11, 12, 13] * 13]

# A value that does something, for each field that a user can set. None of them is "the default".
FIELDS: dict[str, dict[str, Any]] = {
    "n": {"n": 2, "seed": 4, "temperature": 1.0, "output_kind": RequestOutputKind.FINAL_ONLY},
    "presence_penalty": {"presence_penalty": 0.9},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "temperature": {"temperature": 0.7, "seed": 1},
    "watermarking": {"watermarking": None},
    "top_p": {"top_p": 0.6, "temperature": 1.0, "seed": 1},
    "top_k": {"top_k": 3, "temperature": 1.0, "seed": 1},
    "min_p": {"min_p": 0.3, "temperature": 1.0, "seed": 1},
    "seed": {"seed": 9, "temperature": 1.0},
    "stop": {"stop": ["a", "B", "7"]},
    "stop_token_ids": {"stop_token_ids": list(range(20, 90))},
    "ignore_eos": {"ignore_eos": False, "temperature": 1.0, "seed": 2},
    "max_tokens": {"max_tokens": 3},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": list(range(20, 90))},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "logprob_token_ids": {"logprob_token_ids": [3, 9]},
    "flat_logprobs": {"flat_logprobs": False, "logprobs": 1},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": ["a", "B", "7"]},
    "output_kind": {"output_kind": RequestOutputKind.FINAL_ONLY},
    "stream_interval": {"stream_interval": 3},
    "structured_outputs": {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
    "logit_bias": {"logit_bias": {5: 7.0, 60: -9.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(30, 80))},
    "extra_args": {"extra_args": {"somebody_elses": 1}},
    "bad_words": {"bad_words": ["Z", "a", "bc"]},
    "skip_reading_prefix_cache": {"skip_reading_prefix_cache": True},
    "repetition_detection": {
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=2, min_pattern_size=1, min_count=2
        )
    },
}
# They need a reasoning parser, a mixture of experts, a recorded trace or Model Runner V2.
ELSEWHERE = {
    "thinking_token_budget",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
}
# What vLLM itself sets.
INTERNAL = {"skip_clone", "output_text_buffer_length"}


def test_no_field_is_forgotten() -> None:
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public == set(FIELDS) | ELSEWHERE | INTERNAL


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TraceEngine, TraceEngine]]:
    path = tmp_path_factory.mktemp("twins")
    make_dense(path / "dense", seed=3, vocab_size=98)
    save_character_tokenizer(path / "dense")
    convert(path / "dense", path / "nvium", DenseOptions(exit_layers=[1, 2, 3]))
    # No chunks: stock vLLM on CPU cannot draw for a seeded request whose prompt comes in chunks.
    whole = {"max_num_batched_tokens": 256}
    yield TraceEngine(str(path / "dense"), **whole), TraceEngine(str(path / "nvium"), **whole)


def answers(engine: TraceEngine, fields: dict[str, Any], law: str | None) -> list[Any]:
    own = {"nvium_sampling": law} if law else {}
    made = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | fields
    made["extra_args"] = (made.get("extra_args") or {}) | own
    engine.run([Arrival(i, list(p), SamplingParams(**made)) for i, p in enumerate(PROMPTS)])
    return [engine.outputs[str(i)] for i in range(len(PROMPTS))]


def numbers(logprobs: Any) -> list[dict[int, float]]:
    return [{t: e.logprob for t, e in (entry or {}).items()} for entry in logprobs or []]


@pytest.mark.parametrize("law", ["routed", "mixture"])
@pytest.mark.parametrize("field", FIELDS)
def test_answers_are_the_dense_models(engines: Any, field: str, law: str) -> None:
    dense, nvium = engines
    for expected, got in zip(
        answers(dense, FIELDS[field], None), answers(nvium, FIELDS[field], law), strict=True
    ):
        assert len(expected.outputs) == len(got.outputs)
        for one, other in zip(expected.outputs, got.outputs, strict=True):
            assert list(other.token_ids) == list(one.token_ids)
            assert (other.text, other.finish_reason) == (one.text, one.finish_reason)
            assert other.stop_reason == one.stop_reason
            check_numbers(numbers(one.logprobs), numbers(other.logprobs))
        check_numbers(numbers(expected.prompt_logprobs), numbers(got.prompt_logprobs))


def check_numbers(expected: list[dict[int, float]], got: list[dict[int, float]]) -> None:
    assert [set(entry) for entry in got] == [set(entry) for entry in expected]
    for one, other in zip(expected, got, strict=True):
        assert other == pytest.approx(one, abs=1e-4)


@pytest.fixture
def nvium(tmp_path: Path) -> TraceEngine:
    make_nvium(tmp_path / "nvium", seed=1)
    return TraceEngine(str(tmp_path / "nvium"), num_gpu_blocks_override=20)


@pytest.mark.parametrize("law", ["routed", "mixture"])
def test_what_is_not_a_number_stays_none(nvium: TraceEngine, law: str) -> None:
    """A broken router has no hazard, so no law says what comes next."""
    nvium.runner.model.exits[0].router.head.bias.fill_(torch.nan)
    fields = {"temperature": 1.0, "seed": 1, "logprobs": 2, "max_tokens": 3}
    (output, *_) = answers(nvium, fields, law)
    seen = nvium.emitted["0"].logits
    assert len(output.outputs[0].token_ids) == 3
    assert seen and all(row.isnan().all() for row in seen.values())


def test_weights_that_are_loaded_again_count(nvium: TraceEngine, tmp_path: Path) -> None:
    make_nvium(tmp_path / "constant", seed=1, hazards=[1.0, 0.0, 0.0])
    constant, trained = (
        load_file(tmp_path / name / "model.safetensors") for name in ("constant", "nvium")
    )
    model = nvium.runner.model
    before = answers(nvium, {"temperature": 1.0, "seed": 1}, "routed")[0].outputs[0].token_ids
    assert model.constant_margins is None
    heads = [name for name in trained if ".router.head." in name]
    assert all(torch.equal(constant[name], trained[name]) for name in set(trained) - set(heads))
    for name in heads:  # one at a time, as weight updates may come
        model.load_weights([(name, constant[name])])
    answers(nvium, {"temperature": 1.0, "seed": 1}, "routed")
    assert model.constant_margins is not None
    assert set(nvium.emitted["0"].exits.values()) == {0}
    nvium.runner.reload_weights(weights_iterator=iter(trained.items()))
    nvium.engine.reset_prefix_cache()
    after = answers(nvium, {"temperature": 1.0, "seed": 1}, "routed")[0].outputs[0].token_ids
    assert model.constant_margins is None
    assert list(after) == list(before)


def test_weights_that_are_written_in_place_count(nvium: TraceEngine, tmp_path: Path) -> None:
    """Updates in vLLM's own layout, as in reinforcement learning: `load_weights` is not called."""
    make_nvium(tmp_path / "constant", seed=1, hazards=[1.0, 0.0, 0.0])
    path = tmp_path / "constant" / "model.safetensors"
    constant = {name: w for name, w in load_file(path).items() if ".router.head." in name}
    model = nvium.runner.model
    routers = {name: w.clone() for name, w in model.named_parameters() if name in constant}
    before = answers(nvium, {"temperature": 1.0, "seed": 1}, "routed")[0].outputs[0].token_ids
    for written, are_constant in ((constant, True), (routers, False)):
        options = {"weights_iterator": list(written.items()), "is_checkpoint_format": False}
        nvium.engine.collective_rpc("reload_weights", kwargs=options)
        nvium.engine.reset_prefix_cache()
        after = answers(nvium, {"temperature": 1.0, "seed": 1}, "routed")[0].outputs[0].token_ids
        assert (model.constant_margins is not None) == are_constant
        assert (set(nvium.emitted["0"].exits.values()) == {0}) == are_constant
    assert list(after) == list(before)


class Ban(LogitsProcessor):
    """Forbids every token below 200, and so the favourites of most texts."""

    def __init__(self, *args: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, :200] = -torch.inf
        return logits


def test_an_installed_logits_processor_sees_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is an entry point is named in no option: only vLLM knows that it is there."""
    monkeypatch.setattr("vllm.v1.sample.logits_processor._load_logitsprocs_plugins", lambda: [Ban])
    reference = make_nvium(tmp_path / "nvium", seed=1)
    engine = TraceEngine(str(tmp_path / "nvium"), num_gpu_blocks_override=20)
    for output in answers(engine, {"temperature": 0.0}, "mixture"):
        tokens = list(output.outputs[0].token_ids)
        with torch.no_grad():
            law = reference(torch.tensor([output.prompt_token_ids + tokens])).logits[0]
        for i, token in enumerate(tokens):
            row = law[len(output.prompt_token_ids) - 1 + i, 200:]
            assert token >= 200 and row.max() - row[token - 200] < 1e-4
