# SPDX-License-Identifier: Apache-2.0
"""The laws that tokens are drawn from, against the reference: frequencies at temperature 1, greedy
tokens, the logits that the sampler gets, and the log-probabilities that a client gets.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from chi_square import SIGNIFICANCE, chi_square
from trace_engine import TOLERANCE, Arrival, TraceEngine, reference_logits

from tiny_models import make_nvium
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM
from vllm_nvium.model_executor.nvium.step import UNDECIDED, _WideHeads
from vllm_nvium.model_executor.ops.draws import request_seed, uniform_draws

VOCABULARY = 64
LAWS = ["routed", "mixture"]
PROMPT = [5, 9, 33, 12]


# Fixed seeds make every run the same run, so this is not a rate of false alarms in CI.
class Served:
    """A checkpoint's reference and an engine that serves it."""

    def __init__(self, path: Path, engine_args: dict[str, Any], **checkpoint: Any) -> None:
        self.reference: NviumForCausalLM = make_nvium(
            path, exit_layers=[1, 2, 3], vocab_size=VOCABULARY, **checkpoint
        )
        self.engine = TraceEngine(
            str(path), max_logprobs=VOCABULARY, num_gpu_blocks_override=600, **engine_args
        )

    def run(self, requests: list[tuple[list[int], SamplingParams]]) -> None:
        self.engine.run([Arrival(0, prompt, params) for prompt, params in requests])

    def tokens(self, number: int) -> list[int]:
        return self.engine.emitted[str(number)].tokens


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        # The draws of a request without a seed come from its id, which vLLM makes random.
        patch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
        yield Served(
            tmp_path_factory.mktemp("nvium"),
            {"max_num_seqs": 256, "max_num_batched_tokens": 1024},
            seed=1,
            greedy_margin=0.1,
        )


def params(law: str, **fields: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 1} | fields
    return SamplingParams(extra_args={"nvium_sampling": law}, **fields)


# ----------------------------------------------------------------------------- at temperature 1


def check_frequencies(served: Served, fields: list[dict[str, Any]], law: str, joint: bool) -> None:
    """Two tokens for every entry of `fields`: the first comes from a prompt row, the second from a
    step that computed one row and may have left early."""
    served.run([(PROMPT, params(law, max_tokens=2, **extra)) for extra in fields])
    by_prefix: dict[tuple[int, ...], list[tuple[int, int]]] = {(): []}
    for number in range(len(fields)):
        seen = served.engine.emitted[str(number)]
        first, second = seen.tokens
        exits = [seen.exits[len(PROMPT) - 1], seen.exits[len(PROMPT)]]
        by_prefix[()].append((exits[0], first))
        by_prefix.setdefault((first,), []).append((exits[1], second))
    observed, expected = [], []
    for prefix, pairs in by_prefix.items():
        if len(pairs) < 100:
            continue
        output, heads = reference_logits(served.reference, [*PROMPT, *prefix])
        weights = output.exit_log_weights[0, -1].double().exp()
        law_of_pair = weights[:, None] * torch.softmax(heads[-1].double(), dim=-1)  # [N, V]
        p_mix = output.logits[0, -1].double().exp()
        torch.testing.assert_close(law_of_pair.sum(0), p_mix, rtol=1e-4, atol=1e-7)
        counts = np.zeros((len(weights), VOCABULARY))
        for exit_, token in pairs:
            counts[exit_, token] += 1
        observed.append(counts.sum(0))
        expected.append(p_mix.numpy())
        if joint:  # who left where, and where what was drawn: ancestral sampling
            assert chi_square([counts.sum(1)], [weights.numpy()]) > SIGNIFICANCE, prefix
            assert chi_square([counts.ravel()], [law_of_pair.numpy().ravel()]) > SIGNIFICANCE
    assert len(observed) > 3
    assert chi_square(observed[:1], expected[:1]) > SIGNIFICANCE
    assert chi_square(observed[1:], expected[1:]) > SIGNIFICANCE


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "unseeded"])
def test_frequencies_are_the_mixtures(served: Served, law: str, seeded: bool) -> None:
    torch.manual_seed(0)  # what requests without a seed share
    fields = [{"seed": seed} if seeded else {} for seed in range(3000)]
    check_frequencies(served, fields, law, joint=True)


def test_frequencies_of_the_full_mixture(served: Served) -> None:
    # A request for log-probabilities runs every head and draws from p_mix itself.
    check_frequencies(served, [{"seed": i, "logprobs": 0} for i in range(3000)], "mixture", False)
    assert {exit_ for seen in served.engine.emitted.values() for exit_ in seen.exits.values()} == {
        3
    }


def test_n_samples_of_one_request_differ(served: Served) -> None:
    n = 256
    for extra in ({"seed": 3}, {}):
        served.run([(PROMPT, params("routed", n=n, **extra))])
        # Each has an id of its own, so each is recorded by itself.
        exits = [
            seen.exits[len(PROMPT) - 1] for seen in served.engine.emitted.values() if seen.exits
        ]
        assert len(exits) == n
        output, _ = reference_logits(served.reference, PROMPT)
        weights = output.exit_log_weights[0, -1].double().exp().numpy()
        counts = np.bincount(exits, minlength=4).astype(float)
        assert chi_square([counts], [weights]) > SIGNIFICANCE


@pytest.mark.parametrize("law", LAWS)
def test_long_generations_follow_the_mixture(served: Served, law: str) -> None:
    """Two at a time, so that steps really end early and positions wait and are caught up."""
    pits, exit_pits, depths = [], [], []
    jitter = np.random.default_rng(0)
    for pair in range(3):
        requests = [(PROMPT, params(law, max_tokens=150, seed=2 * pair + i)) for i in range(2)]
        served.run(requests)
        depths += served.engine.depths
        for number in range(2):
            tokens = served.tokens(number)
            exits = served.engine.emitted[str(number)].exits
            output, heads = reference_logits(served.reference, PROMPT + tokens)
            weights = output.exit_log_weights[0].double().exp().numpy()
            for i, token in enumerate(tokens):
                position = len(PROMPT) - 1 + i
                p_mix = output.logits[0, position].double().exp().numpy()
                pits.append(p_mix[:token].sum() + jitter.random() * p_mix[token])
                left, pi = exits[position], weights[position]
                exit_pits.append(pi[:left].sum() + jitter.random() * pi[left])
    # The law of every token is another one; its randomised distribution function is uniform.
    assert stats.kstest(pits, "uniform").pvalue > SIGNIFICANCE
    assert stats.kstest(exit_pits, "uniform").pvalue > SIGNIFICANCE
    assert Counter(depths)[1] > 20 and Counter(depths)[4] > 20


# ---------------------------------------------------------------------------------------- greedy


def greedy_references(served: Served, prompt: list[int], tokens: list[int]) -> Any:
    output, heads = reference_logits(served.reference, prompt + tokens)
    return output.margins[0].double(), output.logits[0], heads


def check_argmax(logits: torch.Tensor, token: int) -> None:
    """`token` is the argmax, or cannot be told from it in float32."""
    assert logits.max() - logits[token] < TOLERANCE


PROMPTS = [PROMPT, [7] * 20, list(range(3, 60)), [40]]


def test_routed_greedy_leaves_where_the_margin_exceeds_the_models(served: Served) -> None:
    sure = served.reference.config.greedy_margin
    assert sure > 0
    left: Counter[int] = Counter()
    depths: Counter[int] = Counter()
    for prompt in PROMPTS:
        served.run([(prompt, params("routed", temperature=0.0, max_tokens=40))])
        tokens = served.tokens(0)
        margins, _, heads = greedy_references(served, prompt, tokens)
        for i, token in enumerate(tokens):
            position = len(prompt) - 1 + i
            exit_ = served.engine.emitted["0"].exits[position]
            leaving = torch.nonzero(margins[position] > sure).flatten().tolist()
            assert exit_ == (leaving[0] if leaving else 3)
            check_argmax(heads[position, exit_], token)
            left[exit_] += 1
        depths.update(served.engine.depths)
    assert len(left) > 2 and len(depths) > 2


MODELS: dict[str, dict[str, Any]] = {
    "random": {"seed": 1},
    "constant": {"seed": 2, "hazards": [0.5, 0.6, 0.7], "tied": True},
    "own": {"seed": 3, "exit_head": "own", "initializer_range": 0.3},
    "embeddings": {"seed": 4, "exit_head": "embeddings", "initializer_range": 0.3},
}


@pytest.mark.parametrize("model", MODELS)
def test_mixture_greedy_is_the_argmax_of_the_mixture(
    served: Served, model: str, tmp_path: Path
) -> None:
    if model != "random":
        served = Served(tmp_path, {"max_num_seqs": 4}, **MODELS[model])
    depths: Counter[int] = Counter()
    argmax_moved = 0

    def check(number: int, prompt: list[int]) -> int:
        tokens = served.tokens(number)
        assert len(tokens) == 40
        _, p_mix, heads = greedy_references(served, prompt, tokens)
        at = range(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        for position, token in zip(at, tokens, strict=True):
            check_argmax(p_mix[position], token)
        return sum(int(heads[p, -1].argmax() != p_mix[p].argmax()) for p in at)

    greedy = params("mixture", temperature=0.0, max_tokens=40)
    for prompt in PROMPTS:
        served.run([(prompt, greedy)])
        argmax_moved += check(0, prompt)
        depths.update(served.engine.depths)
    # A test in which the final head is always right, or nothing ever stops early, tests little.
    assert argmax_moved > 5
    assert sum(count for depth, count in depths.items() if depth < 4) > 5
    served.run([(prompt, greedy) for prompt in PROMPTS])
    for number, prompt in enumerate(PROMPTS):
        check(number, prompt)


@pytest.mark.parametrize("kind", ["final", "own"])
def test_greedy_requests_of_the_mixture_are_settled_together(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each exit at most one product with each head so far, however many requests there are, and
    what each of them gets is what it gets alone."""
    served = Served(tmp_path, {"max_num_seqs": 8}, seed=3, exit_head=kind, initializer_range=0.3)
    model, products, at_exits = served.engine.runner.model, [0], []
    decide, head_logits = _WideHeads._decide, model.head_logits

    def count(*args: Any) -> torch.Tensor:
        products[0] += 1
        return head_logits(*args)

    def counted(self: _WideHeads, k: int, *args: Any) -> None:
        products[0] = 0
        undecided = int((self.step.exits == UNDECIDED).sum())
        decide(self, k, *args)
        settled = undecided - int((self.step.exits == UNDECIDED).sum())
        at_exits.append((k, products[0], settled))

    monkeypatch.setattr(model, "head_logits", count)
    monkeypatch.setattr(_WideHeads, "_decide", counted)
    requests = [
        ([5 + number, 9, 33], params("mixture", temperature=0.0, max_tokens=20))
        for number in range(8)
    ]
    served.run(requests)
    most = 1 if kind == "final" else 3
    assert all(count <= min(k + 1, most) for k, count, _ in at_exits)
    assert max(settled for *_, settled in at_exits) > 1
    assert max(count for _, count, _ in at_exits) == most
    together = [served.tokens(number) for number in range(8)]
    for number, request in enumerate(requests):
        served.run([request])
        assert served.tokens(0) == together[number]
        output, _ = reference_logits(served.reference, request[0] + together[number])
        for i, token in enumerate(together[number]):
            check_argmax(output.logits[0, 2 + i], token)


# --------------------------------------------------------------- what the sampler and clients get

PROCESSED: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "temperature": {"temperature": 0.7},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {7: 4.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(20, 40))},
    "min_tokens": {"min_tokens": 5},
    "logprobs": {"logprobs": VOCABULARY},
    "greedy_penalty": {"temperature": 0.0, "frequency_penalty": 0.8},
    "greedy_logprobs": {"temperature": 0.0, "logprobs": 3},
    "prompt_logprobs": {"top_k": 9, "prompt_logprobs": 2},
}


def check_log_mixture(served: Served, number: int, prompt: list[int]) -> None:
    seen = served.engine.emitted[str(number)]
    output, heads = reference_logits(served.reference, prompt + seen.tokens)
    # log p_mix plus a number per row, which makes them a head's own logits where it has all weight.
    weights = output.exit_log_weights[0].exp()  # [T, N]
    constants = (weights * torch.logsumexp(heads, dim=-1)).sum(dim=-1)  # [T]
    expected = output.logits[0] + constants[:, None]
    for i in range(len(seen.tokens)):
        position = len(prompt) - 1 + i
        assert seen.exits[position] == 3
        torch.testing.assert_close(
            seen.logits[position], expected[position], atol=TOLERANCE, rtol=0
        )


def test_processors_work_on_the_mixture(served: Served) -> None:
    requests = [
        (PROMPTS[i % 4], params("mixture", max_tokens=12, seed=i, **fields))
        for i, fields in enumerate(PROCESSED.values())
    ]
    served.run(requests)
    for number, (prompt, _) in enumerate(requests):
        check_log_mixture(served, number, prompt)
    for position, token in enumerate(served.tokens(list(PROCESSED).index("allowed_token_ids"))):
        assert 20 <= token < 40, position


def returned_logprobs(output: Any) -> list[dict[int, float]]:
    return [
        {token: entry.logprob for token, entry in position.items()}
        for position in output.outputs[0].logprobs
    ]


def test_logprobs_of_the_mixture(served: Served) -> None:
    for temperature in (1.0, 0.7, 0.0):
        fields = {"temperature": temperature, "seed": 5, "logprobs": VOCABULARY}
        served.run([(PROMPT, params("mixture", max_tokens=20, **fields))])
        tokens = served.tokens(0)
        output, _ = reference_logits(served.reference, PROMPT + tokens)
        got = returned_logprobs(served.engine.outputs["0"])
        for i, position in enumerate(got):
            expected = output.logits[0, len(PROMPT) - 1 + i]
            assert len(position) == VOCABULARY
            for token, logprob in position.items():
                assert logprob == pytest.approx(float(expected[token]), abs=TOLERANCE)


def test_logprobs_of_the_routed_law_are_the_chosen_heads(served: Served) -> None:
    served.run([(PROMPT, params("routed", max_tokens=40, seed=5, logprobs=VOCABULARY))])
    seen = served.engine.emitted["0"]
    _, heads = reference_logits(served.reference, PROMPT + seen.tokens)
    for i, position in enumerate(returned_logprobs(served.engine.outputs["0"])):
        at = len(PROMPT) - 1 + i
        expected = torch.log_softmax(heads[at, seen.exits[at]], dim=-1)
        for token, logprob in position.items():
            assert logprob == pytest.approx(float(expected[token]), abs=TOLERANCE)
    assert len(set(seen.exits.values())) == 4
    assert min(served.engine.depths) == 1


def test_logprobs_of_named_tokens(served: Served) -> None:
    fields = {"max_tokens": 3, "seed": 5, "logprob_token_ids": [9, 11]}
    served.run([(PROMPT, params("mixture", **fields))])
    output, _ = reference_logits(served.reference, PROMPT + served.tokens(0))
    for i, position in enumerate(returned_logprobs(served.engine.outputs["0"])):
        for token in (9, 11):
            expected = float(output.logits[0, len(PROMPT) - 1 + i, token])
            assert position[token] == pytest.approx(expected, abs=TOLERANCE)


def check_prompt_logprobs(served: Served, number: int, prompt: list[int]) -> None:
    got = served.engine.outputs[str(number)].prompt_logprobs
    output, _ = reference_logits(served.reference, prompt)
    assert got[0] is None and len(got) == len(prompt)
    for position in range(1, len(prompt)):
        assert prompt[position] in got[position]
        for token, entry in got[position].items():
            expected = float(output.logits[0, position - 1, token])
            assert entry.logprob == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def chunked(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The same checkpoint in an engine whose steps hold 24 rows."""
    args = {"max_num_seqs": 4, "max_num_batched_tokens": 24}
    return Served(tmp_path_factory.mktemp("chunked"), args, seed=1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_prompt_logprobs_are_the_mixtures(
    served: Served, chunked: Served, law: str, temperature: float
) -> None:
    generator = np.random.default_rng(0)
    # 1 has no logprobs to return; chunks of the others end within, at and before their last row.
    prompts = [generator.integers(3, VOCABULARY, n).tolist() for n in (1, 2, 24, 25, 70, 49)]
    for engine in (served, chunked):
        requests = [
            (p, params(law, max_tokens=6, seed=i, temperature=temperature, prompt_logprobs=3))
            for i, p in enumerate(prompts)
        ]
        # Others decode beside them and leave early.
        requests.append((PROMPT, params("routed", max_tokens=30, seed=99)))
        engine.run(requests)
        for number, prompt in enumerate(prompts):
            check_prompt_logprobs(engine, number, prompt)
        for number, (prompt, _) in enumerate(requests):
            check_routed_or_greedy(engine, number, prompt, law if number < 6 else "routed")


def check_routed_or_greedy(served: Served, number: int, prompt: list[int], law: str) -> None:
    """The logits that were sampled from, of a request whose tokens each come from one head."""
    seen = served.engine.emitted[str(number)]
    output, heads = reference_logits(served.reference, prompt + seen.tokens)
    for i, token in enumerate(seen.tokens):
        position = len(prompt) - 1 + i
        logits = seen.logits[position]
        if logits.isinf().any():  # the mixture's argmax, settled before the last head
            check_argmax(output.logits[0, position], token)
        elif law == "mixture" and seen.exits[position] == 3:
            mixture, last = output.logits[0, position], heads[position, 3]
            law_gap = (torch.log_softmax(logits, dim=-1) - mixture).abs().max()
            gap = min(law_gap, (logits - last).abs().max())
            assert gap < TOLERANCE
        else:
            gap = (logits - heads[position, seen.exits[position]]).abs().max()
            assert gap < TOLERANCE


# --------------------------------------------------------------------------------- mixed batches

MIXED: list[tuple[str, dict[str, Any]]] = [
    ("routed", {}),
    ("mixture", {}),
    ("mixture", {"temperature": 0.0}),
    ("routed", {"temperature": 0.0}),
    ("mixture", {"temperature": 0.6, "top_p": 0.9}),
    ("routed", {"temperature": 0.6, "top_k": 7}),
    ("mixture", {"logprobs": 2}),
    ("routed", {"logprobs": 2}),
    ("mixture", {"prompt_logprobs": 1}),
    ("routed", {"prompt_logprobs": 1, "logit_bias": {4: 2.0}}),
]


def test_each_request_of_a_mixed_batch_gets_what_it_gets_alone(served: Served) -> None:
    requests = [
        (PROMPTS[i % 4], params(law, max_tokens=25, seed=i, **fields))
        for i, (law, fields) in enumerate(MIXED)
    ]
    alone = []
    for request in requests:
        served.run([request])
        alone.append((served.engine.emitted["0"], served.engine.outputs["0"]))
    served.run(requests)
    for number, (expected, output) in enumerate(alone):
        seen = served.engine.emitted[str(number)]
        assert seen.tokens == expected.tokens, MIXED[number]
        assert seen.exits == expected.exits, MIXED[number]
        for position, logits in expected.logits.items():
            torch.testing.assert_close(seen.logits[position], logits, atol=TOLERANCE, rtol=0)
        together = served.engine.outputs[str(number)]
        if output.outputs[0].logprobs:
            for one, other in zip(
                returned_logprobs(output), returned_logprobs(together), strict=True
            ):
                assert one == pytest.approx(other, abs=TOLERANCE)
        if output.prompt_logprobs:
            check_prompt_logprobs(served, number, requests[number][0])


def test_a_request_may_choose_its_law(served: Served) -> None:
    served.run(
        [
            (PROMPT, SamplingParams(temperature=0.7, seed=1, max_tokens=20, ignore_eos=True)),
            (PROMPT, params("mixture", temperature=0.7, seed=1, max_tokens=20)),
        ]
    )
    check_log_mixture(served, 1, PROMPT)
    # The engine's own law is "routed": the exits are those of the request's draws.
    seen = served.engine.emitted["0"]
    output, heads = reference_logits(served.reference, PROMPT + seen.tokens)
    draws = uniform_draws(np.full(20, request_seed(1, "", 0), dtype=np.uint64), np.arange(3, 23), 3)
    hazards = torch.sigmoid(output.margins[0].double()).numpy()
    for i in range(20):
        leaving = np.flatnonzero(draws[i] < hazards[3 + i])
        exit_ = int(leaving[0]) if len(leaving) else 3
        assert seen.exits[3 + i] == exit_
        gap = (seen.logits[3 + i] - heads[3 + i, exit_]).abs().max()
        assert gap < TOLERANCE
