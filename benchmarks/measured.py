# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks that compare engines share: the machine's name, prompts of a file, and rates
and ratios of runs that took turns.
"""

import json
import os
import platform
import random
import statistics
from pathlib import Path
from typing import Any


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{name} (CPU)"
    libraries = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    preloaded = f", {' and '.join(libraries)} preloaded" if libraries else ""
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}{preloaded}"


def set_environment() -> None:
    """What engines of a benchmark share, where the caller has not said it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def read_texts(path: Path) -> list[str]:
    """Of a file of JSON lines with question, prompt or turns."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row.get("question") or row.get("prompt") or row["turns"][0] for row in rows]


def read_prompts(path: Path, model: str, longest: int = 512, chat: bool = True) -> list[list[int]]:
    """Token ids of the prompts in a file of JSON lines.

    Args:
        model: folder with the tokenizer.
        longest: longer prompts are left out.
        chat: put them into the model's chat template, if it has one.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for text in read_texts(path):
        if chat and tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        special = not (chat and tokenizer.chat_template)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if len(ids) <= longest:
            found.append(ids)
    # Files are ordered by kind; a run should meet all kinds.
    random.Random(0).shuffle(found)
    return found


def drafter_config(drafter: str, drafts: int) -> dict[str, Any]:
    """vLLM's `speculative_config` of `ngram`, `suffix`, or a draft model in a folder."""
    found: dict[str, Any] = {"method": "draft_model", "model": drafter}
    if drafter == "ngram":
        found = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    elif drafter == "suffix":
        # Without its memory of other requests: every plan decodes the same prompts, and whoever
        # came later would find the whole answer there.
        found = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
    return found | {"num_speculative_tokens": drafts}


def copied(prompt: list[int], text: list[int], length: int = 4) -> float:
    """The share of a text's n-grams of `length` tokens that stood in prompt or text before."""
    whole, seen, found = prompt + text, set(), 0
    for i in range(len(whole) - length + 1):
        gram = tuple(whole[i : i + length])
        found += gram in seen and i + length > len(prompt)
        seen.add(gram)
    return found / max(len(text), 1)


def rates(runs: list[dict[str, float]]) -> list[float]:
    """Tokens per second of every run, prefill included."""
    return [run["tokens"] / (run["prefill"] + run["decode"]) for run in runs]


def ratios(mine: list[float], other: list[float]) -> str:
    """Median of the ratios pair by pair, with their range: pairs drift together."""
    pairs = [a / b for a, b in zip(mine, other, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f}-{max(pairs):.3f})"
