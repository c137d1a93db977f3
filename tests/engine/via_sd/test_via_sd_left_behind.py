# SPDX-License-Identifier: Apache-2.0
"""What a slim pass, a turn of a conversation and a part of new weights leave behind changes nothing
for what comes after them."""

import asyncio
import copy
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine
from via_sd_engine import NGRAM, ViaSDEngine
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.sampling_params import RequestOutputKind

from tiny_models import make_dense
from vllm_nvium.model_executor.layers.low_precision_linear import Int8Linear, bounded
from vllm_nvium.model_executor.via_sd.slim import FiniteInputs
from vllm_nvium.model_executor.via_sd.slim_quantised import Copies

SIZES: dict[str, Any] = {"vocab_size": 64, "intermediate_size": 128, "bigrams": 0.7}


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


# --- K/V of tokens that nobody verified -----------------------------------------------------------


def make_overflowing(path: Path) -> None:
    """A target in float16 one of whose outputs is a difference of two equal large numbers. Rounded
    weights do not cancel, and their result is too large for float16."""
    make_dense(path, seed=1, dtype=torch.float16, whisper=0.5, **SIZES)
    file = path / "model.safetensors"
    weights = load_file(file)
    gate, up, down = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    weights[up] = weights[gate].clone()
    weights[gate][1] = weights[gate][0]
    weights[up][1] = weights[up][0]
    weights[down][0] = 0
    weights[down][0, 0], weights[down][0, 1] = 30000.0, -30000.0
    save_file(weights, file, metadata={"format": "pt"})


def caches(engine: TraceEngine) -> list[torch.Tensor]:
    layers = engine.runner.compilation_config.static_forward_context.values()
    return [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]


def make_overflowing_where_a_layer_is_left_out(path: Path) -> None:
    """A target in float16 whose layer 2 takes back what layer 1 has added, 40,000; layer 3 adds it
    again, and layer 4 takes it back. Without layer 2 that is more than float16 has, and layer 5
    would read it."""
    make_dense(path, seed=1, dtype=torch.float16, whisper=0.5, num_hidden_layers=6, **SIZES)
    file = path / "model.safetensors"
    weights = load_file(file)
    # One channel is so large in all tokens that norms make sqrt(64) = 8 of it, up to signs.
    weights["model.embed_tokens.weight"][:, 0] = 100.0
    weights["model.norm.weight"][0] = 0.0
    for layer, sign in ((1, 1.0), (2, -1.0), (3, 1.0), (4, -1.0)):
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight"
        gate, up, down = (weights[name.format(part)] for part in ("gate", "up", "down"))
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"].fill_(1.0)
        gate[0], up[0], down[0] = 0.0, 0.0, 0.0
        gate[0, 0] = up[0, 0] = 0.5
        down[:, 0] = 0.0
        down[0, 0] = sign * 40000.0 / (4.0 * 4.0 * torch.tensor(4.0).sigmoid())
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "tier"),
    [
        (make_overflowing, {"slim": "int4"}),
        (make_overflowing_where_a_layer_is_left_out, {"slim": "skip", "mask": "2"}),
    ],
    ids=["int4", "skip"],
)
def test_a_slim_pass_that_overflows_leaves_numbers(
    make: Callable[[Path], None], tier: dict[str, Any], tmp_path: Path
) -> None:
    """Two requests are aborted while their windows wait. Their blocks go to requests without the
    tier, which must not read a NaN there."""
    make(tmp_path)
    texts = [[random.Random(i).randrange(3, 64) for _ in range(20)] for i in range(5)]

    def trace(off: dict[str, Any] | None) -> list[Arrival]:
        first = [Arrival(3 * i, texts[i], greedy(30), abort_after=7) for i in range(2)]
        rest = [Arrival(3 * i, texts[i], greedy(30, extra_args=off)) for i in range(2, 5)]
        return first + rest

    common = {"dtype": "float16", "num_gpu_blocks_override": 12}
    plain = TraceEngine(str(tmp_path), **common)
    plain.run(trace(None))
    options = tier | {"rounds": 4, "window": 12}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, **common)
    engine.run(trace({"via_sd": "off"}))
    assert engine.runner.session.counts.slim_passes > 5
    assert all(cache.isfinite().all() for cache in caches(engine))
    for name in ("2", "3", "4"):
        assert engine.emitted[name].tokens == plain.emitted[name].tokens
    late = [Arrival(0, [5, 6, 7, 8] * 10, greedy(100))]
    plain.run(late)
    late[0].params.extra_args = {"via_sd": "off"}
    engine.run(late)
    assert engine.emitted["0"].tokens == plain.emitted["0"].tokens


# --- weights that come in parts -------------------------------------------------------------------


@dataclass
class Nothing:
    pass


@dataclass
class Part:
    names: list[str]
    path: str


class FromFile(WeightTransferEngine):
    """As a trainer sends weights, but out of a file. Start and finish are those of vLLM's own."""

    init_info_cls, update_info_cls = Nothing, Part

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: Any) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        weights = load_file(update_info.path)
        self.model.load_weights((name, weights[name]) for name in update_info.names)

    def shutdown(self) -> None:
        pass


def test_weights_that_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config.weight_transfer import WeightTransferConfig

    copied: Counter[Any] = Counter()
    copy_one = Copies._copy

    def count(self: Copies, module: Any) -> None:
        copied[module] += 1
        copy_one(self, module)

    monkeypatch.setattr(Copies, "_copy", count)
    WeightTransferEngineFactory.register_engine("file", FromFile)
    make_dense(tmp_path / "old", seed=1, whisper=0.2, **SIZES)
    make_dense(tmp_path / "new", seed=2, whisper=0.2, **SIZES)
    file = tmp_path / "new" / "model.safetensors"
    names = sorted(load_file(file))
    common = {
        "num_gpu_blocks_override": 50,
        "weight_transfer_config": WeightTransferConfig(backend="file"),
    }
    arrival = Arrival(0, [random.Random(0).randrange(3, 64) for _ in range(35)], greedy(30))

    def answer_of(engine: TraceEngine, update: bool) -> list[int]:
        if update:
            worker = engine.engine.engine_core.engine_core.model_executor.driver_worker.worker
            worker.start_weight_update()
            for first in range(0, len(names), 8):
                worker.update_weights({"names": names[first : first + 8], "path": str(file)})
            worker.finish_weight_update()
            engine.scheduler.reset_prefix_cache()
        engine.run([arrival])
        return engine.emitted["0"].tokens

    want = answer_of(TraceEngine(str(tmp_path / "new"), num_gpu_blocks_override=50), update=False)
    options = {"slim": "int8", "rounds": 4, "window": 12}
    engine = ViaSDEngine(str(tmp_path / "old"), NGRAM, options, **common)
    assert answer_of(engine, update=True) == want
    # The copies are those of the new weights: a copy of other weights would keep next to nothing.
    counts = engine.runner.session.counts
    assert counts.accepted > 0.8 * counts.window_tokens > 5
    # At start, in the update and at its end, of however many parts that is.
    assert len(copied) == 4 * 4 + 1 and max(copied.values()) <= 3 < len(names) / 8


# --- conversations that go on ---------------------------------------------------------------------

REPEATED = ([random.Random(0).randrange(3, 64) for _ in range(17)] * 8)[:120]
TURNS = [REPEATED[:40], REPEATED[3:20], REPEATED[50:70], REPEATED[5:25]]


async def converse(model: str, params: dict[str, Any], engine: dict[str, Any]) -> list[Any]:
    """What is answered to each turn, and why the answer ended."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_num_seqs=4,
            num_gpu_blocks_override=200,
            async_scheduling=False,
            gpu_memory_utilization=0.3,
            **engine,
        )
    )

    async def turns() -> AsyncIterator[StreamingInput]:
        for turn in TURNS:
            yield StreamingInput(prompt={"prompt_token_ids": list(turn)}, sampling_params=None)

    found: list[Any] = []
    tokens: list[int] = []
    sampling = SamplingParams(
        temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA, **params
    )
    try:
        async for output in llm.generate(turns(), sampling, request_id="a"):
            tokens += output.outputs[0].token_ids
            if output.outputs[0].finish_reason:
                found.append((tokens, output.outputs[0].finish_reason))
                tokens = []
    finally:
        llm.shutdown()
    return found


@pytest.mark.parametrize(
    ("params", "rounds"),
    [({"max_tokens": 30, "stop_token_ids": list(range(3, 64, 7))}, 6), ({"max_tokens": 13}, 0)],
)
def test_turns_of_a_conversation(params: dict[str, Any], rounds: int, tmp_path: Path) -> None:
    make_dense(
        tmp_path, seed=1, max_position_embeddings=2048, **(SIZES | {"bigrams": 0.4, "whisper": 0.5})
    )
    plain = asyncio.run(converse(str(tmp_path), params, {}))
    options = {"via_sd": True, "via_sd_slim": "int8", "via_sd_window": 12, "via_sd_rounds": rounds}
    engine = {"speculative_config": NGRAM, "additional_config": options}
    assert len(plain) == len(TURNS)
    assert asyncio.run(converse(str(tmp_path), params, engine)) == plain


def talk(
    engine: TraceEngine, params: SamplingParams, at_once: bool, beside: list[SamplingParams]
) -> list[list[int]]:
    """A conversation in an engine of this process.

    Args:
        at_once: all turns come before the first is answered; otherwise each after an answer.
        beside: of ordinary requests that run meanwhile.

    Returns:
        tokens of each turn's answer, then those of the ordinary requests.
    """
    llm, turns = engine.engine, [list(turn) for turn in TURNS]

    def send(turn: list[int], is_last: bool = False) -> None:
        request = llm.input_processor.process_inputs(
            "talk", {"prompt_token_ids": turn}, params,
            supported_tasks=llm.get_supported_tasks(), resumable=not is_last,
        )  # fmt: skip
        request.external_req_id = request.request_id
        llm.output_processor.add_request(request, None, None, 0)
        # As if it went to another process: both sides add to the list of tokens.
        llm.engine_core.add_request(copy.deepcopy(request))

    others: dict[str, list[int]] = {}
    for number, each in enumerate(beside):
        others[f"other{number}"] = []
        prompt = {"prompt_token_ids": REPEATED[number : number + 20]}
        llm.add_request(f"other{number}", prompt, each)
    for _ in range(len(turns) if at_once else 1):
        send(turns.pop(0))
    answers: list[list[int]] = [[]]
    for _ in range(400):
        for output in llm.step():
            [part] = output.outputs
            if output.request_id != "talk":
                others[output.request_id] += part.token_ids
                continue
            answers[-1] += part.token_ids
            if part.finish_reason is not None:
                answers.append([])
                if turns:
                    send(turns.pop(0))
        if len(answers) > len(TURNS) and not engine.scheduler.running:
            break
    send([0], is_last=True)
    llm.step()
    assert answers.pop() == [] and len(answers) == len(TURNS)
    return [*answers, *others.values()]


def test_a_conversation_with_a_seed(tmp_path: Path) -> None:
    """It gets what plain vLLM draws with the seed, alone and beside requests that have drafts, and
    nobody drafts for it."""
    make_dense(tmp_path, seed=1, **(SIZES | {"whisper": 0.3}))
    common = {"num_gpu_blocks_override": 60, "max_num_batched_tokens": 512}
    plain = TraceEngine(str(tmp_path), **common)
    engine = ViaSDEngine(str(tmp_path), NGRAM, {"slim": "int8", "window": 12}, **common)
    params = SamplingParams(
        temperature=0.8, seed=5, max_tokens=30, ignore_eos=True, stop_token_ids=[7, 19, 40],
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    beside = [
        SamplingParams(
            temperature=number / 2, seed=number, max_tokens=120, ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        for number in range(3)
    ]  # fmt: skip
    counts = engine.runner.session.counts
    for at_once in (True, False):
        wanted = talk(plain, params, at_once, beside)
        assert len({*map(len, wanted[: len(TURNS)])}) > 1, "some turns end at a stop token"
        for rounds in (0, 4):
            engine.set_rounds(4, rounds)
            before = counts.slim_passes
            assert talk(engine, params, at_once, []) == wanted[: len(TURNS)]
            assert counts.slim_passes == before
            assert talk(engine, params, at_once, beside) == wanted
            assert (counts.slim_passes > before) == (rounds > 0)
            engine.scheduler.reset_prefix_cache()


def test_layers_get_finite_inputs_in_float16_only() -> None:
    """Other dtypes have room enough, and pay nothing."""
    large = torch.tensor([3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1.0])
    assert bounded(large, torch.float16).tolist() == [
        32752.0,
        -32752.0,
        32752.0,
        -32752.0,
        0.0,
        1.0,
    ]
    assert bounded(large, torch.bfloat16)[:4].tolist() == large[:4].bfloat16().tolist()
    assert bounded(large, torch.float32) is large


def test_a_layer_gets_numbers_whatever_came_out_of_the_one_before() -> None:
    class Layer(torch.nn.Module):
        def forward(self, positions: Any, hidden: Any, residual: Any, scale: float) -> Any:
            return positions, hidden * scale, residual

    layer = FiniteInputs(Layer())
    wrong = torch.tensor([[torch.nan, torch.inf, -torch.inf, 60000.0, 3.0]]).half()
    positions = torch.zeros(1)
    for residual in (wrong, None):
        same, hidden, left = layer(positions, wrong, residual, scale=1.0)
        assert same is positions
        assert hidden.tolist() == [[0.0, 32752.0, -32752.0, 32752.0, 3.0]]
        assert left is None if residual is None else left.equal(hidden)
        # What norms add up first stays a number.
        assert (hidden + hidden).isfinite().all()


def test_products_of_rounded_weights_are_numbers() -> None:
    layer = Int8Linear(torch.full((64, 64), 1000.0, dtype=torch.float16))
    product = layer.multiply(torch.full((2, 64), 1000.0, dtype=torch.float16))
    assert product.unique().tolist() == [32752.0]
