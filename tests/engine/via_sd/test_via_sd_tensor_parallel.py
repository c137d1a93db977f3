# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks with VIA-SD give the tokens of plain decoding on one, whatever is a
part of what: layers, copies of weights, the vocabulary. What clocks decide, the first rank decides.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_nvium.errors import UserError

NEW_TOKENS = 40
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}  # fmt: skip
TARGET: dict[str, Any] = {
    "vocab_size": 64,
    # A rank has halves of these, and int4 groups are of 64 inputs.
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bigrams": 0.7,
    "whisper": 0.2,
}
# What a rank's clock says of a slim pass, compared with rank 0's.
SLOWER = 1000.0
# Set for processes that start engines, and so for their ranks.
CLOCKS = "TEST_CLOCKS_DIFFER"


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and sampling parameters, all in one batch; the last has no seed."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 12},
        {"temperature": 0.7, "seed": 13, "top_k": 20},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "seed": 14, "min_p": 0.05},
        {"temperature": 1.0},
    ]
    return [([3 + (7 * n + 5 * k) % 60 for k in range(9 + 6 * n)], x) for n, x in enumerate(kinds)]


def run(model: str, ranks: int, engine: dict[str, Any]) -> dict[str, Any]:
    """Tokens of the requests that repeat, and what each rank knows of its windows."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        # Room for some of the requests at a time: others are preempted.
        num_gpu_blocks_override=20,
        block_size=32,
        enforce_eager=True,
        tensor_parallel_size=ranks,
        disable_log_stats=False,
        seed=0,
        **engine,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests()]
    params = [
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **kind) for _, kind in requests()
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    of_ranks = llm.collective_rpc(windows_of_rank) if "additional_config" in engine else []
    return {"tokens": tokens[:-1], "lengths": [*map(len, tokens)], "ranks": of_ranks}


def make_target(path: Path, **changes: Any) -> None:
    # vLLM's workers import this file, and would wait for transformers' models.
    from tiny_models import make_dense

    make_dense(path, "qwen2", seed=1, **(TARGET | changes))  # has biases


def windows_of_rank(worker: Any) -> dict[str, Any]:
    """What a rank's own session has counted; sums that differ if any round did."""
    runner = worker.model_runner
    counts = runner.session.counts
    layers = () if runner.slim is None else runner.slim.layers.layers
    copies = [getattr(layer.mlp.down_proj, "low_precision", None) for layer in layers]
    return {
        "layers": len(layers),
        "copies": sorted({type(each).__name__ for each in copies}),
        "slim_passes": counts.slim_passes,
        "full_passes": counts.full_passes,
        "windows": [counts.windows, counts.window_tokens, counts.accepted],
        "slim": [counts.slim_drafted, counts.slim_accepted],
        "lengths": counts.lengths,
        "tiers": counts.tiers,
    }


def let_clocks_differ() -> None:
    """In a process of a rank: to all but the first a slim pass seems to take very long, and the
    kinds of copies promise the opposite."""
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_nvium.model_executor.via_sd.slim_quantised import Copies
    from vllm_nvium.via_sd.planner.choose import Planner

    observe, best = Planner.observe_slim_pass, Copies._best

    def observe_slowly(self: Any, rows: int, seconds: float) -> None:
        observe(self, rows, seconds * (SLOWER if get_tp_group().rank_in_group else 1.0))

    def worst(self: Any) -> Any:
        if get_tp_group().rank_in_group:
            self.promises = [-promise for promise in self.promises]
        return best(self)

    Planner.observe_slim_pass = observe_slowly  # type: ignore[method-assign]
    Copies._best = worst  # type: ignore[method-assign]


HELPERS = Path(__file__).parents[2] / "helpers"


def in_a_process(model: Path, ranks: int, engine: dict[str, Any], folder: Path) -> Any:
    """What `run` returns; what the process has printed where it ends with an error."""
    own = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        CLOCKS: "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
    }
    out = folder / f"{ranks}.json"
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(ranks), str(out), json.dumps(engine)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        return done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_target(path)
    return path


@pytest.fixture(scope="module")
def plain(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return in_a_process(target, 1, {}, tmp_path_factory.mktemp("plain"))


def via_sd(**options: Any) -> dict[str, Any]:
    return {"via_sd": True} | {f"via_sd_{name}": value for name, value in options.items()}


CASES = {
    "skip": (via_sd(slim="skip", mask="1,2", rounds=3), NGRAM),
    "int8": (via_sd(slim="int8", rounds=4, window=8), None),
    "int4": (via_sd(slim="int4", rounds=3), NGRAM),
    "auto": (via_sd(), None),
    "auto_skip": (via_sd(slim="skip", mask="2"), NGRAM),
}


# A minute each; NVIUM_TENSOR_PARALLEL=all runs the others too.
USUAL = ("skip", "int4")
others = pytest.mark.skipif(
    os.environ.get("NVIUM_TENSOR_PARALLEL") != "all",
    reason="takes long: NVIUM_TENSOR_PARALLEL=all runs it",
)


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=others) for name in CASES]
)
def test_two_ranks_give_the_tokens_of_plain_decoding(
    target: Path, plain: Any, tmp_path: Path, name: str
) -> None:
    options, drafter = CASES[name]
    engine = {"additional_config": options, "speculative_config": drafter}
    found = in_a_process(target, 2, engine, tmp_path)
    assert not isinstance(found, str), found[-6000:]
    assert found["lengths"] == [NEW_TOKENS] * len(requests())
    assert found["tokens"] == plain["tokens"]
    first, second = found["ranks"]
    assert first == second, "all rounds were the same"
    # What `auto` comes to is the first rank's clock's business.
    fewest = 0 if name == "auto" else 5
    assert first["slim_passes"] >= fewest and first["windows"][2] >= fewest
    copies = {
        "int8": ("Int8Linear", "Int8LinearByOneDNN", "Int8LinearByFBGEMM"),
        "int4": ("Int4Linear",),
    }
    if name in copies:
        assert [each in copies[name] for each in first["copies"]] == [True]
    layers = {"skip": 2, "auto_skip": 3, "auto": first["layers"]}
    assert first["layers"] == layers.get(name, 4)


@others
def test_one_rank_and_two_with_a_draft_model(target: Path, plain: Any, tmp_path: Path) -> None:
    """It runs inside a window, on both ranks; under the paper's rule draws have noise of the
    process."""
    make_target(tmp_path / "drafter", num_hidden_layers=1)
    drafter = {
        "method": "draft_model",
        "model": str(tmp_path / "drafter"),
        "num_speculative_tokens": 2,
    }
    options = via_sd(slim="int8", rounds=3, window=12)
    for ranks in (1, 2):
        engine = {"additional_config": options, "speculative_config": drafter}
        found = in_a_process(target, ranks, engine, tmp_path)
        assert not isinstance(found, str), found[-6000:]
        assert found["tokens"] == plain["tokens"]
        assert len(found["ranks"]) == ranks and found["ranks"][0] == found["ranks"][-1]
        assert found["ranks"][0]["slim_passes"] > 10


@others
def test_ranks_agree_under_the_papers_rule(target: Path, tmp_path: Path) -> None:
    """Tokens that are drawn again have noise of the process, and the rule's text is its own."""
    options = via_sd(slim="skip", mask="1", mode="paper", accept=0.6, escalate=0.2)
    engine = {"additional_config": options, "speculative_config": NGRAM}
    found = in_a_process(target, 2, engine, tmp_path)
    assert not isinstance(found, str), found[-6000:]
    first, second = found["ranks"]
    assert first == second and sum(first["tiers"]) > 20


def test_a_part_that_a_kind_cannot_take_is_refused(tmp_path: Path) -> None:
    make_target(tmp_path / "target", hidden_size=64, num_attention_heads=2)
    options = via_sd(slim="int4")
    engine = {"additional_config": options, "speculative_config": NGRAM}
    printed = in_a_process(tmp_path / "target", 2, engine, tmp_path)
    assert isinstance(printed, str)
    assert (
        "--via-sd-slim is 'int4', but 32 inputs do not divide into groups of 128 or 64 in the "
        "parts of 2 tensor-parallel ranks; here int8, skip work." in printed
    ), printed[-6000:]


class Ranks:
    """vLLM's group as one rank sees it: what is told to it, and what it has told."""

    def __init__(self, world_size: int, rank: int, first: Any = None) -> None:
        self.world_size, self.rank_in_group, self.first = world_size, rank, first
        self.told: list[Any] = []

    def broadcast_object(self, value: Any, src: int) -> Any:
        assert src == 0
        self.told.append(value)
        return self.first if self.rank_in_group else value


def test_only_the_first_rank_has_a_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nvium.model_executor import ranks
    from vllm_nvium.via_sd.first_rank import PlansOfFirstRank, shared
    from vllm_nvium.via_sd.planner.choose import Planner
    from vllm_nvium.via_sd.planner.fixed import FixedRounds
    from vllm_nvium.via_sd.planner.model import DraftPlan

    def as_rank(world_size: int, rank: int, first: Any = None) -> Ranks:
        group = Ranks(world_size, rank, first)
        monkeypatch.setattr(ranks, "get_tp_group", lambda: group)
        return group

    as_rank(1, 0)
    planner, fixed = Planner(4, 8), FixedRounds(4, 2)
    assert shared(planner) is planner and shared(fixed) is fixed
    group = as_rank(2, 0)
    assert shared(fixed) is fixed, "it has no clock"
    asked = shared(planner)
    assert isinstance(asked, PlansOfFirstRank) and asked.own is planner
    asked.add("a", "lossless")
    plan = asked.plan(["a"], 1)
    assert group.told == [plan] and asked.rule_of("a") == "lossless"
    group = as_rank(2, 1, first=DraftPlan(3, 5))
    other = shared(Planner(4, 8))
    other.add("a", "lossless")
    assert other.plan(["a"], 1) == DraftPlan(3, 5) and group.told == [None]
    group.first = True
    assert other.another_round([1], 99, ["a"]) is True


def test_a_kernel_that_only_the_first_rank_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nvium.model_executor import ranks
    from vllm_nvium.model_executor.layers.low_precision_linear import Int4Linear, Int8Linear
    from vllm_nvium.via_sd.loading import _choice_of_first_rank

    group = Ranks(2, 1, first="Int8Linear")
    monkeypatch.setattr(ranks, "get_tp_group", lambda: group)
    assert _choice_of_first_rank(Int4Linear, [Int4Linear, Int8Linear]) is Int8Linear
    with pytest.raises(
        UserError, match="--tensor-parallel-size is 2, but a rank has no kernel Int"
    ):
        _choice_of_first_rank(Int4Linear, [Int4Linear])
    group.first = None
    assert _choice_of_first_rank(Int4Linear, [Int4Linear]) is None


# vLLM's workers import the file that was started, under another name.
if CLOCKS in os.environ:
    let_clocks_differ()
if __name__ == "__main__":
    Path(sys.argv[3]).write_text(
        json.dumps(run(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[4])))
    )
