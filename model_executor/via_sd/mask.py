# SPDX-License-Identifier: Apache-2.0
"""Which layers of the target VIA-SD's slim verifier skips: the value of `--via-sd-mask` read and
checked, and the file that `vllm-nvium search-mask` writes. Read when an engine starts, so nothing
here needs torch or vLLM."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically

FLAG = "--via-sd-mask"
FORMS = "even:RATIO, layers such as 3,5,8-12, or the path of a mask file (.json)"
FEWEST_LAYERS_FOR_EVEN = 3

MISTRAL = "MistralForCausalLM"
Objective = Literal["divergence", "agreement", "speed"]


# ---- which model a mask is for


class ModelIdentity(BaseModel):
    """What tells one target from another: the sizes that every loader of a checkpoint agrees on.

    A fine-tune of a model has its identity, and a mask found for the one runs on the other. What
    changes when a checkpoint is saved or loaded again (dtype, versions, paths, cache flags) is left
    out, and so is whether embeddings are tied, which families store in different places.

    Attributes:
        model_type: of the language model's part, as transformers names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int | tuple[int, ...] | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> "ModelIdentity":
        """The identity of a model.

        Args:
            config: the content of a `config.json`, or a configuration object with `to_dict()`; of
                a model of several parts, the language model's `text_config` counts.

        Raises:
            UserError: it lacks one of the sizes.
        """
        found = dict(config if isinstance(config, Mapping) else config.to_dict())
        if isinstance(found.get("text_config"), Mapping):
            found |= found["text_config"]
        fields = {name: found.get(name) for name in cls.model_fields}
        # vLLM's reader of Mistral's own format names no type.
        if fields["model_type"] in ("", "transformer") and found.get("architectures") == [MISTRAL]:
            fields["model_type"] = "mistral"
        # Files of older models leave out what configuration classes then fill in like this.
        if fields["num_attention_heads"]:
            fields["num_key_value_heads"] = (
                fields["num_key_value_heads"] or fields["num_attention_heads"]
            )
            if fields["head_dim"] is None and fields["hidden_size"]:
                fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            name = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"The target's configuration (model_type {found.get('model_type')!r}) has "
                f"{name} = {fields.get(name)!r}, and masks are for models of plain layers."
            ) from error

    def difference(self, other: "ModelIdentity") -> str | None:
        """The first field that is not the same, as `name is A there and B here`; `self` is here."""
        for name in type(self).model_fields:
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return f"{name} is {there!r} there and {here!r} here"
        return None


# ---- masks by name


def skipped_layers(
    spec: str, num_layers: int, identity: ModelIdentity | None = None
) -> tuple[int, ...]:
    """The layers that the slim verifier skips.

    Args:
        spec: the value of `--via-sd-mask`: `even:RATIO` (see `even_layers`), layers and ranges of
            layers such as `3,5,8-12` (0 is the first), or the path of a mask file (`.json`).
        num_layers: layers of the target.
        identity: of the target; a file of another model is refused. `None` leaves that out.

    Returns:
        indices in ascending order; at least one layer is skipped and at least one is kept.

    Raises:
        UserError: the value cannot be used with this target.
    """
    text = spec.strip()
    if text.startswith("even:"):
        return _even(spec, text.removeprefix("even:"), num_layers)
    if text.endswith(".json"):
        return _from_file(Path(text), num_layers, identity)
    if re.fullmatch(r"[-\d,\s]+", text):
        return _from_list(spec, text, num_layers)
    raise UserError(f"{FLAG} is {spec!r}, and it must be {FORMS}.")


def skip_count(ratio: float, num_layers: int) -> int:
    """Layers to skip: `ratio * num_layers` rounded, a half to the even number."""
    return round(ratio * num_layers)


def even_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers spread evenly over the inner ones; first and last are kept.

    The L-2 inner layers are cut into `count` equal stretches, and each loses its middle layer:
    `1 + floor((i + 1/2) (L-2) / count)` for i = 0 .. count-1.
    """
    return tuple(1 + (2 * i + 1) * (num_layers - 2) // (2 * count) for i in range(count))


def layer_list(layers: Sequence[int]) -> str:
    """Ascending indices in the short form that `skipped_layers` reads: `3,5,8-12`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _even(spec: str, ratio_text: str, num_layers: int) -> tuple[int, ...]:
    try:
        ratio = float(ratio_text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1:
        raise UserError(
            f"{FLAG} is {spec!r}, and its ratio must be greater than 0 and less than 1."
        )
    if num_layers < FEWEST_LAYERS_FOR_EVEN:
        raise UserError(
            f"{FLAG} is {spec!r}, which keeps the first and the last layer, and the target has "
            f"{num_layers}: name the layers to skip."
        )
    count = skip_count(ratio, num_layers)
    if not 1 <= count <= num_layers - 2:
        raise UserError(
            f"{FLAG} is {spec!r}, which skips {count} of {num_layers} layers, and from 1 to "
            f"{num_layers - 2} can be skipped when the first and the last are kept: give a ratio "
            f"from {1 / num_layers:.3g} to {(num_layers - 2) / num_layers:.3g}."
        )
    return even_layers(num_layers, count)


def _from_list(spec: str, text: str, num_layers: int) -> tuple[int, ...]:
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UserError(
                f"{FLAG} is {spec!r}, in which {part.strip()!r} is neither a layer nor a range: "
                "give layers such as 3,5,8-12."
            )
        # Before the range is filled in: a slip of the finger can make it long.
        if last >= num_layers:
            raise UserError(
                f"{FLAG} is {spec!r}, which names layer {last}, and the target's {num_layers} "
                f"layers are 0 to {num_layers - 1}."
            )
        layers += range(first, last + 1)
    layers.sort()
    for one, next_one in pairwise(layers):
        if one == next_one:
            raise UserError(f"{FLAG} is {spec!r}, which names layer {one} twice: name it once.")
    if len(layers) == num_layers:
        raise UserError(
            f"{FLAG} is {spec!r}, which skips all {num_layers} layers of the target: keep at least "
            "one."
        )
    return tuple(layers)


def _from_file(path: Path, num_layers: int, identity: ModelIdentity | None) -> tuple[int, ...]:
    mask = read_mask_file(path)
    what = f"{FLAG} is {str(path)!r}, which was made for {mask.model!r}"
    remedy = "search a mask for this target with `vllm-nvium search-mask`"
    if mask.num_layers != num_layers:
        raise UserError(
            f"{what} with {mask.num_layers} layers, and the target has {num_layers}: {remedy}."
        )
    if identity is not None and (difference := identity.difference(mask.identity)):
        raise UserError(f"{what}, another model ({difference}): {remedy}.")
    return mask.skipped


# ---- the file


class Calibration(BaseModel):
    """The text that a mask was searched on.

    Attributes:
        sources: as they were named.
        prefixes: positions whose next token was predicted.
        block_size: tokens of the longest prefix.
        sha256: of the token ids as int64 numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...]
    prefixes: int
    block_size: int
    sha256: str


class MaskFile(BaseModel):
    """A mask and how it was found: all that the same search needs to be run again.

    Attributes:
        model: what the target was called when the mask was searched.
        weights: what tells its weights from others of the same sizes (`weights.fingerprint`);
            `None` where that was not known.
        skipped: indices in ascending order.
        skip_ratio: as it was asked for; `skipped` has that share of the layers, rounded.
        alpha: of the divergence; `None` with another objective, and so is `beta`.
        drafter: of the objective `speed`.
        trials: masks that were scored.
        random_share: of them, drawn without regard to the others' scores.
        ends_allowed: whether the first and the last layer could be skipped.
        ranked: whether every layer was first left out alone.
        score: of `skipped`, see `objective`.
        even_score: of as many layers spread evenly.
        made_with: versions, by package.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["via-sd-mask"] = "via-sd-mask"
    version: Literal[1] = 1
    model: str
    identity: ModelIdentity
    weights: str | None = None
    num_layers: int
    skipped: tuple[int, ...]
    skip_ratio: float
    objective: Objective
    alpha: float | None
    beta: float | None
    drafter: str | None
    calibration: Calibration
    seed: int
    trials: int
    random_share: float
    ends_allowed: bool
    ranked: bool
    dtype: str
    score: float
    even_score: float
    made_with: dict[str, str]

    @model_validator(mode="after")
    def _check_layers(self) -> "MaskFile":
        layers = self.skipped
        if not layers or len(layers) >= self.num_layers:
            raise ValueError(f"{len(layers)} of {self.num_layers} layers are skipped")
        if any(one >= next_one for one, next_one in pairwise(layers)):
            raise ValueError("skipped is not in ascending order")
        if layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ValueError(f"skipped has layers outside 0 to {self.num_layers - 1}")
        return self


def mask_file_of(spec: str) -> MaskFile | None:
    """The mask file that a value of `--via-sd-mask` names; None when it names none.

    Raises:
        UserError: see `read_mask_file`.
    """
    text = spec.strip()
    return read_mask_file(Path(text)) if text.endswith(".json") else None


def read_mask_file(path: Path) -> MaskFile:
    """Read a file of `write_mask_file`.

    Raises:
        UserError: it cannot be read, or is no mask file.
    """
    path = path.expanduser()
    try:
        return MaskFile.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"{FLAG} is {str(path)!r}, which cannot be read ({error.strerror or error})."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        reason = str(error)
    raise UserError(
        f"{FLAG} is {str(path)!r}, which is no mask file of this version ({reason}): write one "
        "with `vllm-nvium search-mask`."
    )


def write_mask_file(path: Path, mask: MaskFile) -> None:
    """Write a mask as JSON; a file that is there already is replaced as a whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(mask.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))
