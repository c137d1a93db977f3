# SPDX-License-Identifier: Apache-2.0
"""`--self-distill N`: text that the dense parent samples of itself through vLLM, so that exits are
trained on what they will meet. The engine runs in a process of its own and can be interrupted.
"""

import fcntl
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from vllm_nvium.checkpoints.text import check_disk_space
from vllm_nvium.checkpoints.train.prompts import prompt_ids, read_prompts
from vllm_nvium.console import complain, interactive, say
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically

BYTES_PER_TOKEN = 8  # of JSON text, with the prompts
# Samples between two writes, in batches: the engine idles at the end of each, and a process that
# is killed loses what it has not written.
BATCHES_PER_WRITE = 4
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
    """Where samples are: `partial` becomes `out` when it is complete."""

    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def header(self) -> Path:
        return self.out.with_name(self.out.name + ".header.json")


# --- in the caller's process ----------------------------------------------------------------------


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
) -> Path:
    """Sample about `tokens` new tokens from a dense model, into a JSONL file.

    Each line is `{"input_ids": [...], "prompt_tokens": n}`: a prompt of n tokens and its answer,
    which ends with eos if the model ended it. `text.load_blocks` reads it. Prompts are taken in a
    shuffled order, and again with other seeds when all are used. A run that was stopped goes on
    behind its last line. Sample i is drawn with a seed made from `(seed, i)`, so the file does not
    depend on how samples were batched (but for the rounding of matrix products, which differs
    with the batch).

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

    Returns:
        `out`, complete.

    Raises:
        UserError: there is nothing to sample from, `out` was made in another way, or the
            engine stopped; what was sampled until then is kept.
    """
    parent, files = Path(parent).expanduser(), Files(Path(out).expanduser())
    counts = {"tokens": tokens, "max_new_tokens": max_new_tokens, "max_num_seqs": max_num_seqs}
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
    engine = {"max_num_seqs": max_num_seqs, "enforce_eager": enforce_eager, "dtype": dtype}
    request = asdict(header) | {"out": str(files.out), "prompt_ids": ids, "engine": engine}
    _run_child(request, files)
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


def _run_child(request: Mapping[str, Any], files: Files) -> None:
    """Sample in a process of its own: it takes the engine's memory with it when it ends."""
    from vllm_nvium.environment import environment_for

    environment = environment_for(str(request["parent"]), os.environ)
    # The child is the engine's own process: a second one would only start later and end later.
    environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as folder:
        # A file, because thousands of prompts are too long for an argument.
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        status = subprocess.run(
            [sys.executable, "-m", "vllm_nvium.checkpoints.train.distill", str(path)],
            env=environment,
            check=False,
        ).returncode
    if status or not files.out.exists():
        raise UserError(
            f"Sampling from {request['parent']} stopped with status {status} (its own messages are "
            f"above): what it sampled is kept in {files.partial}, and the same command goes on."
        )


# --- in the child ---------------------------------------------------------------------------------


def sample(request: Mapping[str, Any]) -> int:
    """Sample what is missing and give the file its name; returns the exit status."""
    files = Files(Path(request["out"]))
    with files.partial.open("a+b") as file:
        try:
            # An engine whose caller was killed may still be writing.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            complain(f"vllm-nvium: another process is writing {files.partial}; wait for it.")
            return 1
        lines, tokens = recover(file)
        if lines:
            say(f"Going on behind {tokens} tokens in {files.partial}.")
        _sample_into(file, request, lines, tokens)
    files.partial.rename(files.out)
    return 0


def recover(file: BinaryIO) -> tuple[int, int]:
    """Cut an unfinished last line off.

    Args:
        file: opened with `a+b`.

    Returns:
        lines and new tokens in the file, which stands at its end.
    """
    file.seek(0)
    lines = tokens = end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)
        lines += 1
        tokens += len(entry["input_ids"]) - entry["prompt_tokens"]
        end += len(line)
    file.truncate(end)
    file.seek(end)
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


def _sample_into(file: BinaryIO, request: Mapping[str, Any], lines: int, tokens: int) -> None:
    wanted = request["tokens"]
    if tokens >= wanted:
        return
    llm = _engine(request)
    upcoming = islice(schedule(request["prompt_ids"], request["seed"]), lines, None)
    while tokens < wanted:
        mean = tokens / lines if lines else request["max_new_tokens"]
        most = BATCHES_PER_WRITE * request["engine"]["max_num_seqs"]
        count = min(most, max(FEWEST_SAMPLES, math.ceil((wanted - tokens) / mean)))
        batch = list(islice(upcoming, count))
        for (prompt, _), answer in zip(batch, _generate(llm, batch, request), strict=True):
            if tokens >= wanted:  # where the file ends must not depend on the batch
                break
            entry = {"input_ids": [*prompt, *answer], "prompt_tokens": len(prompt)}
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            lines += 1
            tokens += len(answer)
        file.flush()
        os.fsync(file.fileno())
        say(f"Sampled {tokens} of {wanted} tokens.")


def _engine(request: Mapping[str, Any]) -> Any:
    from vllm import LLM

    longest = max(map(len, request["prompt_ids"]))
    return LLM(
        model=request["parent"],
        # No longer than needed, so that the KV cache holds as many samples as possible.
        max_model_len=longest + request["max_new_tokens"],
        # vLLM 0.32 on CPU stops when the prompt of a seeded request is computed in chunks.
        enable_chunked_prefill=False,
        seed=0,
        disable_log_stats=True,
        **request["engine"],
    )


def _generate(
    llm: Any, batch: Sequence[tuple[list[int], int]], request: Mapping[str, Any]
) -> list[list[int]]:
    """New tokens of each sample."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["max_new_tokens"],
            seed=seed,
            detokenize=False,
        )
        for _, seed in batch
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in batch]
    outputs = llm.generate(prompts, params, use_tqdm=interactive())
    return [list(output.outputs[0].token_ids) for output in outputs]


# vLLM may spawn processes, which import this file again.
if __name__ == "__main__":
    sys.exit(sample(json.loads(Path(sys.argv[1]).read_text())))
