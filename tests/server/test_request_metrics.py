# SPDX-License-Identifier: Apache-2.0
"""What answers of `vllm serve` tell of their own tokens, with an N-vium model and under VIA-SD:
completions and chat, whole and streamed, several answers, stops, and what is refused."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import running_server

PROMPT = "w5 w9 w17 w33 w5 w9 w17"
ROUTES = ("completions", "chat/completions")
DRAFTER = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2,
           "prompt_lookup_min": 1}  # fmt: skip


@dataclass
class Server:
    """One that is up.

    Attributes:
        sums: key of `metrics`; field: key of a choice; values: that may stand there.
    """

    url: str
    sums: str
    field: str
    values: set[Any]

    @property
    def option(self) -> str:
        return f"{self.sums}_request_metrics"

    def post(self, route: str, **body: Any) -> httpx.Response:
        asked = {"prompt": PROMPT} if route == "completions" else {"messages": messages()}
        if route == "responses":
            asked = {"input": PROMPT}
        else:
            asked |= {"max_tokens": 24, "ignore_eos": True}
        asked |= {"model": "tiny", "temperature": 0} | body
        return httpx.post(f"{self.url}/{route}", json=asked, timeout=120)

    def ask(self, route: str, level: Any = "detailed", **body: Any) -> dict[str, Any]:
        answer = self.post(route, vllm_xargs={self.option: level}, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, route: str, level: Any = "detailed", **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer."""
        body = {"stream": True, "stream_options": {"include_usage": True}} | body
        answer = self.post(route, vllm_xargs={self.option: level}, **body)
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def check_sums(self, metrics: dict[str, Any], values: list[Any]) -> None:
        """The sums are those of the tokens."""
        found = metrics[self.sums]
        if self.sums == "nvium":
            counts = [values.count(exit_) for exit_ in range(len(self.values))]
            assert found["exit_tokens"] == counts
            assert found["mean_exit_layers"] <= found["mean_run_layers"] <= found["num_layers"]
        else:
            names = ("drafter", "slim", "full")
            assert [found[f"{name}_tokens"] for name in names] == [*map(values.count, names)]
            # All but the last pass left a token of the full model's own.
            assert 0 <= found["full_passes"] - found["full_tokens"] <= 1


def messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module", params=["nvium", "via_sd"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    more: list[str] = ["--max-model-len", "256", "--enable-scale-out"]
    if request.param == "nvium":
        path: Path = request.getfixturevalue("nvium_checkpoint")
        exits = len(json.loads((path / "config.json").read_text())["exit_layers"]) + 1
        found: Any = ("nvium", "nvium_token_exits", set(range(exits)))
    else:
        path = request.getfixturevalue("dense_checkpoint")
        more += ["--via-sd", "--via-sd-slim", "skip", "--via-sd-rounds", "2", "--via-sd-window"]
        more += ["8", "--speculative-config", json.dumps(DRAFTER)]
        more += ["--per-request-spec-decode-metrics", "summary"]
        found = ("via_sd", "via_sd_token_tiers", {"drafter", "slim", "full"})
    with running_server(path, log, *more) as url:
        yield Server(url, *found)


@pytest.mark.parametrize("route", ROUTES)
def test_as_many_values_as_tokens(server: Server, route: str) -> None:
    answer = server.ask(route, return_token_ids=True)
    [choice] = answer["choices"]
    values = choice[server.field]
    assert len(values) == len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == 24
    assert set(values) <= server.values and len(set(values)) > 1
    server.check_sums(answer["metrics"], values)
    # vLLM's own field of a request stays empty, and its own metrics stay.
    assert answer["kv_transfer_params"] is None
    assert bool(answer["metrics"].get("speculative_decoding")) == (server.sums == "via_sd")


@pytest.mark.parametrize("return_token_ids", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_tells_the_same(server: Server, route: str, return_token_ids: bool) -> None:
    whole = server.ask(route)["choices"][0][server.field]
    events = server.stream(route, return_token_ids=return_token_ids)
    chunks = [choice for event in events for choice in event["choices"]]
    assert [value for chunk in chunks for value in chunk.get(server.field, ())] == whole
    with_values = [chunk for chunk in chunks if server.field in chunk]
    assert len(with_values) > 2
    if return_token_ids:
        assert all(len(chunk["token_ids"]) == len(chunk[server.field]) for chunk in with_values)
    # A chat begins with a chunk that has a role and no token.
    assert len(chunks) - len(with_values) == (route == "chat/completions")
    assert events[-1]["choices"] == [] and all("metrics" not in event for event in events[:-1])
    server.check_sums(events[-1]["metrics"], whole)


@pytest.mark.parametrize("route", ROUTES)
def test_sums_alone(server: Server, route: str) -> None:
    answer = server.ask(route, "summary")
    assert server.field not in answer["choices"][0] and server.sums in answer["metrics"]
    *events, last = server.stream(route, "summary")
    assert last["metrics"][server.sums] == answer["metrics"][server.sums]
    assert not any(server.field in choice for event in events for choice in event["choices"])


@pytest.mark.parametrize("route", ROUTES)
def test_several_answers(server: Server, route: str) -> None:
    body = {"n": 3, "temperature": 1.0, "seed": 5, "return_token_ids": True}
    answer = server.ask(route, **body)
    values = [choice[server.field] for choice in answer["choices"]]
    assert [len(v) for v in values] == [len(c["token_ids"]) for c in answer["choices"]] == [24] * 3
    # vLLM describes no more than one answer in `metrics`.
    assert server.sums not in (answer["metrics"] or {})
    streamed: list[list[Any]] = [[], [], []]
    events = server.stream(route, **body)
    for event in events:
        for choice in event["choices"]:
            found = choice.get(server.field, [])
            assert len(found) == len(choice.get("token_ids") or ())
            streamed[choice["index"]] += found
    assert [len(found) for found in streamed] == [24] * 3
    assert server.sums not in events[-1].get("metrics", {})
    if server.sums == "nvium":
        # Who leaves where is a matter of the seed; who said a token first, of the batch too.
        assert streamed == values


def test_several_prompts(server: Server) -> None:
    prompts = [PROMPT, "w40 w41 w40 w41", "w7"]
    body = {"prompt": prompts, "n": 2, "temperature": 1.0, "seed": 5, "return_token_ids": True}
    answer = server.ask("completions", **body)
    assert [len(c[server.field]) for c in answer["choices"]] == [24] * 6
    assert server.sums not in (answer["metrics"] or {})
    events = server.stream("completions", **body)
    counts = dict.fromkeys(range(6), 0)
    for event in events:
        for choice in event["choices"]:
            assert len(choice[server.field]) == len(choice["token_ids"])
            counts[choice["index"]] += len(choice[server.field])
    assert counts == dict.fromkeys(range(6), 24)
    assert server.sums not in events[-1].get("metrics", {})


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stop_cuts_both(server: Server, route: str, include: bool) -> None:
    plain = server.ask(route)["choices"][0]
    words = (plain["text"] if "text" in plain else plain["message"]["content"]).split()
    place = max(words.index(word) for word in words[:-1])
    stop = {"stop": [words[place]], "include_stop_str_in_output": include}
    answer = server.ask(route, return_token_ids=True, **stop)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop" and 0 < len(choice["token_ids"]) < 24
    assert len(choice[server.field]) == len(choice["token_ids"])
    assert choice[server.field] == plain[server.field][: len(choice["token_ids"])]
    server.check_sums(answer["metrics"], choice[server.field])
    events = server.stream(route, **stop)
    streamed = [v for e in events for c in e["choices"] for v in c.get(server.field, ())]
    assert streamed == choice[server.field]


def test_echo_and_the_first_chunks(server: Server) -> None:
    """Of a prompt that is sent back nothing is told."""
    answer = server.ask("completions", echo=True, return_token_ids=True)
    assert len(answer["choices"][0][server.field]) == 24
    for route, body in (
        ("completions", {"echo": True}),
        ("chat/completions", {"echo": True, "add_generation_prompt": False}),
    ):
        events = server.stream(route, return_token_ids=True, **body)
        for choice in (choice for event in events for choice in event["choices"]):
            assert len(choice.get("token_ids") or ()) == len(choice.get(server.field, ()))
        assert sum(len(c.get(server.field, ())) for e in events for c in e["choices"]) == 24


@pytest.mark.parametrize("route", ROUTES)
def test_who_does_not_ask_gets_vllms_answer(server: Server, route: str) -> None:
    """Null is "not given", and "none" is what a request has that says nothing."""
    asked = [None, {}, {server.option: None}, {server.option: "none"}]
    for xargs in asked:
        answer = server.post(route, vllm_xargs=xargs)
        if xargs == {server.option: None}:
            # vLLM's own model of a request lets no null in.
            assert answer.status_code in (200, 400)
            if answer.status_code == 400:
                continue
        assert server.field not in answer.text and f'"{server.sums}"' not in answer.text
    text = server.post(route, stream=True, vllm_xargs={server.option: "none"}).text
    assert server.field not in text and f'"{server.sums}"' not in text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_unknown_values_are_a_400(server: Server, route: str, stream: bool) -> None:
    other = "via_sd" if server.sums == "nvium" else "nvium"
    for xargs, words in (
        (
            {server.option: "all"},
            [f"'{server.option}' is 'all'", "'none', 'summary' or 'detailed'"],
        ),
        ({server.option: 1}, [f"'{server.option}' is 1", "'detailed'"]),
        ({server.option: ["summary"]}, [server.option, "['summary']"]),
        ({f"{other}_request_metrics": "summary"}, [f"'{other}_request_metrics' is 'summary'"]),
    ):
        answer = server.post(route, stream=stream, vllm_xargs=xargs)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert all(word in message for word in words) and message.endswith("."), message


@pytest.mark.parametrize("stream", [True, False])
def test_the_responses_api_refuses_it(server: Server, stream: bool) -> None:
    answer = server.post("responses", stream=stream, vllm_xargs={server.option: "detailed"})
    assert answer.status_code == 400
    assert "the Responses API has no place" in answer.json()["error"]["message"]
    fine = server.post("responses", max_output_tokens=3, vllm_xargs={server.option: "none"})
    assert fine.status_code == 200, fine.text


def test_a_batch_of_chats(server: Server) -> None:
    """One answer for each conversation of a request."""
    chats = [messages(), [{"role": "user", "content": "w40 w41 w40 w41"}], messages()]
    answer = server.ask("chat/completions/batch", messages=chats, return_token_ids=True)
    alone = server.ask("chat/completions", messages=chats[1])["choices"][0]
    assert [len(c[server.field]) for c in answer["choices"]] == [24] * 3
    assert answer["choices"][1][server.field] == alone[server.field] or server.sums == "via_sd"
    assert server.sums not in (answer["metrics"] or {})
    [single] = (one := server.ask("chat/completions/batch", messages=chats[:1]))["choices"]
    server.check_sums(one["metrics"], single[server.field])
    plain = server.post("chat/completions/batch", messages=chats)
    assert plain.status_code == 200 and server.field not in plain.text


@pytest.mark.parametrize("stream", [True, False])
def test_generate_from_tokens_refuses_it(server: Server, stream: bool) -> None:
    url = server.url.replace("/v1", "/inference/v1/generate")
    sampling = {"max_tokens": 3, "temperature": 0}
    body = {"model": "tiny", "token_ids": [5, 9, 17], "sampling_params": sampling}
    fine = httpx.post(url, json=body, timeout=120)
    assert fine.status_code == 200, fine.text
    sampling["extra_args"] = {server.option: "detailed"}
    answer = httpx.post(url, json=body | {"stream": stream}, timeout=120)
    assert answer.status_code == 400, answer.text
    assert "/inference/v1/generate has no place" in answer.json()["error"]["message"]


def test_many_streams_at_once(server: Server) -> None:
    """More than the engine runs at a time in which parts may be joined before they are sent."""

    def count(seed: int) -> list[tuple[int, int]]:
        events = server.stream(
            ROUTES[seed % 2], temperature=1.0, seed=seed, max_tokens=60, return_token_ids=True
        )
        return [
            (len(choice.get("token_ids") or ()), len(choice.get(server.field, ())))
            for event in events
            for choice in event["choices"]
        ]

    with ThreadPoolExecutor(16) as pool:
        for pairs in pool.map(count, range(32)):
            assert all(tokens == values for tokens, values in pairs)
            assert sum(tokens for tokens, _ in pairs) == 60
