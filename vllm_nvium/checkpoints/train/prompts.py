# SPDX-License-Identifier: Apache-2.0
"""Prompts that the dense parent is asked to continue: read from files and data sets, and tokenised
as its chat template lays them out.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_nvium.checkpoints.documents import entries
from vllm_nvium.errors import UserError, first_line

logger = logging.getLogger(__name__)

# The first that a row has. `turns` is a list of what a user says, `messages` a whole conversation.
PROMPT_FIELDS = ("question", "prompt", "instruction", "turns", "messages")

# A prompt is what the user says or, from `messages`, everything before the last answer.
Prompt = str | list[dict[str, Any]]
# Where it is, for messages, and what it says.
Located = tuple[str, Prompt]


def read_prompts(sources: Sequence[str], split: str = "train") -> list[Located]:
    """Prompts of files and datasets, in their order; see `self_distill` in `distill.py`.

    Raises:
        UserError: a source does not exist or has no prompts.
    """
    prompts: list[Located] = []
    for source in sources:
        found: list[Located] = []
        for where, row in entries(source, split):
            if isinstance(row, str):
                lines = enumerate(row.splitlines(), 1)
                found += [(f"{where}, line {i}", line) for i, line in lines if line.strip()]
            elif prompt := _row_prompt(row, where):
                found.append((where, prompt))
        if not found:
            raise UserError(f"{source!r} has no prompts: it must not be empty.")
        prompts += found
    return prompts


def prompt_ids(
    parent: Path, prompts: Sequence[Located], max_new_tokens: int, context: float
) -> list[list[int]]:
    """Token ids of every prompt that leaves room for an answer; of bos, if there are no prompts.

    Args:
        parent: folder of the dense checkpoint, with its tokenizer.
        context: tokens that it can read.

    Raises:
        UserError: no prompt leaves room, or one cannot be laid out.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(parent))
    if not prompts and tokenizer.bos_token_id is None:
        raise UserError(
            f"The tokenizer of {parent} has no bos token to start samples with: give prompts."
        )
    encoded = [_encode(prompt, where, tokenizer, parent) for where, prompt in prompts]
    encoded = encoded or [[int(tokenizer.bos_token_id)]]
    fitting = [ids for ids in encoded if ids and len(ids) + max_new_tokens <= context]
    if not fitting:
        raise UserError(
            f"No prompt leaves room for max_new_tokens={max_new_tokens} in the context of "
            f"{parent}, which is {context:.0f} tokens: give shorter prompts or a smaller number."
        )
    if left_out := len(encoded) - len(fitting):
        logger.warning(
            "%d of %d prompts are left out: with %d new tokens they exceed the context of %d",
            left_out, len(encoded), max_new_tokens, context,
        )  # fmt: skip
    return fitting


def _encode(prompt: Prompt, where: str, tokenizer: Any, parent: Path) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # noqa: BLE001 - templates raise whatever they like
            raise UserError(
                f"{where} holds a prompt that the chat template of {parent} does not take "
                f"({first_line(error)}): give messages as the model expects them."
            ) from error
        return tokenizer(text, add_special_tokens=False).input_ids
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    raise UserError(
        f"{where} holds messages and {parent} has no chat template: give plain prompts."
    )


def _row_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    for name in PROMPT_FIELDS:
        match name, row.get(name):
            case "messages", [*messages]:
                return _before_the_answer(messages, where)
            case "turns", [str(first), *_]:
                return first
            case "question" | "prompt" | "instruction", str(text):
                return text
    raise UserError(
        f"{where} has no prompt ({', '.join(PROMPT_FIELDS)}), only {', '.join(row) or 'nothing'}: "
        "rename the field or give another file."
    )


def _before_the_answer(messages: list[Any], where: str) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where} has {message!r} among its messages, and objects with role and content "
                "are needed."
            )
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    return messages
