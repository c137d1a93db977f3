# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium convert`: dense models of every family, the authors' checkpoints in every legal form,
one sentence for everything else, and never half a folder.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import naive_models
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from tiny_models import (
    DENSE_KINDS,
    SIZES,
    SLIDING_KINDS,
    make_dense,
    make_nvium,
    save_tokenizer,
)
from vllm_nvium import cli, files
from vllm_nvium.checkpoints.convert import checkpoint, convert
from vllm_nvium.checkpoints.convert.dense import OWN, DenseOptions, evenly_spaced, hazard_margin
from vllm_nvium.checkpoints.convert.exits import write_exits
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

PROMPT = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def load(path: Path) -> NviumForCausalLM:
    model, info = NviumForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def command(*words: str | Path) -> int:
    return cli.main(["convert", *map(str, words)])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- dense models


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", DENSE_KINDS)
@torch.no_grad()
def test_hazard_zero_is_the_dense_model(tmp_path: Path, kind: str, tied: bool) -> None:
    if kind == "gemma2" and not tied:
        pytest.skip("vLLM's Gemma 2 has one weight for both, and others are refused")
    dense = make_dense(tmp_path / "dense", kind, tie_word_embeddings=tied)
    assert convert(tmp_path / "dense", tmp_path / "out") == []
    model = load(tmp_path / "out")
    assert model.config.exit_layers == [1, 2, 3]
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) is not tied
    torch.testing.assert_close(
        model(PROMPT).logits, dense(PROMPT).logits.log_softmax(-1), atol=1e-5, rtol=1e-5
    )
    assert (model(PROMPT).exit_log_weights[..., -1].exp() == 1.0).all()


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"hidden_size": 96}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
        ),
    ],
    ids=["llama biases", "qwen3 wide", "qwen2 unused window", "llama3 rope", "yarn rope"],
)
@torch.no_grad()
def test_variants_of_dense_models(tmp_path: Path, kind: str, overrides: dict[str, Any]) -> None:
    dense = make_dense(tmp_path / "dense", kind, **overrides)
    convert(tmp_path / "dense", tmp_path / "out")
    torch.testing.assert_close(
        load(tmp_path / "out")(PROMPT).logits,
        dense(PROMPT).logits.log_softmax(-1),
        atol=1e-5,
        rtol=1e-5,
    )


def test_hazards_are_constant_and_as_asked(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    hazards = (0.3, 0.0, 1.0)
    convert(tmp_path / "dense", tmp_path / "out", DenseOptions(hazards=hazards))
    margins = load(tmp_path / "out")(PROMPT).margins
    torch.testing.assert_close(margins.sigmoid(), torch.tensor(hazards).expand(2, 9, 3))
    assert (margins[..., 1].sigmoid() == 0).all() and (margins[..., 2].sigmoid() == 1).all()


def test_one_hazard_is_for_all_exits(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", DenseOptions(hazards=[0.25], exit_layers=[1, 3]))
    model = load(tmp_path / "out")
    assert model.config.exit_layers == [1, 3]
    torch.testing.assert_close(model(PROMPT).margins.sigmoid(), torch.full((2, 9, 2), 0.25))


def test_certain_hazards_survive_low_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.tensor(hazard_margin(0.0), dtype=dtype).float().sigmoid() == 0
        assert torch.tensor(hazard_margin(1.0), dtype=dtype).float().sigmoid() == 1


@pytest.mark.parametrize("exit_norm", ["final", "ones"])
def test_what_stands_at_the_exits(tmp_path: Path, exit_norm: str) -> None:
    make_dense(tmp_path / "dense")
    options = DenseOptions(exit_norm=exit_norm, adapter_size=16, router_size=40, seed=3)
    convert(tmp_path / "dense", tmp_path / "one", options)
    convert(tmp_path / "dense", tmp_path / "two", options)
    convert(tmp_path / "dense", tmp_path / "other", DenseOptions(seed=4))
    one = load(tmp_path / "one")
    assert one.config.exit_adapter_size == one.config.final_adapter_size == 16
    assert (one.config.router_intermediate_size, one.config.router_hidden_size) == (40, 64)
    state, other = one.state_dict(), load(tmp_path / "other").state_dict()
    for k in range(3):
        expected = state["model.norm.weight"] if exit_norm == "final" else torch.ones(64)
        assert torch.equal(state[f"exits.{k}.norm.weight"], expected)
        body = state[f"exits.{k}.router.blocks.0.fc1.weight"]
        assert body.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.1)
        assert not torch.equal(body[:32], other[f"exits.{k}.router.blocks.0.fc1.weight"])
    assert not torch.equal(state["exits.0.adapter.fc1.weight"], state["exits.1.adapter.fc1.weight"])
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes(), "the same seed gave another file"


@torch.no_grad()
def test_without_adapters(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    assert command(tmp_path / "dense", tmp_path / "out", "--no-adapters") == 0
    model = load(tmp_path / "out")
    assert model.final_adapter is None and model.exits[0].adapter is None
    torch.testing.assert_close(
        model(PROMPT).logits, dense(PROMPT).logits.log_softmax(-1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_dtypes(tmp_path: Path, source: torch.dtype, asked: str) -> None:
    make_dense(tmp_path / "dense", dtype=source)
    convert(tmp_path / "dense", tmp_path / "out", dtype=asked)
    expected = source if asked == "auto" else getattr(torch, asked)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert NviumConfig.from_pretrained(tmp_path / "out").dtype == expected


@torch.no_grad()
def test_sharded_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense(tmp_path / "dense", max_shard_size="100KB")
    assert (tmp_path / "dense/model.safetensors.index.json").exists()
    write = checkpoint.write_checkpoint
    small = partial(write, max_shard_size="150KB")
    monkeypatch.setattr(checkpoint, "write_checkpoint", small)
    convert(tmp_path / "dense", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        load(tmp_path / "out")(PROMPT).logits,
        dense(PROMPT).logits.log_softmax(-1),
        atol=1e-5,
        rtol=1e-5,
    )


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w9").input_ids == [5, 9]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 1


def test_files_of_other_tokenizers_come_along(tmp_path: Path) -> None:
    names = {"tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "spiece.model"}
    for folder in (source := tmp_path / "source", out := tmp_path / "out"):
        folder.mkdir()
    for name in (*names, "config.json", "model.safetensors"):
        (source / name).touch()
    checkpoint.copy_companions(source, out)
    assert {path.name for path in out.iterdir()} == names


def test_exits_are_evenly_spaced() -> None:
    assert evenly_spaced(3, 24) == [6, 12, 18]
    assert evenly_spaced(3, 30) == [7, 15, 22]
    assert evenly_spaced(1, 2) == [1]
    assert evenly_spaced(4, 5) == [1, 2, 3, 4]


def make_exits(
    dense: Path, folder: Path, change: dict[str, tuple[int, ...] | None] | None = None
) -> None:
    """Exits of a dense model, with a change of one of its matrices.

    Args:
        change: other shapes of tensors, None to leave them out.
    """
    convert(dense, folder.with_name("whole"), DenseOptions(num_exits=1))
    model = load(folder.with_name("whole"))
    changed = "model.layers.0.mlp.up_proj.weight"
    outputs, inputs = model.state_dict()[changed].shape
    tensors = {name: t for name, t in model.state_dict().items() if name.startswith(OWN)}
    tensors |= {f"lora.{changed}.A": torch.zeros(2, inputs)}
    tensors |= {f"lora.{changed}.B": torch.zeros(outputs, 2)}
    for name, shape in (change or {}).items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    folder.mkdir(exist_ok=True)
    write_exits(folder, model.config, tensors, 2.0, {})


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path)
    convert(path, tmp_path / "out", DenseOptions(num_exits=1), dtype="float32")
    model = load(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 and model.config.exit_layers == [1]
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    ).float()
    prompt = PROMPT % 8
    with torch.no_grad():
        expected = dense(prompt).logits.log_softmax(-1)
        torch.testing.assert_close(model(prompt).logits, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [5]
    convert(path, tmp_path / "auto", DenseOptions(num_exits=1))
    assert load(tmp_path / "auto").dtype == torch.bfloat16


def test_gguf_needs_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf accelerate"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")


def test_gguf_that_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="transformers cannot read"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")


def write_gguf(gguf: Any, path: Path) -> None:
    """A two-layer float32 Llama with a byte-pair vocabulary."""
    hidden, inner, heads, kv, vocab = 64, 96, 2, 1, 8
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "bc", "d"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())

    add("token_embd.weight", vocab, hidden)
    add("output.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
        add(f"blk.{layer}.attn_q.weight", 64, hidden)
        add(f"blk.{layer}.attn_k.weight", 32, hidden)
        add(f"blk.{layer}.attn_v.weight", 32, hidden)
        add(f"blk.{layer}.attn_output.weight", hidden, 64)
        add(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        add(f"blk.{layer}.ffn_up.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dense(tmp_path / "dense")
    asked = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tmp_path / "dense")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    convert("someone/model", tmp_path / "out")
    assert asked == ["someone/model"] and load(tmp_path / "out")


# ---- what is refused


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


Damage = Callable[[Path], Any]
DAMAGE: list[tuple[str, Damage, str]] = [
    (
        "family",
        lambda d: change_config(d, model_type="gpt2"),
        r"'gpt2', and N-vium models are made of llama, mistral",
    ),
    ("no family", lambda d: change_config(d, model_type=None), r"model_type of .* is None"),
    ("n-vium", lambda d: change_config(d, model_type="nvium"), r"is an N-vium checkpoint already"),
    ("act", lambda d: change_config(d, hidden_act="gelu"), r"hidden_act is 'gelu'"),
    (
        "quantised",
        lambda d: change_config(d, quantization_config={"quant_method": "awq"}),
        r"is quantised \(awq\)",
    ),
    ("json", lambda d: (d / "config.json").write_text("{"), r"is not valid JSON"),
    ("json list", lambda d: (d / "config.json").write_text("[]"), r"holds list, not an object"),
    ("no config", lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), r"has no weights"),
    (
        "broken weights",
        lambda d: (d / "model.safetensors").write_bytes(b"no"),
        r"cannot be read as safetensors",
    ),
    (
        "size of another type",
        lambda d: change_config(d, hidden_size="wide"),
        r"transformers cannot read .*config\.json",
    ),
    (
        "broken index",
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        r"is not a valid index",
    ),
    (
        "missing shard",
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.s"}}'),
        r"names b\.s, which is not in the folder",
    ),
    (
        "missing tensor",
        lambda d: change_tensors(d, lambda t: t.pop("model.norm.weight")),
        r"has no tensor model\.norm\.weight",
    ),
    (
        "no head",
        lambda d: change_tensors(d, lambda t: t.pop("lm_head.weight")),
        r"has no tensor lm_head\.weight",
    ),
    (
        "shape",
        lambda d: change_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"model\.norm\.weight in .* has shape \[3\], and \[64\] is expected",
    ),
    (
        "extra tensor",
        lambda d: change_tensors(
            d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
        ),
        r"has a tensor model\.layers\.0\.self_attn\.q_proj\.bias, for which",
    ),
    (
        "integers",
        lambda d: change_tensors(
            d,
            lambda t: t.update(
                {"model.embed_tokens.weight": torch.ones(256, 64, dtype=torch.int8)}
            ),
        ),
        r"is torch\.int8, and a plain float checkpoint",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE]
)
def test_damaged_sources(
    tmp_path: Path, damage: Damage, message: str, capsys: pytest.CaptureFixture
) -> None:
    make_dense(tmp_path / "dense")
    damage(tmp_path / "dense")
    capsys.readouterr()
    with pytest.raises(UserError, match=message) as refused:
        convert(tmp_path / "dense", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert command(tmp_path / "dense", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"vllm-nvium convert: error: {refused.value}"
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


MIXED = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("qwen2", MIXED, r"layer_types contains 'full_attention' and 'sliding_attention'"),
        ("qwen3", MIXED, r"layer_types contains 'full_attention' and 'sliding_attention'"),
        ("qwen3", {"attention_bias": True}, r"attention_bias is True, .* with False only"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', .* with 'silu' only"),
        ("gemma2", {"hidden_activation": "silu"}, r"with 'gelu_pytorch_tanh' only"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"softcapping is 50\.0, .* with None only"),
        ("gemma3", {"use_bidirectional_attention": True}, r"with False only"),
        ("qwen3_moe", MIXED, r"sliding_window is 64, .* with None only"),
        ("qwen3_moe", {"attention_bias": True}, r"attention_bias is True, .* with False only"),
        (
            "qwen3_moe",
            {"num_experts": 0, "num_experts_per_tok": 1},
            r"num_experts is 0, .* least 1",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 7}, r"at most num_experts = 6"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, r"decoder_sparse_step is 5 .* no layer has exp"),
    ],
)
def test_what_vllm_and_transformers_read_differently_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    make_dense(tmp_path / "dense", kind, **fields)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", SLIDING_KINDS)
@torch.no_grad()
def test_exits_of_a_gemma_start_from_its_final_norm(tmp_path: Path, kind: str) -> None:
    """A hazard of one after a layer that adds nothing is the dense model: same norm, same head."""
    dense = make_dense(tmp_path / "dense", kind)
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        getattr(dense.model.layers[3], name).weight.fill_(-1.0)
    dense.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", DenseOptions(exit_layers=[3], hazards=[1.0]))
    torch.testing.assert_close(
        load(tmp_path / "out")(PROMPT).logits,
        dense(PROMPT).logits.log_softmax(-1),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exit-layers", "2,1"], "strictly increasing"),
        (["--exit-layers", "2,4"], "exit_layers contains 4"),
        (["--num-exits", "4"], "--num-exits is 4, and a model of 4 layers takes 1 to 3"),
        (["--num-exits", "0"], "--num-exits is 0"),
        (["--num-exits", "1", "--exit-layers", "2"], "exclude each other"),
        (["--hazards", "0.1,0.2"], "--hazards has 2 values, and 3 exits need 1 or 3"),
        (["--exit-layers", "a"], "--exit-layers is 'a': input should be a valid integer"),
        (["--hazards", "x"], "--hazards is 'x': input should be a valid number"),
        (
            ["--router-size", "0"],
            "--router-size is '0': input should be greater than or",
        ),
        (["--hazards", "1.5"], "--hazards is '1.5': input should be less than or equal to 1"),
        (["--hazards", "nan"], "--hazards is 'nan': input should be"),
    ],
)
def test_wrong_flags(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    make_dense(tmp_path / "dense")
    assert command(tmp_path / "dense", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "does not exist"), ("no.gguf", "does not exist"), ("a/b/c", "does not exist")],
)
def test_sources_that_are_not_there(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(name, tmp_path / "out")


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"cannot be fetched from the hub \(no route\)"):
        convert("someone/model", tmp_path / "out")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(UserError, match="is a file, and a folder, a hub id or a .gguf file"):
        convert(tmp_path / "weights.bin", tmp_path / "out")


# ---- OUT


def test_a_full_folder_is_kept_without_force(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; pass --force to replace it"):
        convert(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "out/stale").write_text("")
    assert command(tmp_path / "dense", tmp_path / "out", "--force", "--num-exits", "1") == 0
    assert load(tmp_path / "out").config.exit_layers == [2]
    assert not (tmp_path / "out/stale").exists() and not leftovers(tmp_path)


def test_force_replaces_checkpoints_only(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/diary").write_text("")
    with pytest.raises(UserError, match="has no config.json, so --force does not replace it"):
        convert(tmp_path / "dense", tmp_path / "home", force=True)
    assert (tmp_path / "home/diary").exists()


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "dense", tmp_path / "empty")
    convert(tmp_path / "dense", tmp_path / "deep/er/out")
    assert load(tmp_path / "empty") and load(tmp_path / "deep/er/out")


@pytest.mark.parametrize("out", ["dense", "."])
def test_the_source_is_never_replaced(tmp_path: Path, out: str) -> None:
    make_dense(tmp_path / "dense")
    with pytest.raises(UserError, match=r"contains .*dense, which is read"):
        convert(tmp_path / "dense", tmp_path / out, force=True)
    assert (tmp_path / "dense/model.safetensors").exists()


@pytest.mark.parametrize("what", ["a GGUF file", "trained exits"])
def test_nothing_that_is_read_is_replaced(tmp_path: Path, what: str) -> None:
    """A GGUF file may lie beside a config.json, and trained exits always do."""
    make_dense(tmp_path / "dense")
    source, exits, kept = tmp_path / "dense", None, tmp_path / "out/exits.safetensors"
    (tmp_path / "out").mkdir()
    if what == "a GGUF file":
        gguf = pytest.importorskip("gguf")
        pytest.importorskip("accelerate")
        source = kept = tmp_path / "out/tiny.gguf"
        write_gguf(gguf, kept)
        (tmp_path / "out/config.json").write_text("{}")
    else:
        exits = tmp_path / "out"
        make_exits(tmp_path / "dense", exits)
    with pytest.raises(UserError, match="contains .*, which is read, so choose another OUT"):
        options = None if exits else DenseOptions(num_exits=1)
        convert(source, tmp_path / "out", options, force=True, exits=exits)
    assert kept.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits.0.norm.weight": None}, r"has no tensor exits\.0\.norm\.weight"),
        ({"exits.0.norm.weight": (3,)}, r"has exits\.0\.norm\.weight of shape \(3,\)"),
        ({"lora.model.layers.0.mlp.up_proj.weight.A": None}, r"has no tensor lora\..*\.A"),
        ({"lora.model.layers.0.mlp.up_proj.weight.B": None}, r"has no tensor lora\..*\.B"),
        ({"lora.model.layers.0.mlp.up_proj.weight.B": (8, 3)}, r"has lora\..*\.B of shape"),
        ({"lora.model.layers.0.mlp.up_proj.weight.A": ()}, r"has lora\..*\.A of shape \(\)"),
        ({"lora.model.layers.9.mlp.up_proj.weight.A": (2, 8)}, "has no such matrix"),
        ({"lora.model.norm.weight.A": (2, 8)}, "has no such matrix"),
    ],
)
def test_exits_that_do_not_fit_their_configuration(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    """Files of two runs, for instance, in one folder."""
    make_dense(tmp_path / "dense")
    make_exits(tmp_path / "dense", tmp_path / "exits", change)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "dense", tmp_path / "out", exits=tmp_path / "exits")
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file, and OUT must be a folder"):
        convert(tmp_path / "dense", tmp_path / "out", force=True)


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dense(tmp_path / "dense")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.00 GB free, and the checkpoint needs"):
        convert(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def fail(state: Any, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    for out in ("out", "new"):
        with pytest.raises(expected):
            convert(tmp_path / "dense", tmp_path / out, force=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists() and not leftovers(tmp_path)


def test_a_failed_swap_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out")
    replace = files.os.replace

    def fail(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match="could not be written"):
        convert(tmp_path / "dense", tmp_path / "out", force=True)
    monkeypatch.undo()
    assert load(tmp_path / "out") and not leftovers(tmp_path)


def test_others_may_read_the_result(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain/file").write_text("")
    usual = (tmp_path / "plain/file").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


# ---- the authors' layout


def experiment(**changes: Any) -> dict[str, Any]:
    """The YAML of a release: a deep copy of the usual one with some sections changed."""
    base: dict[str, Any] = {
        "early_layer_idx": [1, 2, 3],
        "router": {
            "router_type": "simple_mlp",
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_layers": 1,
            "router_temp": 1.0,
        },
        "early_adapter": {"enabled": True, "dim": 24},
        "final_adapter": {"enabled": True, "dim": 32},
        "tying": {
            "tie_final_to_embeddings": False,
            "tie_early_to_final": True,
            "tie_early_to_embeddings": False,
        },
    }
    base = json.loads(json.dumps(base))
    for name, value in changes.items():
        if isinstance(value, dict):
            base[name].update(value)
        else:
            base[name] = value
    return base


def llama_config() -> LlamaConfig:
    return LlamaConfig(**SIZES | {"architectures": ["NviumModel"], "tie_word_embeddings": False})


def release_tensors(fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors of a release, as many as its YAML says."""
    config, generator = llama_config(), torch.Generator().manual_seed(0)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_attention_heads * config.head_dim, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (query, hidden),
            f"{at}.self_attn.k_proj.weight": (key, hidden),
            f"{at}.self_attn.v_proj.weight": (key, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    tying, router = fields["tying"], fields["router"]
    if not tying["tie_final_to_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    adapters = []
    for k in range(len(fields["early_layer_idx"])):
        shapes[f"early_norms.{k}.weight"] = (hidden,)
        if not tying["tie_early_to_final"] and not tying["tie_early_to_embeddings"]:
            shapes[f"early_lm_heads.{k}.weight"] = (vocab, hidden)
        for j in range(router["num_layers"]):
            at = f"router_layers.{k}.layers.{j}"
            width = hidden if j == 0 else router["hidden_size"]
            shapes[f"{at}.fc1.weight"] = (router["intermediate_size"], width)
            shapes[f"{at}.fc1.bias"] = (router["intermediate_size"],)
            shapes[f"{at}.fc2.weight"] = (router["hidden_size"], router["intermediate_size"])
            shapes[f"{at}.fc2.bias"] = (router["hidden_size"],)
        shapes[f"router_final_norms.{k}.weight"] = (router["hidden_size"],)
        shapes[f"router_heads.{k}.weight"] = (2, router["hidden_size"])
        shapes[f"router_heads.{k}.bias"] = (2,)
        if fields["early_adapter"]["enabled"]:
            adapters.append((f"early_adapters.{k}", fields["early_adapter"]["dim"]))
    if fields["final_adapter"]["enabled"]:
        adapters.append(("final_adapter", fields["final_adapter"]["dim"]))
    for name, dim in adapters:
        shapes[f"{name}.0.weight"] = (dim, hidden)
        shapes[f"{name}.2.weight"] = (hidden, dim)
    tensors = {}
    for name, shape in shapes.items():
        noise = 0.2 * torch.randn(shape, generator=generator)
        tensors[name] = 1 + noise if "norm" in name else noise
    return tensors


def write_release(
    folder: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor], levels_up: int = 0
) -> None:
    folder.mkdir(parents=True)
    config = llama_config()
    config.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    place = [folder, *folder.parents][levels_up] / ".hydra"
    place.mkdir()
    (place / "config.yaml").write_text(yaml.safe_dump(fields))


RELEASES: dict[str, dict[str, Any]] = {
    "as released": {},
    "one exit": {"early_layer_idx": [2]},
    "deep exits": {"early_layer_idx": [2, 3]},
    "final tied to embeddings": {"tying": {"tie_final_to_embeddings": True}},
    "early tied to embeddings": {
        "tying": {"tie_early_to_final": False, "tie_early_to_embeddings": True}
    },
    "early and final tied to embeddings": {
        "tying": {
            "tie_final_to_embeddings": True,
            "tie_early_to_final": False,
            "tie_early_to_embeddings": True,
        }
    },
    "all three": {"tying": {"tie_final_to_embeddings": True, "tie_early_to_embeddings": True}},
    "early tied to both": {"tying": {"tie_early_to_embeddings": True}},
    "nothing tied": {"tying": {"tie_early_to_final": False}},
    "final tied, early own": {
        "tying": {"tie_final_to_embeddings": True, "tie_early_to_final": False}
    },
    "no early adapters": {"early_adapter": {"enabled": False}},
    "no final adapter": {"final_adapter": {"enabled": False}},
    "no adapters": {"early_adapter": {"enabled": False}, "final_adapter": {"enabled": False}},
    "two router blocks": {"router": {"num_layers": 2}},
    "deep router": {"router": {"router_type": "simple_deep_mlp", "num_layers": 3}},
    "router temperature": {"router": {"router_temp": 0.7}},
    "router temperature zero": {"router": {"router_temp": 0}},
}


@pytest.mark.parametrize("changes", RELEASES.values(), ids=RELEASES.keys())
@torch.no_grad()
def test_releases_keep_their_law(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields = experiment(**changes)
    tensors = release_tensors(fields)
    write_release(tmp_path / "release", fields, tensors)
    notes = convert(tmp_path / "release", tmp_path / "out")
    assert [note for note in notes if "router_temp" in note] == notes
    assert bool(notes) == (fields["router"]["router_temp"] != 1.0)
    model = load(tmp_path / "out")
    for row in PROMPT[:, :6]:
        expected = naive_models.release(tensors, llama_config(), fields, row.tolist())
        got = model(row.unsqueeze(0)).logits[0].double()
        torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("levels_up", [0, 1, 2])
def test_the_yaml_is_found(tmp_path: Path, levels_up: int) -> None:
    fields = experiment()
    folder = tmp_path / "run/checkpoints/last"
    write_release(folder, fields, release_tensors(fields), levels_up)
    convert(folder, tmp_path / "out")
    assert load(tmp_path / "out").config.exit_layers == [1, 2, 3]


def test_the_yaml_is_not_found_further_up(tmp_path: Path) -> None:
    fields = experiment()
    folder = tmp_path / "run/checkpoints/last/model"
    write_release(folder, fields, release_tensors(fields), 3)
    with pytest.raises(UserError, match=r"has no \.hydra/config\.yaml"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("architectures", [["NviumModel"], ["LlamaForCausalLM"], None])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_after_torch_compile(
    tmp_path: Path, prefix: str, architectures: list[str] | None
) -> None:
    fields = experiment()
    tensors = release_tensors(fields)
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    write_release(tmp_path / "release", fields, named)
    change_config(tmp_path / "release", architectures=architectures)
    convert(tmp_path / "release", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["exits.1.router.head.weight"], tensors["router_heads.1.weight"])
    assert len(written) == len(tensors)


@pytest.mark.parametrize("kept", ["lm_head.weight", "early_lm_heads.0.weight", "both"])
def test_whichever_copy_of_a_tied_matrix_was_written(tmp_path: Path, kept: str) -> None:
    fields = experiment()
    tensors = release_tensors(fields)
    matrix = tensors.pop("lm_head.weight")
    names = ["lm_head.weight", "early_lm_heads.0.weight"] if kept == "both" else [kept]
    write_release(tmp_path / "release", fields, tensors | dict.fromkeys(names, matrix))
    convert(tmp_path / "release", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["lm_head.weight"], matrix)
    assert "exits.0.lm_head.weight" not in written


def test_embeddings_stored_as_the_head(tmp_path: Path) -> None:
    fields = experiment(tying={"tie_final_to_embeddings": True})
    tensors = release_tensors(fields)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_release(tmp_path / "release", fields, tensors)
    convert(tmp_path / "release", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert "lm_head.weight" not in written


def test_fields_the_yaml_may_leave_out(tmp_path: Path) -> None:
    fields = experiment()
    tensors = release_tensors(fields)
    short = {"model": {"early_layer_idx": [3, 1, 2], "tying": fields["tying"]}, "seed": 1}
    write_release(tmp_path / "release", short, tensors)
    convert(tmp_path / "release", tmp_path / "out")
    config = load(tmp_path / "out").config
    assert config.exit_layers == [1, 2, 3], "the release sorts them"
    assert (config.exit_adapter_size, config.final_adapter_size) == (24, 32)
    assert (config.router_intermediate_size, config.router_hidden_size) == (40, 48)


def test_a_single_exit_as_a_number(tmp_path: Path) -> None:
    fields = experiment(early_layer_idx=[2])
    write_release(tmp_path / "release", fields | {"early_layer_idx": 2}, release_tensors(fields))
    convert(tmp_path / "release", tmp_path / "out")
    assert load(tmp_path / "out").config.exit_layers == [2]


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


BROKEN: list[tuple[str, dict[str, Any], Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("norm", {}, drop("early_norms.1.weight"), r"no tensor early_norms\.1\.weight, .* \[64\]"),
    (
        "norm shape",
        {},
        put("early_norms.1.weight", 63),
        r"early_norms\.1\.weight in .* has shape \[63\], and \[64\] is expected",
    ),
    ("router head", {}, put("router_heads.0.weight", 3, 48), r"\[3, 48\], and \[2, 48\]"),
    ("router body", {}, drop("router_layers.2.layers.0.fc2.bias"), r"router_layers\.2\.layers\.0"),
    (
        "early head",
        {"tying": {"tie_early_to_final": False}},
        drop("early_lm_heads.2.weight"),
        r"no tensor early_lm_heads\.2\.weight, expected of shape \[256, 64\]",
    ),
    ("lm_head", {}, drop("lm_head.weight"), r"no tensor lm_head\.weight"),
    ("adapter", {}, drop("early_adapters.0.0.weight"), r"early_adapter\.enabled in .* is true"),
    ("later adapter", {}, drop("early_adapters.1.2.weight"), r"early_adapters\.1\.2\.weight"),
    (
        "adapter not meant",
        {"final_adapter": {"enabled": False}},
        put("final_adapter.0.weight", 32, 64),
        r"final_adapter\.0\.weight, and final_adapter\.enabled in .* is false",
    ),
    ("adapter width", {}, put("final_adapter.0.weight", 30, 64), r"\[30, 64\], and \[32, 64\]"),
    (
        "blocks",
        {"router": {"num_layers": 2}},
        lambda tensors: (
            [tensors.pop(n) for n in list(tensors) if ".layers.1.fc" in n and "router" in n]
            and tensors.update({"router_layers.0.layers.2.fc1.weight": torch.ones(40, 48)})
        ),
        r"has 3 blocks in router_layers\.0, and router\.num_layers in .* is 2",
    ),
    ("stranger", {}, put("mystery.weight", 3), r"has a tensor mystery\.weight, for which"),
    ("fourth exit", {}, put("early_norms.3.weight", 64), r"has a tensor early_norms\.3\.weight"),
    (
        "tied but different",
        {},
        put("early_lm_heads.0.weight", 256, 64),
        r"early_lm_heads\.0\.weight in .* differs from lm_head\.weight",
    ),
]


@pytest.mark.parametrize(
    ("changes", "damage", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_broken_releases(
    tmp_path: Path, changes: dict[str, Any], damage: Callable, message: str
) -> None:
    fields = experiment(**changes)
    tensors = release_tensors(fields)
    damage(tensors)
    write_release(tmp_path / "release", fields, tensors)
    with pytest.raises(UserError, match=message) as refused:
        convert(tmp_path / "release", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("a: 1", "has no field early_layer_idx"),
        ("", "has no field early_layer_idx"),
        (
            "early_layer_idx: [a]",
            r"early_layer_idx\.0 in .* is 'a': input should be a valid integer",
        ),
        ("early_layer_idx: []", r"early_layer_idx in .* is \[\]"),
        ("early_layer_idx: [1, 9]", "exit_layers contains 9"),
        ("early_layer_idx: [1, 2, 3]\nrouter: 3", "router in .* is 3: input should be"),
        (
            "early_layer_idx: [1, 2, 3]\nrouter: {router_type: llama}",
            "router.router_type in .* is 'llama': input should be 'simple_mlp'",
        ),
        (
            "early_layer_idx: [1, 2, 3]\nrouter: {router_temp: -1}\n"
            "tying: {tie_final_to_embeddings: false, tie_early_to_final: true}",
            "router_temp in .* is -1",
        ),
        (
            "early_layer_idx: [1, 2, 3]\ntying: {tie_early_to_final: 3}",
            "tying.tie_early_to_final in .* is 3: input should be a valid boolean",
        ),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    fields = experiment()
    write_release(tmp_path / "release", fields, release_tensors(fields))
    (tmp_path / "release/.hydra/config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "release", tmp_path / "out")


def test_flags_for_dense_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fields = experiment(router={"router_temp": 2.0})
    write_release(tmp_path / "release", fields, release_tensors(fields))
    assert command(tmp_path / "release", tmp_path / "out", "--hazards", "0.1") == 2
    assert "whose exits are given" in capsys.readouterr().err
    assert command(tmp_path / "release", tmp_path / "out", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert "router_temp is 2.0" in printed and f"wrote {tmp_path / 'out'}" in printed
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_an_nvium_checkpoint_is_not_converted_again(tmp_path: Path) -> None:
    make_nvium(tmp_path / "nvium")
    with pytest.raises(UserError, match="is an N-vium checkpoint already"):
        convert(tmp_path / "nvium", tmp_path / "out")
