# SPDX-License-Identifier: Apache-2.0
"""What a row may say, the request it becomes, and what each bad one is told."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nvium.batch.rows import (
    CHAT,
    COMPLETION,
    Row,
    check_known,
    name_of,
    read_fields,
    read_row,
    row_seed,
)
from vllm_nvium.errors import UserError

MESSAGES = [{"role": "user", "content": "w3"}]


def line(**changes: Any) -> dict[str, Any]:
    found = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": MESSAGES}}
    return found | changes


def test_lines_of_batch_files_are_taken_as_they_are() -> None:
    assert read_row(line(), None) == Row("a", CHAT, {"messages": MESSAGES})
    assert read_row(line(url=COMPLETION, body={"prompt": [3, 4]}), None).body == {"prompt": [3, 4]}


def test_a_body_alone_goes_where_its_prompt_or_messages_belong() -> None:
    plain = {"messages": MESSAGES, "temperature": 0.5, "custom_id": "b"}
    assert read_row(plain, None) == Row("b", CHAT, {"messages": MESSAGES, "temperature": 0.5})
    assert read_row({"prompt": "w3"}, None) == Row(None, COMPLETION, {"prompt": "w3"})


def test_none_is_not_given() -> None:
    row = {"prompt": "w3", "messages": None, "seed": None, "custom_id": None}
    extra = {"nvium_sampling": None, "nvium_max_deferred": 3}
    assert read_row(row | {"vllm_xargs": extra}, 7).body == {
        "prompt": "w3",
        "vllm_xargs": {"nvium_max_deferred": 3},
        "seed": 7,
    }
    assert read_row(line(body={"messages": MESSAGES, "stream": False}), None).body == {
        "messages": MESSAGES
    }


def test_a_row_keeps_its_own_seed() -> None:
    assert read_row({"prompt": "w3", "seed": 5}, 7).body["seed"] == 5


def test_seeds_depend_on_the_place_alone_and_fit_vllm() -> None:
    seeds = [row_seed(seed, index) for seed in (0, 1) for index in range(1000)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, 5) == row_seed(0, 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{bad", "not JSON"),
        (b"[1]", "must be an object"),
        (b"\xff{}", "not UTF-8"),
        (b'"text"', "must be an object"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_text_that_is_no_row(text: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_fields(text)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "w3", "messages": MESSAGES}, "either prompt or messages"),
        ({"prompt": "w3", "custom_id": 3}, "custom_id is 3"),
        ({"prompt": "w3", "stream": True}, "stream is true"),
        (line(extra=1), "extra: Extra inputs are not permitted"),
        (line(custom_id=None), "custom_id"),
        (line(url="/v1/embeddings"), "url"),
        (line(method="GET"), "method"),
        (line(body="text"), "body"),
    ],
)
def test_rows_that_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        read_row(fields, 0)
    assert "\n" not in str(refused.value)


def test_unknown_parameters_are_refused_and_those_of_openai_without_effect_are_not() -> None:
    known = frozenset({"prompt", "temperature"})
    check_known({"prompt": "w3", "metadata": {}, "store": True}, known)
    with pytest.raises(UserError, match="unknown field 'temprature'"):
        check_known({"prompt": "w3", "temprature": 1}, known)


def test_a_bad_row_keeps_its_name() -> None:
    assert name_of({"custom_id": "a", "bad": 1}) == "a"
    assert name_of({"custom_id": ["a"]}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
row_keys = st.sampled_from(
    ["custom_id", "method", "url", "body", "prompt", "messages", "vllm_xargs", "stream", "seed"]
)


@given(st.dictionaries(row_keys | st.text(), json_values))
def test_whatever_a_row_says_it_is_a_request_or_one_sentence(fields: dict[str, Any]) -> None:
    try:
        row = read_row(read_fields(json.dumps(fields).encode()), 0)
    except UserError:
        return
    assert row.url in (CHAT, COMPLETION) and "stream" not in row.body
