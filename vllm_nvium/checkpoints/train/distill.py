# SPDX-License-Identifier: Apache-2.0
"""`--self-distill N`: text that the dense parent samples of itself, so that exits are trained on
what they will meet. Samples are answers of batch jobs (`vllm-nvium batch`), which go on after
anything was killed and run on as many engines as there are.
"""

import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from vllm_nvium import weights
from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.text import check_disk_space
from vllm_nvium.checkpoints.train.prompts import Located, prompt_ids, read_prompts
from vllm_nvium.console import say
from vllm_nvium.errors import UserError
from vllm_nvium.files import read_record, write_atomically

BYTES_PER_TOKEN = 8  # of JSON text, with the prompts
# Nobody knows how long answers will be, so samples are drawn in rounds, a batch job each. In all
# rounds but the first, so many more than the mean length of those before asks for: a round starts
# an engine, which takes longer than some samples too many.
SPARE = 1.05
FEWEST_SAMPLES = 8
# In the header; samples of earlier versions have none.
WEIGHTS = "weights_digest"


def self_distill(
    parent: str | Path,
    out: str | Path,
    tokens: int,
    *,
    prompts: Sequence[str] | None = None,
    prompt_files: Sequence[str] = (),
    seed: int = 0,
    max_new_tokens: int = 256,
    replicas: int = 1,
    engine: Sequence[str] = (),
) -> Path:
    """Sample about `tokens` new tokens from a dense model, into a JSONL file.

    Each line is `{"input_ids": [...], "prompt_tokens": n}`: a prompt of n tokens and its answer,
    which ends with eos if the model ended it. `text.load_blocks` reads it. Prompts are taken in a
    shuffled order, and again with other seeds when all are used. A run that was stopped goes on
    with what it has. Sample i is drawn with a seed made from `(seed, i)`, so the file does not
    depend on how samples were batched, nor on the replicas (but for the rounding of matrix
    products, which differs with the batch).

    Args:
        parent: folder of the dense checkpoint, with its tokenizer.
        out: file to write; a file `OUT.header.json` beside it says how it was made.
        tokens: new tokens wanted; the last sample may exceed them.
        prompts: text of prompts, each one turn of a user if there is a chat template.
        prompt_files: sources as in `text.load_blocks`. Rows give their `question`, `prompt`,
            `instruction`, first of `turns`, or `messages` up to the last answer; of a text file,
            each line that is not empty is a prompt. Without any prompt, samples start from bos.
        replicas: engines that sample together.
        engine: more flags of `vllm-nvium batch`.

    Returns:
        `out`, complete.

    Raises:
        UserError: there is nothing to sample from, `out` was made in another way, Ray is not
            installed, or a job stopped; what was sampled until then is kept.
    """
    parent, out = Path(parent).expanduser(), Path(out).expanduser()
    counts = {"tokens": tokens, "max_new_tokens": max_new_tokens, "replicas": replicas}
    _check_arguments(out, counts)
    context = _context(parent)
    given: list[Located] = [(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts or ())]
    given += read_prompts(prompt_files)
    ids = prompt_ids(parent, given, max_new_tokens, context)
    # What the samples depend on.
    header = {
        "parent": str(parent.resolve()),
        "config_sha256": hashlib.sha256((parent / "config.json").read_bytes()).hexdigest(),
        WEIGHTS: weights.digest(str(parent)),
        "tokens": tokens,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "prompts": len(ids),
        "prompts_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }
    is_new = _check_header(out, header)
    if out.exists():
        shutil.rmtree(_rounds_of(out), ignore_errors=True)
        return out
    check_disk_space(out.parent, BYTES_PER_TOKEN * tokens, "The file of samples")
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_new:
        shutil.rmtree(_rounds_of(out), ignore_errors=True)
        _write(_header_of(out), json.dumps(header, indent=1) + "\n")
    flags = ["--max-num-seqs", "64", "--replicas", str(replicas)]
    # No longer than needed, so that the KV cache holds as many samples as possible.
    flags += ["--max-model-len", str(max(map(len, ids)) + max_new_tokens)]
    # Sampled as is said here, whatever the checkpoint's generation_config.json would add.
    flags += ["--generation-config", "vllm", *engine]
    _sample(out, header, ids, flags)
    return out


def _check_arguments(out: Path, counts: Mapping[str, int]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} of self-distillation is {value}: give 1 or more.")
    if out.suffix != ".jsonl":
        raise UserError(f"Samples are JSONL, and {out} must end in .jsonl to be read.")
    require("ray", extra="ray")  # of batch jobs


def _context(parent: Path) -> float:
    """How many tokens a dense checkpoint can read."""
    if not (parent / "config.json").is_file():
        raise UserError(f"{parent} has no config.json: give the folder of a dense checkpoint.")
    config = json.loads((parent / "config.json").read_text())
    if config.get("model_type") == "nvium":
        raise UserError(
            f"{parent} is an N-vium checkpoint, and samples come from the dense model it is made "
            "from: give that."
        )
    return config.get("max_position_embeddings") or math.inf


def _header_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.header.json")


def _rounds_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.rounds")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda beside: beside.write_text(text))


def _check_header(out: Path, header: Mapping[str, Any]) -> bool:
    """Refuse samples that were made in another way than `header` says; True where there are none
    yet."""
    file = _header_of(out)
    if not file.exists():
        if out.exists():
            raise UserError(
                f"{out} exists without {file.name}, which says how it was sampled: move it away or "
                "name another file."
            )
        return True
    found = read_record(file)
    for name, value in header.items():
        if name == WEIGHTS and found.get(name) is None:
            continue
        if found.get(name) != value:
            raise UserError(
                f"{out} was sampled with {name} = {found.get(name)}, and {value} is asked for now: "
                f"remove it and {file.name}, or name another file."
            )
    return False


# --- rounds ---------------------------------------------------------------------------------------


def _sample(
    out: Path, header: Mapping[str, Any], ids: Sequence[list[int]], flags: Sequence[str]
) -> None:
    """Round after round until there are enough tokens. What a round asks follows from those before
    it, so after a kill the rounds that have their answers are read, and the next one goes on."""
    folder, entries, tokens = _rounds_of(out), list[str](), 0
    folder.mkdir(exist_ok=True)
    for number in count():
        if tokens >= header["tokens"]:
            break
        if entries:
            wanted = SPARE * (header["tokens"] - tokens) * len(entries) / tokens
        else:
            wanted = header["tokens"] / header["max_new_tokens"]
        first, upcoming = len(entries), schedule(ids, header["seed"])
        samples = list(islice(upcoming, first, first + max(math.ceil(wanted), FEWEST_SAMPLES)))
        answers = _answers(folder / f"{number}.jsonl", header, samples, flags)
        for (prompt, _), answer in zip(samples, answers, strict=True):
            if tokens >= header["tokens"]:
                break
            entry = {"input_ids": [*prompt, *answer], "prompt_tokens": len(prompt)}
            entries.append(json.dumps(entry, separators=(",", ":")) + "\n")
            tokens += len(answer)
        say(f"Sampled {tokens} of {header['tokens']} tokens.")
    _write(out, "".join(entries))
    shutil.rmtree(folder)


def schedule(prompt_ids: Sequence[list[int]], seed: int) -> Iterator[tuple[list[int], int]]:
    """Prompt and seed of sample 0, 1, 2, ...: all prompts shuffled, again and again."""
    order = list(range(len(prompt_ids)))
    random.Random(f"{seed}/prompts").shuffle(order)
    for index in count():
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        # torch.Generator takes 64 bits with a sign.
        yield prompt_ids[order[index % len(order)]], int.from_bytes(digest[:8]) >> 1


def _answers(
    rows: Path,
    header: Mapping[str, Any],
    samples: Sequence[tuple[list[int], int]],
    flags: Sequence[str],
) -> list[list[int]]:
    """New tokens of each sample of a round, by a batch job in a process of its own."""
    answered = rows.with_suffix(".answers.jsonl")
    if not answered.exists():
        asked: dict[str, Any] = {
            "max_tokens": header["max_new_tokens"],
            "temperature": 1.0,
            "return_token_ids": True,
        }
        lines = (json.dumps({"prompt": ids, "seed": seed} | asked) + "\n" for ids, seed in samples)
        _write(rows, "".join(lines))
        command = [sys.executable, "-m", "vllm_nvium.cli", "batch", str(rows), str(answered)]
        command += ["--model", header["parent"], *flags]
        if status := subprocess.run(command, check=False).returncode:
            raise UserError(
                f"Sampling from {header['parent']} stopped with status {status} (its own messages "
                "are above): what it sampled is kept, and the same command goes on."
            )
    return [_answer(json.loads(line)) for line in answered.read_text().splitlines()]


def _answer(result: Mapping[str, Any]) -> list[int]:
    if result["error"] is not None:
        raise UserError(
            f"Sample {result['id']} of self-distillation has no answer "
            f"({result['error']['message']})."
        )
    return list(result["response"]["body"]["choices"][0]["token_ids"])
