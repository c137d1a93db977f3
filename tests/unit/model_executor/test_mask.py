# SPDX-License-Identifier: Apache-2.0
"""Masks of VIA-SD's slim verifier: every form of `--via-sd-mask` names the layers it should, files
come back as they were written, and what does not fit the target is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mask_files import IDENTITY, mask_file
from transformers import AutoConfig, Gemma3Config, LlamaConfig, MistralConfig

from tiny_models import SIZES, make_dense
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd.mask import (
    ModelIdentity,
    even_layers,
    layer_list,
    read_mask_file,
    skip_count,
    skipped_layers,
    write_mask_file,
)

# --- masks by name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "num_layers", "layers"),
    [
        ("even:0.5", 8, (1, 3, 4, 6)),
        ("even:0.25", 8, (2, 5)),
        ("even:0.125", 8, (4,)),
        ("even:0.45", 30, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28)),
        ("even:.34", 3, (1,)),
        (" even:0.75 ", 8, (1, 2, 3, 4, 5, 6)),
        ("3", 8, (3,)),
        ("3,5", 8, (3, 5)),
        ("5,3", 8, (3, 5)),
        ("0-2,7", 8, (0, 1, 2, 7)),
        (" 1 , 4 - 5 ", 8, (1, 4, 5)),
        ("4-4", 8, (4,)),
    ],
)
def test_forms(spec: str, num_layers: int, layers: tuple[int, ...]) -> None:
    assert skipped_layers(spec, num_layers, None) == layers


def test_even_takes_the_middle_of_equal_stretches() -> None:
    # Nine inner layers in three stretches: 1-3, 4-6, 7-9.
    assert even_layers(11, 3) == (2, 5, 8)


@given(st.integers(3, 200), st.data())
def test_even_layers_are_inner_and_evenly_apart(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_layers - 2))
    layers = even_layers(num_layers, count)
    assert len(set(layers)) == count
    assert list(layers) == sorted(layers)
    assert layers[0] >= 1 and layers[-1] <= num_layers - 2
    gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    # As many kept before the first as behind the last, but for one.
    assert abs((layers[0] - 1) - (num_layers - 2 - layers[-1])) <= 1


def test_skip_count_is_rounded() -> None:
    assert [skip_count(0.45, n) for n in (28, 29, 30, 42)] == [13, 13, 14, 19]


@given(st.integers(2, 60), st.data())
def test_a_list_is_read_as_it_is_written(num_layers: int, data: st.DataObject) -> None:
    layers = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1))
    written = layer_list(sorted(layers))
    assert skipped_layers(written, num_layers, None) == tuple(sorted(layers))
    assert all(part.count("-") <= 1 for part in written.split(","))


def test_a_list_is_short() -> None:
    assert layer_list((3, 5, 8, 9, 10, 12)) == "3,5,8-10,12"


@pytest.mark.parametrize(
    ("spec", "num_layers", "message"),
    [
        ("", 8, "--via-sd-mask is '', and it must be even:RATIO, layers such as"),
        ("odd:0.5", 8, "--via-sd-mask is 'odd:0.5', and it must be even:RATIO"),
        ("mask.yaml", 8, "the path of a mask file (.json)."),
        ("even:", 8, "its ratio must be greater than 0 and less than 1"),
        ("even:half", 8, "its ratio must be greater than 0"),
        ("even:nan", 8, "its ratio must be greater than 0"),
        ("even:0", 8, "its ratio must be greater than 0"),
        ("even:1", 8, "its ratio must be greater than 0"),
        ("even:-0.2", 8, "its ratio must be greater than 0"),
        ("even:0.05", 8, "skips 0 of 8 layers, and from 1 to 6 .* from 0.125 to 0.75"),
        ("even:0.9", 8, "skips 7 of 8 layers, and from 1 to 6 .* from 0.125 to 0.75"),
        ("even:0.5", 2, "the first and the last layer, and the target has 2: name the layers"),
        ("8", 8, "names layer 8, and the target's 8 layers are 0 to 7"),
        ("3-99999999999", 8, "names layer 99999999999, and the target's 8"),
        ("-1", 8, "'-1' is neither a layer nor a range"),
        ("1" * 5000, 8, "is neither a layer nor a range"),
        ("3,,5", 8, "'' is neither a layer nor a range"),
        ("3,", 8, "'' is neither a layer nor a range"),
        ("5-3", 8, "'5-3' is neither a layer nor a range"),
        ("1-2-3", 8, "'1-2-3' is neither a layer nor a range"),
        ("3 5", 8, "'3 5' is neither a layer nor a range"),
        ("3,3", 8, "names layer 3 twice"),
        ("2-5,4", 8, "names layer 4 twice"),
        ("0-7", 8, "skips all 8 layers of the target: keep at least one"),
    ],
)
def test_refused(spec: str, num_layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as refusal:
        skipped_layers(spec, num_layers, None)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    assert f"--via-sd-mask is {spec!r}" in str(refusal.value)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_comes_back(tmp_path: Path) -> None:
    path, mask = tmp_path / "mask.json", mask_file()
    write_mask_file(path, mask)
    assert read_mask_file(path) == mask
    assert skipped_layers(str(path), 4, IDENTITY) == (1, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.json"]
    content = json.loads(path.read_text())
    assert content["format"] == "via-sd-mask" and content["version"] == 1


def test_a_file_of_before_weights_were_looked_at_is_read(tmp_path: Path) -> None:
    path, content = tmp_path / "mask.json", mask_file().model_dump(mode="json")
    del content["weights"]
    path.write_text(json.dumps(content))
    assert read_mask_file(path) == mask_file()


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    write_mask_file(path, mask_file())
    with pytest.raises(UserError, match=r"made for 'llama' with 4 layers, and the target has 5"):
        skipped_layers(str(path), 5, None)
    other = ModelIdentity.from_config(LlamaConfig(**SIZES | {"hidden_size": 128}))
    with pytest.raises(UserError, match="hidden_size is 64 there and 128 here.*search-mask") as no:
        skipped_layers(str(path), 4, other)
    assert str(no.value).startswith(f"--via-sd-mask is {str(path)!r}, which was made for 'llama'")
    assert skipped_layers(str(path), 4, None) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"format": "mask"}, "format: Input should be 'via-sd-mask'"),
        ({"skipped": []}, "0 of 4 layers are skipped"),
        ({"skipped": [0, 1, 2, 3]}, "4 of 4 layers are skipped"),
        ({"skipped": [1, 1]}, "skipped is not in ascending order"),
        ({"skipped": [2, 1]}, "skipped is not in ascending order"),
        ({"skipped": [1, 4]}, "skipped has layers outside 0 to 3"),
        ({"skipped": [-1, 1]}, "skipped has layers outside 0 to 3"),
        ({"skipped": "1,2"}, "skipped: Input should be"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"identity": None}, "identity: Input should be"),
    ],
)
def test_refused_contents(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(mask_file().model_dump(mode="json") | changes))
    with pytest.raises(UserError) as refusal:
        skipped_layers(str(path), 4, IDENTITY)
    assert str(refusal.value).startswith(f"--via-sd-mask is {str(path)!r}, which is no mask file")
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\x80", b"[" * 100_000])
def test_refused_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mask.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="which is no mask file of this version") as refusal:
        skipped_layers(str(path), 4, None)
    assert "\n" not in str(refusal.value)


def test_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .No such file or directory."):
        skipped_layers(str(tmp_path / "none.json"), 4, None)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot be read .Is a directory."):
        skipped_layers(str(tmp_path / "folder.json"), 4, None)
    with pytest.raises(UserError, match="could not be written"):
        write_mask_file(tmp_path / "none" / "mask.json", mask_file())


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_identity_survives_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = make_dense(tmp_path, kind)
    expected = ModelIdentity.from_config(model.config)
    assert ModelIdentity.from_config(AutoConfig.from_pretrained(tmp_path)) == expected
    written = json.loads((tmp_path / "config.json").read_text())
    assert ModelIdentity.from_config(written) == expected
    # What loaders change or files leave out.
    noise = {"dtype": "bfloat16", "transformers_version": "4", "_name_or_path": "x", "use_cache": 0}
    assert ModelIdentity.from_config(written | noise) == expected
    if kind == "llama":
        del written["head_dim"]
        assert ModelIdentity.from_config(written) == expected


def test_identity_in_mistrals_own_format() -> None:
    """vLLM reads `params.json` into a configuration that names no type."""
    config = MistralConfig(**SIZES).to_dict()
    expected = ModelIdentity.from_config(config)
    for name in ("", "transformer"):
        theirs = config | {"model_type": name, "architectures": ["MistralForCausalLM"]}
        assert ModelIdentity.from_config(theirs) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"intermediate_size": 97},
        {"num_hidden_layers": 5},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 2},
        {"head_dim": 16},
        {"vocab_size": 257},
    ],
)
def test_identity_tells_models_apart(change: dict[str, int]) -> None:
    other = ModelIdentity.from_config(LlamaConfig(**SIZES | change))
    name, value = next(iter(change.items()))
    assert f"{name} is {value} there" in str(IDENTITY.difference(other))


def test_identity_tells_families_apart(tmp_path: Path) -> None:
    other = ModelIdentity.from_config(make_dense(tmp_path, "qwen2").config)
    assert IDENTITY.difference(other) == "model_type is 'qwen2' there and 'llama' here"
    assert IDENTITY.difference(IDENTITY) is None


def test_identity_of_a_model_of_several_parts() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 32}
    whole = Gemma3Config(text_config=text)
    found = ModelIdentity.from_config(whole)
    assert found.model_type == "gemma3_text" and found.num_hidden_layers == 3
    assert found == ModelIdentity.from_config(whole.text_config)


def test_a_configuration_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"model_type 'gpt2'\) has num_hidden_layers = None"):
        ModelIdentity.from_config({"model_type": "gpt2", "n_layer": 12, "hidden_size": 8})


def test_reading_masks_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; import vllm_nvium.model_executor.via_sd.mask;"
        "assert not {'torch', 'vllm', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
