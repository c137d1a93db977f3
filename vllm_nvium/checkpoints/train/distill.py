# SPDX-License-Identifier: Apache-2.0
"""`--self-distill N`: text that the dense parent samples of itself, so that exits are trained on
what they will meet. Samples are answers of batch jobs (`vllm-nvium batch`), which go on after
anything was killed and run on as many engines as there are.
"""

import glob
import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_nvium.checkpoints.text import check_disk_space
from vllm_nvium.checkpoints.train.prompts import prompt_ids, read_prompts
from vllm_nvium.console import say
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically

BYTES_PER_TOKEN = 8  # of JSON text, with the prompts
# Nobody knows how long answers will be, so samples are drawn in rounds, a batch job each. In all
# rounds but the first, so many more than the mean length of those before asks for: a round starts
# an engine, which takes longer than some samples too many.
SPARE = 1.05
FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Header:
    """What a file of samples depends on; kept beside it."""

    parent: str
    config_sha256: str
    tokens: int
    seed: int
    temperature: float
    max_new_tokens: int
    prompts: int
    prompts_sha256: str


@dataclass(frozen=True)
class Files:
    """Where samples are: `partial` has those of all rounds that are done, and becomes `out` when
    there are enough."""

    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def header(self) -> Path:
        return self.out.with_name(self.out.name + ".header.json")

    def of_round(self, rows: str) -> tuple[Path, Path]:
        """Input and output of the batch job of a round. Named after what it is asked, so that a
        round is never taken for that of another run."""
        name = f"{self.out.stem}.round-{hashlib.sha256(rows.encode()).hexdigest()[:12]}"
        return self.out.with_name(f"{name}.jsonl"), self.out.with_name(f"{name}.answers.jsonl")

    def remove_rounds(self) -> None:
        for file in self.out.parent.glob(f"{glob.escape(self.out.stem)}.round-*.jsonl"):
            file.unlink()


def self_distill(
    parent: str | Path,
    out: str | Path,
    tokens: int,
    *,
    prompts: Sequence[str] | None = None,
    prompt_files: Sequence[str] = (),
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    max_num_seqs: int = 64,
    enforce_eager: bool = False,
    dtype: str = "auto",
    replicas: int = 1,
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
        seed: of samples and of the order of prompts.
        temperature: of sampling, above 0.
        max_new_tokens: longest answer.
        max_num_seqs: samples that vLLM computes together.
        enforce_eager: without vLLM's compilation.
        dtype: vLLM's `dtype`.
        replicas: engines that sample together.

    Returns:
        `out`, complete.

    Raises:
        UserError: there is nothing to sample from, `out` was made in another way, Ray is not
            installed, or a job stopped; what was sampled until then is kept.
    """
    parent, files = Path(parent).expanduser(), Files(Path(out).expanduser())
    counts = {"tokens": tokens, "max_new_tokens": max_new_tokens, "max_num_seqs": max_num_seqs}
    counts["replicas"] = replicas
    _check_arguments(files, temperature, counts)
    context = _context(parent)
    given = [*(prompts or ()), *read_prompts(prompt_files)]
    ids = prompt_ids(parent, given, max_new_tokens, context)
    header = Header(
        parent=str(parent.resolve()),
        config_sha256=hashlib.sha256((parent / "config.json").read_bytes()).hexdigest(),
        tokens=tokens,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        prompts=len(ids),
        prompts_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    )
    _check_header(files, header)
    if files.out.exists():
        return files.out
    check_disk_space(files.out.parent, BYTES_PER_TOKEN * tokens, "The file of samples")
    files.out.parent.mkdir(parents=True, exist_ok=True)
    if not files.header.exists():
        text = json.dumps(asdict(header), indent=1) + "\n"
        write_atomically(files.header, lambda beside: beside.write_text(text))
    flags = ["--max-num-seqs", str(max_num_seqs), "--dtype", dtype, "--replicas", str(replicas)]
    # No longer than needed, so that the KV cache holds as many samples as possible.
    flags += ["--max-model-len", str(max(map(len, ids)) + max_new_tokens)]
    flags += ["--enforce-eager"] if enforce_eager else []
    # Sampled as is said here, whatever the checkpoint's generation_config.json would add.
    flags += ["--generation-config", "vllm"]
    _sample(files, header, ids, flags)
    return files.out


def _check_arguments(files: Files, temperature: float, counts: Mapping[str, int]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} of self-distillation is {value}: give 1 or more.")
    if not 0 < temperature < math.inf:
        raise UserError(
            f"The temperature of self-distillation is {temperature}: give a number above 0."
        )
    if files.out.suffix != ".jsonl":
        raise UserError(f"Samples are JSONL, and {files.out} must end in .jsonl to be read.")
    if find_spec("ray") is None:
        raise UserError(
            "self-distillation runs batch jobs, and the package 'ray' is not installed: pip "
            "install 'vllm-nvium[ray]'."
        )


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


def _check_header(files: Files, header: Header) -> None:
    """Refuse samples that were made in another way than `header` says."""
    if not files.header.exists():
        if files.out.exists() or files.partial.exists():
            raise UserError(
                f"{files.out} or its .partial exists without {files.header.name}, which says how "
                "it was sampled: move it away or name another file."
            )
        return
    try:
        found = json.loads(files.header.read_text())
    except ValueError:
        raise UserError(f"{files.header} is not JSON: remove it and its samples.") from None
    for name, value in asdict(header).items():
        if found.get(name) != value:
            raise UserError(
                f"{files.out} was sampled with {name} = {found.get(name)}, and {value} is asked "
                f"for now: remove it and {files.header.name}, or name another file."
            )


# --- rounds ---------------------------------------------------------------------------------------


def _sample(files: Files, header: Header, ids: Sequence[list[int]], flags: Sequence[str]) -> None:
    """Samples what is missing, and gives the file its name."""
    lines, tokens = counted(files.partial)
    if lines:
        say(f"Going on behind {tokens} tokens in {files.partial}.")
    while tokens < header.tokens:
        if lines == 0:
            count = math.ceil(header.tokens / header.max_new_tokens)
        else:
            count = math.ceil(SPARE * (header.tokens - tokens) * lines / tokens)
        upcoming = schedule(ids, header.seed)
        samples = list(islice(upcoming, lines, lines + max(count, FEWEST_SAMPLES)))
        answers = _answers(files, header, samples, flags)
        new = []
        for (prompt, _), answer in zip(samples, answers, strict=True):
            if tokens >= header.tokens:
                break
            entry = {"input_ids": [*prompt, *answer], "prompt_tokens": len(prompt)}
            new.append(json.dumps(entry, separators=(",", ":")) + "\n")
            lines += 1
            tokens += len(answer)
        _append(files.partial, new)
        # Not before: without them a killed run would draw the round again.
        files.remove_rounds()
        say(f"Sampled {tokens} of {header.tokens} tokens.")
    files.remove_rounds()
    files.partial.rename(files.out)


def counted(partial: Path) -> tuple[int, int]:
    """Samples and their new tokens in a file, which need not be there."""
    lines = tokens = 0
    if partial.exists():
        with partial.open() as file:
            for line in file:
                entry = json.loads(line)
                lines += 1
                tokens += len(entry["input_ids"]) - entry["prompt_tokens"]
    return lines, tokens


def schedule(prompt_ids: Sequence[list[int]], seed: int) -> Iterator[tuple[list[int], int]]:
    """Prompt and seed of sample 0, 1, 2, ...: all prompts shuffled, again and again."""
    order = list(range(len(prompt_ids)))
    random.Random(f"{seed}/prompts").shuffle(order)
    index = 0
    while True:
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        # torch.Generator takes 64 bits with a sign.
        yield prompt_ids[order[index % len(order)]], int.from_bytes(digest[:8]) >> 1
        index += 1


def _append(partial: Path, lines: Sequence[str]) -> None:
    """All of a round or nothing: what a round begins with depends on where the last one ended."""

    def write(beside: Path) -> None:
        with beside.open("w") as file:
            if partial.exists():
                with partial.open() as old:
                    file.writelines(old)
            file.writelines(lines)

    write_atomically(partial, write)


def _answers(
    files: Files,
    header: Header,
    samples: Sequence[tuple[list[int], int]],
    flags: Sequence[str],
) -> list[list[int]]:
    """New tokens of each sample of a round, by a batch job in a process of its own."""
    asked: dict[str, Any] = {
        "max_tokens": header.max_new_tokens,
        "temperature": header.temperature,
        "return_token_ids": True,
    }
    text = "".join(
        json.dumps({"prompt": prompt, "seed": seed} | asked) + "\n" for prompt, seed in samples
    )
    rows, out = files.of_round(text)
    if not out.exists():
        write_atomically(rows, lambda beside: beside.write_text(text))
        command = [sys.executable, "-m", "vllm_nvium.cli", "batch", str(rows), str(out)]
        command += ["--model", header.parent, *flags]
        if status := subprocess.run(command, check=False).returncode:
            raise UserError(
                f"Sampling from {header.parent} stopped with status {status} (its own messages "
                "are above): what it sampled is kept, and the same command goes on."
            )
    return [_answer(json.loads(line)) for line in out.read_text().splitlines()]


def _answer(result: Mapping[str, Any]) -> list[int]:
    if result["error"] is not None:
        raise UserError(
            f"Sample {result['id']} of self-distillation has no answer "
            f"({result['error']['message']})."
        )
    return list(result["response"]["body"]["choices"][0]["token_ids"])
