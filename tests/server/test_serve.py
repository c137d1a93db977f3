# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process on a tiny N-vium checkpoint: completions and chat, plain and
streamed, per-request overrides, and the examples as written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import free_port, running_server, vllm_command

ROOT = Path(__file__).parents[2]
PROMPT = "w5 w9 w17 w33"
# Random routers and heads: the greedy choice is well defined, and the model ends no sequence early.
FIXED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
NO_END = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(nvium_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    arguments = ("--max-model-len", "256", "--nvium-max-deferred", "8")
    with running_server(nvium_checkpoint, log, *arguments) as url:
        yield url


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=120)


def complete(client: openai.OpenAI, **options: Any) -> str:
    body = NO_END | options.pop("body", {})
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, extra_body=body, **(FIXED | options)
    )
    return answer.choices[0].text


def test_completion_and_its_stream_agree(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, extra_body=NO_END, **FIXED)
    assert answer.usage is not None and answer.usage.completion_tokens == FIXED["max_tokens"]
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, stream=True, extra_body=NO_END, **FIXED
    )
    chunks = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(chunks) > 1
    assert "".join(chunks) == answer.choices[0].text


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "extra_body": NO_END, **FIXED}
    answer = client.chat.completions.create(**options)
    assert answer.usage.completion_tokens == FIXED["max_tokens"]
    stream = client.chat.completions.create(stream=True, **options)
    chunks = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(chunks) == answer.choices[0].message.content


def test_override_of_the_law_and_of_the_cap(client: openai.OpenAI) -> None:
    for law in ("routed", "mixture"):
        # How many positions wait is a matter of speed and never of the text.
        texts = {
            complete(client, body={"vllm_xargs": {"nvium_sampling": law, "nvium_max_deferred": n}})
            for n in (0, 1, 8)
        }
        assert len(texts) == 1 and texts.pop().strip()


def test_seed_reproduces(client: openai.OpenAI) -> None:
    texts = [complete(client, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"nvium_sampling": "greedy"}, ["nvium_sampling", "greedy", "routed", "mixture"]),
        ({"nvium_max_deferred": -1}, ["nvium_max_deferred", "-1", "0..2147483647"]),
        ({"nvium_max_deferred": "many"}, ["nvium_max_deferred", "many", "0..2147483647"]),
        ({"nvium_max_deferred": 2**63}, ["nvium_max_deferred", "9223372036854775808"]),
        ({"nvium_max_deferred": 9}, ["nvium_max_deferred", "9", "at most 8", "max-deferred"]),
        ({"nvium_max_deferred": [3]}, ["nvium_max_deferred", "[3]", "0..2147483647"]),
        ({"via_sd": "off"}, ["'via_sd' is 'off'", "VIA-SD is off", "remove it."]),
        ({"nvium_maximum": 3}, ["nvium_maximum", "nvium_max_deferred"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_override_is_a_400(
    client: openai.OpenAI, xargs: dict[str, Any], words: list[str], stream: bool
) -> None:
    before = complete(client)
    messages: Any = [{"role": "user", "content": PROMPT}]
    for call in (
        lambda body: client.completions.create(
            model="tiny", prompt=PROMPT, stream=stream, extra_body=body
        ),
        lambda body: client.chat.completions.create(
            model="tiny", messages=messages, stream=stream, extra_body=body
        ),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call({"vllm_xargs": xargs})
        assert error.value.status_code == 400
        assert all(word in str(error.value.body) for word in words), error.value.body
    assert complete(client) == before


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_override_of_a_beam_search_is_a_400(client: openai.OpenAI, route: str) -> None:
    body = {"model": "tiny", "use_beam_search": True, "n": 2, "max_tokens": 2, "prompt": PROMPT}
    body |= {"messages": [{"role": "user", "content": PROMPT}]}
    body["vllm_xargs"] = {"nvium_max_deferred": 3}
    with pytest.raises(openai.BadRequestError, match="'nvium_max_deferred' is 3, but use_beam"):
        client.post(f"/{route}", body=body, cast_to=object)


@pytest.mark.parametrize("stream", [False, True])
def test_bad_override_of_a_response_is_a_400(client: openai.OpenAI, stream: bool) -> None:
    for xargs in ({"nvium_max_deferred": 2**63}, {"via_sd": "off"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(xargs))):
            client.responses.create(
                model="tiny", input=PROMPT, stream=stream, extra_body={"vllm_xargs": xargs}
            )


def test_streaming_example(server: str) -> None:
    result = run_example("serve_and_stream.py", "--base-url", server, "--prompt", PROMPT)
    assert "The server's own sampling law:\n" in result
    assert "400:" in result and "'greedy'" in result


def test_offline_example(nvium_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # two processes less to wait for
    result = run_example(
        "offline_generation.py", str(nvium_checkpoint), "--max-tokens", "4", "--enforce-eager"
    )
    assert result.count(" -> ") == 3


def run_example(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_several_front_ends_know_the_flags(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Each in a process of its own, which vLLM gives what the command line said."""
    log = tmp_path / "log"
    flags = ("--via-sd", "--via-sd-slim", "skip", "--via-sd-request-metrics", "summary")
    more = ("--api-server-count", "2", "--max-model-len", "256")
    with running_server(dense_checkpoint, log, *flags, *more) as url:
        for request in range(8):
            # A connection of its own, so that all of them answer some.
            body = {"vllm_xargs": {"via_sd": "off"} if request % 2 else {}}
            answer = httpx.post(
                f"{url}/completions",
                json={"model": "tiny", "prompt": PROMPT} | FIXED | NO_END | body,
                timeout=120,
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["metrics"]["via_sd"]["full_passes"] > 0
        metrics = httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=60).text
    [passes] = re.findall(r"^vllm:via_sd_full_passes_total{.*} (.*)$", metrics, re.MULTILINE)
    assert float(passes) > 8
    assert len(set(re.findall(r"ApiServer_\d", log.read_text()))) == 2


def test_help_shows_the_flags() -> None:
    for argument in ("--help=all", "--help=N-vium"):
        result = subprocess.run(
            vllm_command("serve", argument), capture_output=True, text=True, check=False
        )
        shown = result.stdout
        assert "N-vium" in shown and "--nvium-sampling" in shown and "--nvium-max-deferred" in shown


def test_refusal_ends_the_command_with_its_sentence(nvium_checkpoint: Path) -> None:
    command = vllm_command("serve", str(nvium_checkpoint), "--port", str(free_port()))
    result = subprocess.run(
        [*command, "--speculative-config", json.dumps(SPECULATION)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "--speculative-config is 'ngram'" in last and "remove it." in last, result.stderr[-3000:]


SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
