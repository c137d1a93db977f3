# SPDX-License-Identifier: Apache-2.0
"""Whatever comes in over HTTP, a server answers with 200 or with 4xx and goes on: random requests,
few of them sensible, to real servers. `NVIUM_FUZZ=5000` makes about so many requests instead of
some hundred, `NVIUM_FUZZ_SEED` draws others."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, note, seed, settings
from hypothesis import strategies as st
from servers import running_server, vllm_command

REQUESTS = int(os.environ.get("NVIUM_FUZZ", "300"))
SEED = int(os.environ.get("NVIUM_FUZZ_SEED", "0"))
KINDS = ("nvium", "via_sd", "plain")
PROMPT = "w5 w9 w17 w33 w5 w9 w17"
# A server that takes so long for a few tokens of a tiny model hangs.
PATIENCE = 60.0
# A kept connection may be closed by the server just when the next request is written to it.
CLIENT: dict[str, Any] = {
    "timeout": PATIENCE,
    "limits": httpx.Limits(max_keepalive_connections=0),
}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
VIA_SD = ("--via-sd", "--via-sd-mask", "2", "--via-sd-window", "8", "--via-sd-rounds", "2",
          "--via-sd-allow-paper-mode", "--speculative-config", json.dumps(SPECULATION))  # fmt: skip


@dataclass
class Server:
    """A server that is up, and how it has answered so far."""

    kind: str
    url: str
    client: httpx.Client
    statuses: Counter[int] = field(default_factory=Counter)
    usual: str = ""
    vllms_own: int = 0

    def post(self, route: str, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        answer = self.client.post(f"{self.url}/{route}", content=body, headers=headers)
        self.statuses[answer.status_code] += 1
        return answer

    def normal(self) -> str:
        """The text of a request that nothing is wrong with."""
        body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
        answer = self.client.post(f"{self.url}/completions", json=body | {"ignore_eos": True})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def check(self) -> None:
        """That it is there, and as it was."""
        health = self.client.get(self.url.removesuffix("/v1") + "/health")
        assert health.status_code == 200
        assert self.normal() == self.usual


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest,
    nvium_checkpoint: Path,
    dense_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    kind = request.param
    model = nvium_checkpoint if kind == "nvium" else dense_checkpoint
    arguments = ("--max-model-len", "64", *(VIA_SD if kind == "via_sd" else ()))
    log = tmp_path_factory.mktemp("fuzz") / kind
    with running_server(model, log, *arguments) as url, httpx.Client(**CLIENT) as client:
        one, begun = Server(kind, url, client), time.monotonic()
        one.usual = one.normal()
        yield one
        seconds = time.monotonic() - begun
        counts = dict(sorted(one.statuses.items()))
        line = f"{kind}: {one.statuses.total()} requests, {counts}, {seconds:.0f} s, seed {SEED}"
        sys.stdout.write(f"\n{line}, {one.vllms_own} of them 5xx without the plugin too\n")


class Bare:
    """The same vLLM without the plugin, started when somebody asks for the first time."""

    def __init__(self, stack: contextlib.ExitStack, model: Path, log: Path) -> None:
        self._start = lambda: stack.enter_context(
            running_server(model, log, "--max-model-len", "64", VLLM_NVIUM_DISABLE="1")
        )
        self._client = stack.enter_context(httpx.Client(**CLIENT))
        self._url = ""

    def fails_too(self, request: "Request") -> bool:
        self._url = self._url or self._start()
        headers = {"content-type": "application/json"}
        url = f"{self._url}/{request.route}"
        return is_failure(self._client.post(url, content=request.body, headers=headers))


@pytest.fixture(scope="module")
def bare(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with contextlib.ExitStack() as stack:
        yield Bare(stack, dense_checkpoint, tmp_path_factory.mktemp("fuzz") / "bare")


def examples(share: float) -> settings:
    """So many of the requests that go to one server."""
    return settings(
        max_examples=max(1, round(REQUESTS * share / len(KINDS))),
        database=None,
        # A server that has ended fails every request: shrinking would end with any.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# -------------------------------------------------------------------------------- what is generated

NUMBERS: list[Any] = [
    0, 1, 2, 3, 5, -1, -2, 20, 63, 64, 65, 255, 256, 2**31 - 1, 2**31, -(2**31) - 1, 2**32,
    2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, 1e30,
    1e300, -1e300, math.nan, math.inf, -math.inf,
]  # fmt: skip
WORDS = ["", " ", "w5", "on", "off", "routed", "mixture", "lossless", "paper", "auto", "NaN", "1",
         "\n", "\0", "é\U0001f600", "x" * 5000, "{", "None"]  # fmt: skip
scalars = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.none(), st.booleans())
odd = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=5,
)

LEVELS = ["none", "summary", "detailed"]
OWN_KEYS = [
    "nvium_sampling", "nvium_max_deferred", "nvium_request_metrics", "nvium_", "nvium_depth",
    "via_sd", "via_sd_mode", "via_sd_request_metrics",
    "via_sd_accept", "via_sd_escalate", "via_sd_window", "via_sd_rounds", "via_sd_mask",
    "via_sd_max_batch", "via_sd_allow_paper_mode", "via_sd_drafts", "via_sd_", "via_sd_\n",
]  # fmt: skip
SENSIBLE: dict[str, list[Any]] = {
    "nvium_sampling": ["routed", "mixture"],
    "nvium_max_deferred": [0, 1, 7, 2**31 - 1],
    "via_sd": ["on", "off", "0", 1],
    "via_sd_mode": ["lossless", "paper"],
    "via_sd_accept": [0, 0.5, 0.9, 1],
    "via_sd_escalate": [0, 0.1, 0.3, 1.0],
    "nvium_request_metrics": LEVELS,
    "via_sd_request_metrics": LEVELS,
}
# What vLLM lets through to the plugin at all.
passing = st.one_of(
    st.sampled_from([n for n in NUMBERS if isinstance(n, float) or -(2**63) <= n < 2**64]),
    st.sampled_from(WORDS),
    st.lists(st.sampled_from(WORDS[:6] + [0, 1.5]), max_size=3),
)


@st.composite
def own_options(draw: st.DrawFn, values: st.SearchStrategy[Any] = passing) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(OWN_KEYS), min_size=1, max_size=3, unique=True)):
        sensible = key in SENSIBLE and draw(st.booleans())
        given[key] = draw(st.sampled_from(SENSIBLE[key]) if sensible else values)
    return given


tokens = st.lists(st.sampled_from([0, 1, 5, 9, 255, 256, -1, 2**31, 2**63, 10**30]), max_size=4)
probabilities = st.sampled_from([0, 0.1, 0.5, 0.9, 1, 1.0, -0.1, 1.1, math.nan, math.inf])
penalties = st.sampled_from([0, 0.5, -2, 2, 2.1, 1e30, -math.inf, math.nan, 1e-30])
structures: list[Any] = [
    {"choice": ["w5", "w9 w17"]}, {"choice": []}, {"choice": [1]}, {"regex": "w[0-9]+"},
    {"regex": "("}, {"regex": ""}, {"json": {"type": "object"}}, {"json": "{"},
    {"json": {"type": "nothing"}}, {"grammar": 'root ::= "w5"'}, {"grammar": "root"},
    {"json_object": True}, {"json_object": False}, {"structural_tag": "{}"}, {},
    {"regex": "a", "choice": ["b"]}, {"unknown": 1},
]  # fmt: skip
formats: list[Any] = [{"type": "json_object"}, {"type": "text"}, {"type": "json_schema"}, {}]
biases = st.dictionaries(
    st.sampled_from(["5", "9", "0", "256", "-1", "x", str(2**63)]),
    st.sampled_from([0, 5, -100, 100, 1e30, math.nan, math.inf, "a"]),
    max_size=3,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.0, 1e-6, 0.7, 1, 2, 1e30, -1, math.nan, math.inf]),
    "top_p": probabilities,
    "top_k": st.sampled_from([-1, 0, 1, 5, 256, 10**6, 2**31, 2**63, -2, 1.5]),
    "min_p": probabilities,
    "logprobs": st.sampled_from([0, 1, 5, 20, 21, -1, -2, 2**63, True, 1.5]),
    "top_logprobs": st.sampled_from([0, 1, 20, 21, -1, 2**63]),
    "prompt_logprobs": st.sampled_from([0, 1, 20, 21, -1, -2, 2**63]),
    "logprob_token_ids": tokens,
    "n": st.sampled_from([1, 2, 3, 0, -1, 2**31, 2**63, 1.5]),
    "max_tokens": st.sampled_from([0, 1, 2, 63, 64, -1, 2**31, 2**63, 10**30, 1.5, "3"]),
    "min_tokens": st.sampled_from([0, 1, 3, 64, -1, 2**31, 2**63]),
    "seed": st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1.5]),
    "stop": st.sampled_from(["", "w", ["w5"], [""], ["a"] * 9, [], 1, [1], "\0"]),
    "stop_token_ids": tokens,
    "logit_bias": biases,
    "presence_penalty": penalties,
    "frequency_penalty": penalties,
    "repetition_penalty": penalties,
    "length_penalty": penalties,
    "allowed_token_ids": tokens,
    "bad_words": st.lists(st.sampled_from(WORDS), max_size=3),
    "structured_outputs": st.sampled_from(structures),
    "response_format": st.sampled_from(formats),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([{"include_usage": True}, {}, None]),
    "use_beam_search": st.booleans(),
    "ignore_eos": st.booleans(),
    "echo": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "truncate_prompt_tokens": st.sampled_from([0, 1, 5, -1, -2, 2**63 - 1, 2**63]),
    "thinking_token_budget": st.sampled_from([0, 3, -1, 2**31, 2**63]),
    "priority": st.sampled_from([0, 1, 2**63]),
    "prompt": st.sampled_from(["", " ", "nothing", "w5 " * 80, [], [5, 9], [256], [-1], [2**63],
                               ["w5", "w9"], [[5], [9]], 5, {}]),
    "messages": st.sampled_from([[], [{}], [{"role": "user"}], [{"role": "x", "content": "w5"}], 5,
                                 [{"role": "user", "content": "w5 " * 80}]]),
    "best_of": st.just(3),
    "nvium_sampling": st.just("greedy"),
    "\0unknown": odd,
}  # fmt: skip
# What once ended a server for everybody.
TOO_LARGE = {"vllm_xargs": {"nvium_max_deferred": 2**63}}
ROUTES = ("completions", "chat/completions", "responses")


def usual_body(route: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "temperature": 0}
    if route == "completions":
        return body | {"prompt": PROMPT, "max_tokens": 3}
    if route == "responses":
        return body | {"input": PROMPT, "max_output_tokens": 3}
    return body | {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}


@dataclass(frozen=True)
class Request:
    route: str
    body: bytes

    def __repr__(self) -> str:
        return f"POST /v1/{self.route} {self.body[:2000]!r}"


@st.composite
def odd_requests(draw: st.DrawFn) -> Request:
    """Several fields that may be anything, ours or vLLM's."""
    route = draw(st.sampled_from(ROUTES))
    body = usual_body(route)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)):
        body[name] = draw(FIELDS[name] | odd if draw(st.integers(0, 4)) == 0 else FIELDS[name])
    anything = own_options(passing | odd)
    if draw(st.booleans()):
        body["vllm_xargs"] = draw(anything | odd if draw(st.integers(0, 4)) == 0 else anything)
    encoded = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:
        encoded = encoded[: draw(st.integers(0, len(encoded)))]
    return Request(route, encoded)


@st.composite
def requests_with_options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Nothing but our options can be wrong."""
    route = draw(st.sampled_from(ROUTES))
    body = usual_body(route) | {"stream": draw(st.booleans())}
    if route != "responses" and draw(st.integers(0, 4)) == 0:
        # vLLM's own refusal of streamed beams would come first.
        body |= {"use_beam_search": True, "n": 2, "stream": False}
    return route, body | {"vllm_xargs": draw(own_options())}


# --------------------------------------------------------------------------------- what is expected


def wrong_options(kind: str, given: dict[str, Any], route: str) -> list[str]:
    """Which options a server has to refuse, said independently of how it reads them."""
    if kind == "plain":
        return list(given)
    fine = nvium_is_fine if kind == "nvium" else via_sd_is_fine
    wrong = [key for key, value in given.items() if not fine(key, value)]
    thresholds = [key for key in ("via_sd_accept", "via_sd_escalate") if key in given]
    if kind == "via_sd" and not wrong and thresholds:
        in_order = given.get("via_sd_escalate", 0.3) <= given.get("via_sd_accept", 0.5)
        if given.get("via_sd_mode") != "paper" or not in_order:
            return thresholds
    asked = f"{kind}_request_metrics"
    if not wrong and route == "responses" and given.get(asked, "none") != "none":
        return [asked]  # such an answer has no place for it
    return wrong


def nvium_is_fine(key: str, value: Any) -> bool:
    if key == "nvium_max_deferred":
        return type(value) is int and 0 <= value < 2**31
    if key == "nvium_request_metrics":
        return value in LEVELS
    return key == "nvium_sampling" and value in ("routed", "mixture")


def via_sd_is_fine(key: str, value: Any) -> bool:
    if key == "via_sd":
        return value in ("on", "off", "true", "false", "0", "1", 0, 1)
    if key == "via_sd_mode":
        return value in ("lossless", "paper")
    if key == "via_sd_request_metrics":
        return value in LEVELS
    is_threshold = key in ("via_sd_accept", "via_sd_escalate")
    return is_threshold and type(value) in (int, float) and 0 <= value <= 1


def check_sentence(answer: httpx.Response, wrong: list[str]) -> None:
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert any(key.strip() in message for key in wrong), message
    assert "\n" not in message and message.endswith(".") and len(message) < 600, message


def is_failure(answer: httpx.Response) -> bool:
    if answer.status_code >= 500:
        return True
    for line in answer.text.splitlines():
        # An answer that fails while it streams has status 200 already.
        if line.startswith("data: {"):
            error = json.loads(line.removeprefix("data: ")).get("error")
            if error and error.get("code", 400) >= 500:
                return True
    return False


# -------------------------------------------------------------------------------------------- tests


@seed(SEED)
@examples(0.35)
@given(asked=requests_with_options())
@example(asked=("completions", usual_body("completions") | TOO_LARGE))
def test_our_options_are_taken_or_refused_with_a_sentence(
    server: Server, asked: tuple[str, dict[str, Any]]
) -> None:
    route, body = asked
    answer = server.post(route, json.dumps(body).encode())
    note(f"{answer.status_code} {answer.text[:600]}")
    beams = body.get("use_beam_search", False)
    given = body["vllm_xargs"]
    if wrong := list(given) if beams else wrong_options(server.kind, given, route):
        check_sentence(answer, wrong)
    else:
        assert answer.status_code == 200 and not is_failure(answer)


@seed(SEED)
@examples(0.45)
@given(asked=st.lists(odd_requests(), min_size=1, max_size=3))
def test_any_requests_are_survived(server: Server, bare: Bare, asked: list[Request]) -> None:
    """Several at a time: what one of them brings may end what the engine does for another. What
    vLLM itself answers with 5xx (its checks stumble over types that it did not expect) is its own
    matter, as long as it goes on."""
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: server.post(one.route, one.body), asked))
    for one, answer in zip(asked, answers, strict=True):
        note(f"{one} -> {answer.status_code} {answer.text[:600]}")
        if is_failure(answer):
            assert bare.fails_too(one), one
            server.vllms_own += 1
    server.check()


def test_the_server_answers_as_before(server: Server) -> None:
    server.check()


def test_a_batch_of_lines_offline(nvium_checkpoint: Path, tmp_path: Path) -> None:
    """`vllm run-batch`: bad lines get their error, those around them their answer."""
    # Not null and no object: vLLM reads all lines before it begins, and ends at one that is not of
    # the types it declares, with the plugin and without.
    values = [2**63, -1, "x", [1], math.nan, 10**30, 1.0, 2**31]
    bad = [{"nvium_max_deferred": value} for value in values] + [{"via_sd": "off"}, {"nvium_": 1}]
    route = "chat/completions"  # the only one of these that it knows
    good = [{}, {"other": 1}, {"nvium_max_deferred": 3}]
    lines = []
    for i, xargs in enumerate([good[0], *bad, *good[1:]]):
        body = usual_body(route) | {"ignore_eos": True, "vllm_xargs": xargs}
        lines.append({"custom_id": str(i), "method": "POST", "url": f"/v1/{route}", "body": body})
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = vllm_command("run-batch", "-i", str(asked), "-o", str(answered), "--model")
    command += [str(nvium_checkpoint), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "64", "--enforce-eager"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    answers = {}
    with contextlib.closing(answered.open()) as file:
        for line in map(json.loads, file):
            answers[int(line["custom_id"])] = line["response"]
    texts = set()
    for i, response in answers.items():
        if 1 <= i <= len(bad):
            assert response["status_code"] == 400, (lines[i], response)
        else:
            texts.add(response["body"]["choices"][0]["message"]["content"])
    assert len(answers) == len(lines) and len(texts) == 1
