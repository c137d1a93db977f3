# SPDX-License-Identifier: Apache-2.0
"""Evaluation of N-vium models: perplexities against a plain computation, shares and bytes against
numbers worked out by hand, and the command with its files and refusals.
"""

import copy
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import make_dense, make_nvium, save_tokenizer
from vllm_nvium import cli
from vllm_nvium.checkpoints.convert import convert
from vllm_nvium.checkpoints.convert.dense import DenseOptions
from vllm_nvium.checkpoints.evaluate.formulas import (
    backbone_bytes,
    exit_bytes,
    expected_bytes,
    greedy_exits,
    greedy_shares,
    paired_log_ratio,
    perplexity,
    sampled_shares,
    top_tokens,
)
from vllm_nvium.checkpoints.evaluate.history import read_history
from vllm_nvium.checkpoints.evaluate.measure import (
    dense_top_tokens,
    evaluate_dense,
    evaluate_nvium,
)
from vllm_nvium.checkpoints.evaluate.plots import draw
from vllm_nvium.checkpoints.evaluate.results import (
    Comparison,
    DenseEvaluation,
    Evaluation,
    ExitUse,
    compare,
    to_json,
)
from vllm_nvium.checkpoints.inputs import load_model
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import open_start
from vllm_nvium.cli.eval import parse_texts
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

# One layer: q, k, v, o 4 * 16, three MLP matrices 3 * 32, two norms 2 * 4: 168 weights.
# Unembedding 40, every norm 4, exit adapter 2 * 12, final adapter 2 * 8.
# Router: fc1 20 + 5, fc2 30 + 6, norm 6, head 12 + 2: 81.
TINY_SHAPE = NviumConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    exit_layers=[1],
    exit_adapter_size=3,
    final_adapter_size=2,
    router_intermediate_size=5,
    router_hidden_size=6,
)


def blocks_of(number: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (number, length), generator=generator)


def text_file(path: Path, words: int, seed: int = 0) -> Path:
    tokens = blocks_of(1, words, seed)[0].tolist()
    path.write_text(" ".join(f"w{token}" for token in tokens))
    return path


# ---- formulas


def test_greedy_takes_the_first_exit_above_one_half() -> None:
    margins = torch.tensor([[-1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.1, 5.0, -1.0], [-1.0, -1.0, 9.0]])
    assert greedy_exits(margins, 0.0).tolist() == [1, 3, 0, 2]
    assert greedy_shares(margins, 0.0).tolist() == [0.25, 0.25, 0.25, 0.25]


def test_sampled_shares_are_means_of_the_weights() -> None:
    log_weights = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]).log()
    torch.testing.assert_close(
        sampled_shares(log_weights), torch.tensor([0.3, 0.35, 0.35], dtype=torch.float64)
    )


def test_bytes_by_hand() -> None:
    assert exit_bytes(TINY_SHAPE, [False], [False, False], itemsize=1) == [
        168 + (4 + 81) + 24 + 40,
        2 * 168 + (4 + 81) + 4 + 16 + 40,
    ]
    # What is skipped when a token is computed counts nothing.
    assert exit_bytes(TINY_SHAPE, [True], [True, True], itemsize=4) == [
        4 * (168 + 4 + 40),
        4 * (2 * 168 + 4 + 4 + 40),
    ]
    assert backbone_bytes(TINY_SHAPE, itemsize=2) == 2 * (2 * 168 + 4 + 40)
    assert expected_bytes(torch.tensor([0.25, 0.75]), [100, 200]) == 175.0


def test_a_token_reads_the_experts_it_is_sent_to(tmp_path: Path) -> None:
    """Two of six in three layers of four (three matrices each of 48 by 64), and all of the router's
    six rows."""
    dense = make_dense(tmp_path, "qwen3_moe")
    config = NviumConfig(text_config=dense.config, exit_layers=[2], exit_adapter_size=0)
    unread = 4 * 3 * 48 * 64  # of a layer
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    read = parameters - 256 * 64 - 3 * unread
    assert backbone_bytes(config, itemsize=4) == 4 * read
    assert evaluate_dense(dense, blocks_of(1, 8)).bytes_per_token == 4 * read
    layers = [sum(p.numel() for p in layer.parameters()) for layer in dense.model.layers[:2]]
    leaving = sum(layers) - unread + 64 + 256 * 64
    assert exit_bytes(config, [True], [True, True], itemsize=1)[0] == leaving


def test_tied_embeddings_are_read_once_per_token() -> None:
    tied = copy.deepcopy(TINY_SHAPE)
    tied.tie_word_embeddings = True
    arguments: Any = ([False], [False, False])
    assert exit_bytes(tied, *arguments) == exit_bytes(TINY_SHAPE, *arguments)
    assert backbone_bytes(tied) == backbone_bytes(TINY_SHAPE)


def test_paired_log_ratio_by_hand() -> None:
    ratio, error = paired_log_ratio([1.0, 2.0, 3.0], [0.9, 2.0, 2.6])
    # Differences .1, 0, .4: mean 1/6, squared deviations 1/225 + 1/36 + 49/900.
    assert ratio == pytest.approx(0.5 / 3)
    variance = ((0.1 - 0.5 / 3) ** 2 + (0.5 / 3) ** 2 + (0.4 - 0.5 / 3) ** 2) / 2
    assert error == pytest.approx(math.sqrt(variance / 3))
    assert paired_log_ratio([1.5], [1.0]) == (0.5, None)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_top_tokens_do_not_depend_on_the_chunk(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator)
    unembedding = torch.randn(11, 8, generator=generator)
    assert torch.equal(top_tokens(hidden, unembedding, chunk), (hidden @ unembedding.T).argmax(-1))


# ---- models


@torch.no_grad()
def plain_losses(model: NviumForCausalLM, blocks: torch.Tensor) -> tuple[float, list[float]]:
    """Mixture and heads in float64, from the definition: products of hazards, whole softmaxes."""
    model = model.double()
    output = model(blocks, output_head_logits=True, use_cache=False)
    hazards = output.margins.sigmoid()
    left = torch.ones_like(hazards[..., 0])
    weights = []
    for k in range(hazards.shape[-1]):
        weights.append(left * hazards[..., k])
        left = left * (1 - hazards[..., k])
    pi = torch.stack([*weights, left], dim=-1)[:, :-1]  # [B, T-1, N]
    q = output.head_logits.softmax(-1)[:, :-1]  # [B, T-1, N, V]
    index = blocks[:, 1:, None, None].expand(-1, -1, q.shape[2], 1)
    of_targets = q.gather(-1, index).squeeze(-1)  # [B, T-1, N]
    heads = -of_targets.log().mean(dim=(0, 1))
    return float(-(pi * of_targets).sum(-1).log().mean()), heads.tolist()


@pytest.mark.parametrize("exit_head", ["final", "embeddings", "own"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexities_equal_a_plain_computation(
    tmp_path: Path, exit_head: str, batch_size: int
) -> None:
    model = make_nvium(tmp_path, exit_head=exit_head)
    blocks = blocks_of(5, 33)
    found = evaluate_nvium(model, blocks, batch_size)
    loss, heads = plain_losses(model, blocks)
    assert found.tokens == 5 * 32 and len(found.block_losses) == 5
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.head_perplexities == pytest.approx([math.exp(head) for head in heads], rel=1e-5)
    assert sum(found.block_losses) / 5 == pytest.approx(found.loss, rel=1e-12)
    # These heads are not alike, so a mix-up of heads would show.
    assert len({round(value, 3) for value in found.head_perplexities}) == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hazards_of_zero_have_the_parents_perplexity(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    make_dense(tmp_path / "dense", kind, dtype=dtype)
    convert(tmp_path / "dense", tmp_path / "nvium")
    # Loaded and not as made: a model that is cast rounds its rotary frequencies too.
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    model = NviumForCausalLM.from_pretrained(tmp_path / "nvium", dtype=dtype)
    blocks = blocks_of(4, 40)
    parent = evaluate_dense(dense, blocks, 2)
    found = evaluate_nvium(model, blocks, 2, parent_top=dense_top_tokens(dense, blocks, 2))
    assert found.loss == found.head_losses[-1]
    assert found.block_losses == parent.block_losses
    assert found.greedy.shares == (0.0, 0.0, 0.0, 1.0) == found.sampled.shares
    assert found.agreement is not None and found.agreement[-1] == found.greedy_agreement == 1.0
    assert all(share < 1.0 for share in found.agreement[:-1])
    comparison = compare(found, parent)
    assert comparison.perplexity_ratio == 1.0 and comparison.log_ratio_standard_error == 0.0
    # Nothing is read but the parent's weights and three norms of exits.
    dense_bytes = backbone_bytes(model.config, dtype.itemsize)
    assert parent.bytes_per_token == dense_bytes
    assert found.sampled.bytes_per_token == dense_bytes + 3 * 64 * dtype.itemsize
    assert comparison.sampled_expected_speedup == found.sampled.expected_speedup


@torch.no_grad()
def test_dense_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    dense, blocks = make_dense(tmp_path), blocks_of(4, 40)
    logits = dense(blocks).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    found = evaluate_dense(dense, blocks, 3)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert torch.equal(dense_top_tokens(dense, blocks, 3), logits.argmax(-1))


@torch.no_grad()
def test_attention_is_capped(tmp_path: Path) -> None:
    """Of a parent, and of a twin from scratch: transformers' own choice leaves the cap out."""
    capped = {"query_pre_attn_scalar": 1, "attn_logit_softcapping": 0.1}
    dense, blocks = make_dense(tmp_path, "gemma2", **capped), blocks_of(2, 20)
    model = load_model(str(tmp_path), "--dense", "float32")
    torch.testing.assert_close(model(blocks.to(model.device)).logits.cpu(), dense(blocks).logits)
    options = TrainOptions(model=str(tmp_path), method="scratch", tokenizer=str(tmp_path))
    twin = open_start(options, tmp_path / "run").model
    twin.load_state_dict(dense.state_dict())
    torch.testing.assert_close(twin.eval()(blocks).logits, dense(blocks).logits)


def test_constant_hazards_by_hand(tmp_path: Path) -> None:
    model = make_nvium(tmp_path, exit_layers=(1, 3), hazards=(0.5, 0.25))
    found = evaluate_nvium(model, blocks_of(2, 20))
    assert found.sampled.shares == pytest.approx((0.5, 0.125, 0.375), abs=1e-6)
    assert found.sampled.mean_depth == pytest.approx(0.5 * 0.25 + 0.125 * 0.75 + 0.375, abs=1e-6)
    assert found.greedy.shares == (0.0, 0.0, 1.0)  # one half is not more than one half
    assert found.greedy.mean_depth == 1.0
    weights = exit_bytes(model.config, [True, True], [False, False, False], itemsize=4)
    assert list(found.exit_bytes) == weights
    expected = 0.5 * weights[0] + 0.125 * weights[1] + 0.375 * weights[2]
    assert found.sampled.bytes_per_token == pytest.approx(expected, rel=1e-6)
    dense = backbone_bytes(model.config, itemsize=4)
    assert found.sampled.expected_speedup == pytest.approx(dense / expected, rel=1e-6)
    assert found.greedy.expected_speedup == pytest.approx(dense / weights[2])


def test_greedy_depth_by_hand(tmp_path: Path) -> None:
    model = make_nvium(tmp_path, exit_layers=(1, 3), hazards=(0.4, 0.6))
    found = evaluate_nvium(model, blocks_of(2, 20))
    assert found.greedy.shares == (0.0, 1.0, 0.0) and found.greedy.mean_depth == 0.75
    assert found.greedy_loss == found.head_losses[1]


def test_shares_of_random_routers_sum_to_one(tmp_path: Path) -> None:
    found = evaluate_nvium(make_nvium(tmp_path), blocks_of(4, 50))
    for use in (found.sampled, found.greedy):
        assert sum(use.shares) == pytest.approx(1.0, abs=1e-6) and min(use.shares) > 0.0
        assert 0.25 < use.mean_depth < 1.0


@torch.no_grad()
def test_agreement_is_counted_head_by_head(tmp_path: Path) -> None:
    model, blocks = make_nvium(tmp_path, router_scale=6.0), blocks_of(3, 30)
    output = model(blocks, output_head_logits=True, use_cache=False)
    top = output.head_logits[:, :-1].argmax(-1)  # [B, T-1, N]
    exits = greedy_exits(output.margins[:, :-1], 0.0)
    parent_top = top[..., 1]
    found = evaluate_nvium(model, blocks, 2, parent_top=parent_top)
    log_q = output.head_logits[:, :-1].log_softmax(-1)
    log_q = log_q.gather(2, exits[..., None, None].expand(-1, -1, 1, log_q.shape[-1]))[:, :, 0]
    picked_loss = -log_q.gather(-1, blocks[:, 1:, None]).double().mean()
    assert found.greedy_loss == pytest.approx(float(picked_loss), rel=1e-6)
    expected = (top == parent_top[..., None]).double().mean((0, 1))
    assert found.agreement == pytest.approx(expected.tolist()) and found.agreement[1] == 1.0
    picked = top.gather(-1, exits[..., None]).squeeze(-1)
    assert found.greedy_agreement == pytest.approx(float((picked == parent_top).double().mean()))


def test_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole block"):
        evaluate_nvium(make_nvium(tmp_path), blocks_of(0, 8))


# ---- results as JSON


def an_evaluation(**fields: Any) -> Evaluation:
    return Evaluation(
        **(
            {
                "exit_layers": (8, 15, 23),
                "num_layers": 30,
                "blocks": 1,
                "tokens": 1023,
                "loss": 2.5,
                "perplexity": math.exp(2.5),
                "head_losses": (4.0, 3.5, 3.0, 2.5),
                "head_perplexities": tuple(map(math.exp, (4.0, 3.5, 3.0, 2.5))),
                "greedy_loss": 2.6,
                "greedy_perplexity": math.exp(2.6),
                "block_losses": (2.5,),
                "sampled": ExitUse((0.1, 0.2, 0.3, 0.4), 0.756, 1e8, 1.3),
                "greedy": ExitUse((0.0, 0.25, 0.25, 0.5), 0.82, 1.1e8, 1.2),
                "exit_bytes": (1, 2, 3, 4),
            }
            | fields
        )
    )


def test_json_round_trip() -> None:
    for result in (
        an_evaluation(agreement=(0.1, 0.2, 0.3, 1.0), greedy_agreement=0.7),
        DenseEvaluation(1, 1023, 2.4, math.exp(2.4), (2.4,), 10),
        Comparison(0.1, None, 1.1, 1.3, 1.2),
    ):
        plain = to_json(result)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_json_has_no_infinities() -> None:
    assert perplexity(1000.0) == math.inf
    plain = to_json(an_evaluation(loss=1000.0, perplexity=math.inf, block_losses=(math.inf,)))
    assert plain["perplexity"] is None and plain["loss"] == 1000.0
    assert plain["block_losses"] == [None]


# ---- history and picture


def history_line(step: int, **fields: Any) -> str:
    line = {"step": step, "val_loss": 3.0, "parent_loss": 2.9, "mean_depth": 0.8, "beta": 0.1}
    return json.dumps(line | fields) + "\n"


def test_history_is_read_where_nothing_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(history_line(10) + history_line(20, mean_depth=None) + '{"step": 30}\n')
    found = read_history(path, "--history", "step", "val_loss", "mean_depth")
    assert [line["step"] for line in found] == [10]
    assert len(read_history(path, "--controller", "step", "val_loss")) == 2


def test_a_history_is_read_by_step_and_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    """Runs of earlier versions that were resumed have some steps twice."""
    path = tmp_path / "history.jsonl"
    steps = [(10, 3.0), (30, 2.5), (20, 2.8), (30, 2.6)]
    path.write_text("".join(history_line(step, val_loss=loss) for step, loss in steps))
    found = read_history(path, "--history", "step", "val_loss")
    assert [(line["step"], line["val_loss"]) for line in found] == [(10, 3.0), (20, 2.8), (30, 2.6)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as the history.jsonl of a training run .*No such file"),
        ("", "no line of it holds step and mean_depth"),
        (history_line(1, mean_depth=None), "no line of it holds step and mean_depth"),
        ("[1]\n" + history_line(1), "cannot be read as the history.jsonl"),
        (history_line(1)[:25], "cannot be read as the history.jsonl"),
    ],
)
def test_history_refusals(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "history.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"--history names .*{message}"):
        read_history(tmp_path / "history.jsonl", "--history", "step", "mean_depth")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) > 10_000
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("texts", [1, 2, 5])
@pytest.mark.parametrize("with_history", [False, True], ids=["shares", "frontier"])
def test_picture(tmp_path: Path, texts: int, with_history: bool) -> None:
    history = [
        json.loads(history_line(10 * i, val_loss=3 - 0.1 * i, mean_depth=1 - 0.05 * i))
        for i in range(5)
    ]
    names = [f"text {i} " + "with a long name " * i for i in range(texts)]
    draw(
        tmp_path / "out",  # a name without .png, as files have that are not in place yet
        {name: an_evaluation() for name in names},
        history if with_history else (),
    )
    width, height = png_size(tmp_path / "out")
    panels = texts + with_history
    assert width == pytest.approx(150 * 4.6 * min(panels, 3), rel=0.01)
    assert height == pytest.approx(150 * (4.2 * math.ceil(panels / 3) + 0.4), rel=0.01)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="could not be written .No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# ---- the command


def test_texts_with_and_without_names(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.write_text("w3")
    assert parse_texts(["wiki=a.txt", "code/x.py", "wiki=b.txt", str(odd), "d/*.md"]) == {
        "wiki": ["a.txt", "b.txt"],
        "x": ["code/x.py"],
        "a=b": [str(odd)],
        "d/*.md": ["d/*.md"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["=a.txt"], "NAME=SOURCE or SOURCE"),
        (["wiki="], "NAME=SOURCE or SOURCE"),
        (["a/x.txt", "b/x.txt"], "two texts that would be called 'x'"),
        (["a/x.txt", "x=b.txt"], "two texts that would be called 'x'"),
        (["x=b.txt", "a/x.txt"], "two texts that would be called 'x'"),
    ],
)
def test_refused_texts(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_texts(words)


@pytest.fixture(scope="module")
def retrofit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense`, a Llama, and `nvium`, made of it, whose exits are really used."""
    folder = tmp_path_factory.mktemp("retrofit")
    make_dense(folder / "dense")
    convert(folder / "dense", folder / "nvium", DenseOptions(hazards=[0.2, 0.6, 0.1]))
    text_file(folder / "wiki.txt", 700)
    text_file(folder / "code.txt", 300, seed=1)
    (folder / "history.jsonl").write_text(history_line(0, mean_depth=1.0) + history_line(10))
    return folder


def test_command(retrofit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", retrofit / "nvium", "--text", retrofit / "wiki.txt"]
    words += [f"my code={retrofit / 'code.txt'}", "--dense", retrofit / "dense", "--agreement"]
    words += ["--block-size", 64, "--batch-size", 2, "--json", tmp_path / "out.json"]
    words += ["--plot", tmp_path / "out.png", "--history", retrofit]
    assert cli.main([str(word) for word in words]) == 0
    png_size(tmp_path / "out.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["model"] == str(retrofit / "nvium") and report["dtype"] == "float32"
    assert report["dense"] == str(retrofit / "dense") and report["block_size"] == 64
    assert set(report["versions"]) == {"vllm_nvium", "torch", "transformers"}
    assert list(report["texts"]) == ["wiki", "my code"]
    wiki = report["texts"]["wiki"]
    assert wiki["sources"] == [str(retrofit / "wiki.txt")]
    assert wiki["nvium"]["blocks"] == 10 and wiki["nvium"]["tokens"] == 10 * 63
    assert wiki["nvium"]["sampled"]["shares"] == pytest.approx([0.2, 0.48, 0.032, 0.288], abs=1e-6)
    assert wiki["nvium"]["greedy"]["shares"] == [0.0, 1.0, 0.0, 0.0]
    assert wiki["nvium"]["agreement"][-1] == 1.0
    assert wiki["nvium"]["head_losses"][-1] == pytest.approx(wiki["dense"]["loss"], rel=1e-6)
    differences = torch.tensor(wiki["nvium"]["block_losses"], dtype=torch.float64)
    differences -= torch.tensor(wiki["dense"]["block_losses"], dtype=torch.float64)
    assert wiki["comparison"]["log_ratio"] == pytest.approx(float(differences.mean()))
    assert wiki["comparison"]["log_ratio_standard_error"] == pytest.approx(
        float(differences.std()) / math.sqrt(10)
    )

    out = capsys.readouterr().out
    for part in ("exit 1, 1 layer ", "final, 4 layers", "mixture", "dense parent", "my code"):
        assert part in out
    assert f"{wiki['nvium']['perplexity']:.3f}" in out
    assert f"{wiki['comparison']['sampled_expected_speedup']:.3f}x" in out
    assert "48.0%" in out and "standard error" in out


def test_command_without_a_parent(
    retrofit: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["eval", retrofit / "nvium", "--text", f"both={retrofit / 'wiki.txt'}"]
    words += [f"both={retrofit / 'code.txt'}", "--block-size", 100, "--max-tokens", 500]
    words += ["--dtype", "bfloat16", "--json", tmp_path / "out.json"]
    assert cli.main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    both = report["texts"]["both"]
    assert both["dense"] is None and both["comparison"] is None and report["dense"] is None
    assert both["nvium"]["blocks"] == 5 and len(both["sources"]) == 2
    out = capsys.readouterr().out
    assert "parent" not in out and "expected speed-up, drawn" in out


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, retrofit: Path) -> Path:
    """Models that do not go with `retrofit`."""
    folder = tmp_path_factory.mktemp("others")
    make_dense(folder / "large", vocab_size=300)
    shutil.copytree(retrofit / "dense", folder / "words")
    tokenizer = json.loads((folder / "words/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word: 258 - number if number > 2 else number for word, number in vocabulary.items()
    }
    (folder / "words/tokenizer.json").write_text(json.dumps(tokenizer))
    make_nvium(folder / "widened")
    config = json.loads((folder / "widened/config.json").read_text())
    (folder / "widened/config.json").write_text(json.dumps(config | {"exit_adapter_size": 32}))
    make_nvium(folder / "impossible")
    (folder / "impossible/config.json").write_text(json.dumps(config | {"exit_layers": [9]}))
    (folder / "bare").mkdir()
    (folder / "bare/config.json").write_text(json.dumps(config))
    make_nvium(folder / "small tokenizer")
    save_tokenizer(folder / "small tokenizer", 20)
    (folder / "short.txt").write_text("w3 w4 w5")
    return folder


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no folder": (["{o}/none", "--text", "{r}/wiki.txt"], "with a config.json"),
    "dense model": (["{r}/dense", "--text", "{r}/wiki.txt"], "model_type is 'llama'"),
    "no weights": (["{o}/bare", "--text", "{r}/wiki.txt"], "no model.safetensors"),
    "other weights": (["{o}/widened", "--text", "{r}/wiki.txt"], "has shape"),
    "impossible exits": (["{o}/impossible", "--text", "{r}/wiki.txt"], "exit_layers contains 9"),
    "wrong tokenizer": (["{o}/small tokenizer", "--text", "{r}/wiki.txt"], "tokenizer"),
    "parent is N-vium": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--dense", "{r}/nvium"],
        "model_type is 'nvium'",
    ),
    "no parent": (["{r}/nvium", "--text", "{r}/wiki.txt", "--dense", "{o}/none"], "--dense is"),
    "larger vocabulary": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--dense", "{o}/large"],
        "vocabulary of 300, and MODEL has 256",
    ),
    "other tokenizer": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--dense", "{o}/words", "--block-size", "300"],
        "other tokens than MODEL's",
    ),
    "short text": (["{r}/nvium", "--text", "{o}/short.txt"], "block"),
    "no text": (["{r}/nvium", "--text", "{o}/none.txt"], "none.txt"),
    "long blocks": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--block-size", "513"],
        "max_position_embeddings = 512",
    ),
    "short blocks": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--block-size", "1"],
        "--block-size is '1': input should be greater than or equal to 2",
    ),
    "no batch": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--batch-size", "0"],
        "--batch-size is '0': input should be greater than or equal to 1",
    ),
    "few tokens": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--max-tokens", "9"],
        "less than one block of --block-size 256",
    ),
    "unknown dtype": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--dtype", "float8"],
        "--dtype is 'float8': input should be 'float32' or 'bfloat16'",
    ),
    "agreement with nothing": (["{r}/nvium", "--text", "{r}/wiki.txt", "--agreement"], "--dense"),
    "history of nothing": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--history", "{r}"],
        "--plot must be given",
    ),
    "no history": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--plot", "{o}/x.png", "--history", "{o}"],
        "cannot be read as the history.jsonl",
    ),
    "no output folder": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--json", "{o}/none/x.json"],
        "does not exist",
    ),
    "output is a folder": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--plot", "{o}/bare"],
        "which is a folder",
    ),
    "one file for two": (
        ["{r}/nvium", "--text", "{r}/wiki.txt", "--plot", "{o}/x", "--json", "{o}/bare/../x"],
        "give two files",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(
    retrofit: Path,
    others: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_work(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded before the refusal")

    monkeypatch.setattr("vllm_nvium.checkpoints.evaluate.checkpoint.load_model", no_work)
    words, message = REFUSALS[case]
    words = [word.format(r=retrofit, o=others) for word in words]
    if "--block-size" not in words:
        words += ["--block-size", "256"]
    assert cli.main(["eval", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vllm-nvium eval: error: ") and message in lines[-1], lines
    assert not any("Traceback" in line for line in lines)
