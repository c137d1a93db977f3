# SPDX-License-Identifier: Apache-2.0
"""What an N-vium model is worth on a text: perplexity of the mixture and of every head, which exits
its tokens leave at, and the speed-up to expect from that. Each formula is a small function of plain
tensors.

Notation: N heads = N-1 early exits + the final head, `l_k` layers run at exit k of L in all, `p_k`
its hazard, `pi_k` its weight, V vocabulary, H hidden size. Losses are in nats per token. A block of
T tokens predicts T - 1 of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_nvium.checkpoints.train.loss import (
    CHUNK,
    head_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
    unembedding_of,
)
from vllm_nvium.console import Progress
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.ops.mixture import expected_depth

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
    from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM


# ---- formulas


def greedy_exits(margins: torch.Tensor, greedy_margin: float) -> torch.Tensor:
    """The head that speaks for each token at temperature 0: the first exit that is sure enough.

        exit(t) = min { k : e_k - c_k > greedy_margin }, else N

    Args:
        margins: `[..., N-1]`, `e_k - c_k`.
        greedy_margin: of the model's configuration; 0 is `p_k > 1/2`.

    Returns:
        `[...]` int64 in 0 .. N-1, N-1 for the final head.
    """
    leaves = F.pad(
        margins > greedy_margin, (0, 1), value=True
    )  # the final head takes whoever is left
    return leaves.int().argmax(dim=-1)  # of equal values argmax returns the first


def greedy_shares(margins: torch.Tensor, greedy_margin: float) -> torch.Tensor:
    """Share of the tokens that the greedy rule sends to each head.

        share_k = mean_t 1[greedy exit of t is k]

    Args:
        margins: `[..., T, N-1]`.
        greedy_margin: see `greedy_exits`.

    Returns:
        `[..., N]` float64, summing to 1.
    """
    exits = greedy_exits(margins, greedy_margin)
    return F.one_hot(exits, margins.shape[-1] + 1).double().mean(dim=-2)


def sampled_shares(log_weights: torch.Tensor) -> torch.Tensor:
    """Expected share of the tokens that leave at each head when exits are drawn (temperature 1).

        share_k = mean_t pi_k(t)

    Args:
        log_weights: `[..., T, N]`, `log pi`.

    Returns:
        `[..., N]` float64, summing to 1.
    """
    return log_weights.double().exp().mean(dim=-2)


def exit_bytes(
    config: "NviumConfig",
    constant_routers: Sequence[bool],
    identity_adapters: Sequence[bool],
    itemsize: int = 2,
) -> list[int]:
    """Bytes of weights read for one token that leaves at each head, at batch 1.

        bytes_k = sum_{i <= l_k} |layer_i| + sum_{j <= k} (|norm_j| + |router_j|) + |adapter_k|
                  + |W_out|                                                                  (k < N)
        bytes_N = sum_i |layer_i| + sum_{j < N} (|norm_j| + |router_j|) + |norm| + |adapter_N|
                  + |W_out|

    Catching up with positions that left early reads nothing more: they ride along in passes that
    read those weights anyway.

    Args:
        constant_routers: `[N-1]`, exits whose hazard is the same for every token; such a router is
            not evaluated and counts nothing.
        identity_adapters: `[N]`, the final head's last; an identity is skipped and counts nothing.
        itemsize: bytes per weight.

    Returns:
        N numbers.
    """
    sizes = _weight_sizes(config)

    def adapter(name: str, is_identity: bool) -> int:
        return 0 if is_identity else _total(sizes, f"{name}.")

    unembedding = config.vocab_size * config.hidden_size
    layers = [_total(sizes, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
    read, result = 0, []
    for k, layer in enumerate(config.exit_layers):
        read += _total(sizes, f"exits.{k}.norm.")
        read += 0 if constant_routers[k] else _total(sizes, f"exits.{k}.router.")
        leaving = adapter(f"exits.{k}.adapter", identity_adapters[k])
        result.append(sum(layers[:layer]) + read + leaving + unembedding)
    leaving = adapter("final_adapter", identity_adapters[-1])
    result.append(sum(layers) + read + sizes["model.norm.weight"] + leaving + unembedding)
    return [itemsize * size for size in result]


def backbone_bytes(config: "NviumConfig", itemsize: int = 2) -> int:
    """Bytes of weights that a dense model of this backbone reads per token.

    sum_i |layer_i| + |norm| + |W_out|
    """
    sizes = _weight_sizes(config)
    layers = _total(sizes, "model.layers.") + sizes["model.norm.weight"]
    return itemsize * (layers + config.vocab_size * config.hidden_size)


def expected_bytes(shares: torch.Tensor, bytes_per_exit: Sequence[int]) -> float:
    """Mean bytes of weights read per token: `sum_k share_k bytes_k`.

    Args:
        shares: `[N]`.
        bytes_per_exit: N numbers, of `exit_bytes`.
    """
    return float((shares.double() * shares.new_tensor(bytes_per_exit, dtype=torch.float64)).sum())


def paired_log_ratio(
    losses: Sequence[float], reference: Sequence[float]
) -> tuple[float, float | None]:
    """Log of the ratio of two perplexities on the same blocks, and its standard error.

        d_b = loss_b - reference_b      log ratio = mean_b d_b      error = std_b(d_b) / sqrt(B)

    The error is that of the difference, block by block: what makes a block hard for both models
    drops out. `std` divides by B - 1.

    Args:
        losses, reference: mean loss of each of the B blocks, nats per token.

    Returns:
        Log ratio and error; the error is `None` with a single block.
    """
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(
        reference, dtype=torch.float64
    )
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, None
    return mean, float(differences.std()) / math.sqrt(len(differences))


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def top_tokens(hidden: torch.Tensor, unembedding: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """The most likely next token of one head, `argmax_v u . W[v]`, `chunk` rows at a time.

    Args:
        hidden: `[..., H]`, `u`.
        unembedding: `[V, H]`, `W`.

    Returns:
        `[...]` int64.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    weight = unembedding.to(hidden.dtype)
    found = [F.linear(some, weight).argmax(dim=-1) for some in rows.split(chunk)]
    return torch.cat(found).view(hidden.shape[:-1])


def _weight_sizes(config: "NviumConfig") -> dict[str, int]:
    """Number of weights in every tensor of a checkpoint. Counted from the configuration, because
    while a model trains its modules may be wrapped or hold more than will be saved."""
    return {name: math.prod(shape) for name, shape in expected_shapes(config).items()}


def _total(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))


# ---- results


@dataclass(frozen=True)
class ExitUse:
    """Where tokens leave under one rule, and what that saves.

    Attributes:
        shares: N numbers summing to 1, the final head's last.
        mean_depth: mean share of the layers that a token runs before it is sampled, in (0, 1].
        bytes_per_token: mean bytes of weights read per token at batch 1.
        speedup: bytes of the same backbone without exits over `bytes_per_token`.
    """

    shares: tuple[float, ...]
    mean_depth: float
    bytes_per_token: float
    speedup: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "shares": list(self.shares),
            "mean_depth": self.mean_depth,
            "bytes_per_token": self.bytes_per_token,
            "expected_speedup": self.speedup,
        }


@dataclass(frozen=True)
class Evaluation:
    """An N-vium model on one text.

    Attributes:
        exit_layers: `l_k` of the early exits; `num_layers` is L.
        tokens: how many tokens were predicted.
        loss: mean `-log p_mix`, nats per token.
        head_losses: mean `-log q_k` of each of the N heads alone.
        greedy_loss: mean `-log q` of the head that the greedy rule picks for each token: what
            stands beside the savings of greedy exits, as the mixture does beside those of drawn.
        block_losses: the mixture's mean loss in every block.
        sampled: exits as `routed` sampling at temperature 1 draws them.
        greedy: exits as temperature 0 takes them, see `greedy_exits`.
        exit_bytes: bytes of weights read for a token of each head.
        agreement: share of the tokens where each head's most likely token is the dense parent's;
            `None` when that was not asked.
        greedy_agreement: the same for the head that the greedy rule picks.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    tokens: int
    loss: float
    head_losses: tuple[float, ...]
    greedy_loss: float
    block_losses: tuple[float, ...]
    sampled: ExitUse
    greedy: ExitUse
    exit_bytes: tuple[int, ...]
    agreement: tuple[float, ...] | None = None
    greedy_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """Of the mixture."""
        return perplexity(self.loss)

    @property
    def head_perplexities(self) -> tuple[float, ...]:
        """Of each head alone."""
        return tuple(perplexity(loss) for loss in self.head_losses)

    @property
    def greedy_perplexity(self) -> float:
        """Of the head that the greedy rule picks for each token."""
        return perplexity(self.greedy_loss)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers that a token of each head runs, N numbers."""
        return (*self.exit_layers, self.num_layers)

    def to_json(self) -> dict[str, Any]:
        """Every number as plain values for `json.dumps`; what is not finite becomes `None`."""
        return {
            "exit_layers": list(self.exit_layers),
            "num_layers": self.num_layers,
            "blocks": len(self.block_losses),
            "tokens": self.tokens,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "head_losses": [_finite(loss) for loss in self.head_losses],
            "head_perplexities": [_finite(value) for value in self.head_perplexities],
            "greedy_loss": _finite(self.greedy_loss),
            "greedy_perplexity": _finite(self.greedy_perplexity),
            "block_losses": [_finite(loss) for loss in self.block_losses],
            "sampled": self.sampled.to_json(),
            "greedy": self.greedy.to_json(),
            "exit_bytes": list(self.exit_bytes),
            "agreement": None if self.agreement is None else list(self.agreement),
            "greedy_agreement": self.greedy_agreement,
        }


@dataclass(frozen=True)
class DenseEvaluation:
    """A dense model on one text.

    Attributes:
        tokens: how many tokens were predicted.
        loss: mean `-log p`, nats per token.
        block_losses: the mean loss in every block.
        bytes_per_token: bytes of weights read for one token at batch 1.
        top: `[blocks, T - 1]` int64 on the CPU, its most likely tokens, when they were asked for.
    """

    tokens: int
    loss: float
    block_losses: tuple[float, ...]
    bytes_per_token: int
    top: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return perplexity(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Every number but `top` as plain values for `json.dumps`."""
        return {
            "blocks": len(self.block_losses),
            "tokens": self.tokens,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "block_losses": [_finite(loss) for loss in self.block_losses],
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(frozen=True)
class Comparison:
    """An N-vium model beside a dense one on the same blocks.

    Attributes:
        log_ratio: log of mixture perplexity over dense perplexity; negative is better.
        log_ratio_error: its paired standard error over blocks, `None` with one block.
        sampled_speedup, greedy_speedup: expected at batch 1, the dense model's bytes per token over
            the N-vium model's.
    """

    log_ratio: float
    log_ratio_error: float | None
    sampled_speedup: float
    greedy_speedup: float

    @property
    def ratio(self) -> float:
        """Mixture perplexity over dense perplexity."""
        return perplexity(self.log_ratio)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        error = self.log_ratio_error
        return {
            "perplexity_ratio": _finite(self.ratio),
            "log_ratio": _finite(self.log_ratio),
            "log_ratio_standard_error": None if error is None else _finite(error),
            "sampled_expected_speedup": self.sampled_speedup,
            "greedy_expected_speedup": self.greedy_speedup,
        }


def compare(evaluation: Evaluation, dense: DenseEvaluation) -> Comparison:
    """Both on the same blocks, in the same order.

    Raises:
        ValueError: they did not see equally many blocks.
    """
    if len(evaluation.block_losses) != len(dense.block_losses):
        raise ValueError(
            f"{len(evaluation.block_losses)} blocks cannot be paired with "
            f"{len(dense.block_losses)} of the dense model."
        )
    log_ratio, error = paired_log_ratio(evaluation.block_losses, dense.block_losses)
    return Comparison(
        log_ratio=log_ratio,
        log_ratio_error=error,
        sampled_speedup=dense.bytes_per_token / evaluation.sampled.bytes_per_token,
        greedy_speedup=dense.bytes_per_token / evaluation.greedy.bytes_per_token,
    )


def _finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None


# ---- passes over a text


@torch.no_grad()
def evaluate(
    model: "NviumForCausalLM",
    blocks: "Dataset | torch.Tensor",
    batch_size: int = 1,
    *,
    parent_top: torch.Tensor | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Evaluation:
    """Run an N-vium model over blocks of tokens.

    Every block is scored from its first token on, without what stands before it. Modules are left
    in the mode (training or evaluation) they were in, and no gradients are recorded.

    Args:
        model: on the device where it is to run.
        blocks: `[blocks, T]` int64, or a dataset whose column `input_ids` holds that.
        batch_size: blocks per forward pass.
        parent_top: `[blocks, T - 1]`, a dense parent's most likely tokens (`DenseEvaluation.top`),
            to compare every head's with; costs as much as the unembeddings once more.
        chunk: positions whose logits are held at a time.
        progress: told of every finished block.

    Raises:
        UserError: there is no block.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with _evaluating(model):
        constant, identity = _skipped(model)
        for rows, input_ids in _batches(blocks, batch_size, model.device):
            output = model(input_ids=input_ids, use_cache=False, compute_logits=False)
            mixture, heads = mixture_target_log_probs(model, output, next_tokens(input_ids), chunk)
            # The last position of a block has no next token in it.
            mixture, heads, margins = mixture[:, :-1], heads[:, :-1], output.margins[:, :-1]
            sure = model.config.greedy_margin
            exits = greedy_exits(margins, sure).unsqueeze(-1)  # [B, T-1, 1]
            values = {
                "loss": -mixture.double().mean(dim=1),
                "heads": -heads.double().mean(dim=1),
                "greedy loss": -heads.gather(-1, exits).double().mean(dim=(1, 2)),
                "sampled": sampled_shares(output.exit_log_weights[:, :-1]),
                "greedy": greedy_shares(margins, sure),
            }
            if parent_top is not None:
                hits = _agreement(model, output.head_hidden[:, :-1], parent_top[rows], chunk)
                values["agreement"] = hits.double().mean(dim=1)
                values["greedy agreement"] = hits.gather(-1, exits).double().mean(dim=(1, 2))
            for name, value in values.items():
                found.setdefault(name, []).append(value.cpu())
            if progress is not None:
                progress.update(len(input_ids))
    block_values = {name: torch.cat(parts) for name, parts in found.items()}
    # Blocks are equally long, so a mean over blocks is the mean over tokens.
    means = {name: values.mean(dim=0) for name, values in block_values.items()}
    itemsize = next(model.parameters()).element_size()
    bytes_per_exit = exit_bytes(model.config, constant, identity, itemsize)
    dense_bytes = backbone_bytes(model.config, itemsize)
    return Evaluation(
        exit_layers=tuple(model.config.exit_layers),
        num_layers=model.config.num_hidden_layers,
        tokens=_predicted(blocks),
        loss=float(means["loss"]),
        head_losses=tuple(means["heads"].tolist()),
        greedy_loss=float(means["greedy loss"]),
        block_losses=tuple(block_values["loss"].tolist()),
        sampled=_exit_use(means["sampled"], model.config, bytes_per_exit, dense_bytes),
        greedy=_exit_use(means["greedy"], model.config, bytes_per_exit, dense_bytes),
        exit_bytes=tuple(bytes_per_exit),
        agreement=None if parent_top is None else tuple(means["agreement"].tolist()),
        greedy_agreement=None if parent_top is None else float(means["greedy agreement"]),
    )


@torch.no_grad()
def evaluate_dense(
    model: "PreTrainedModel",
    blocks: "Dataset | torch.Tensor",
    batch_size: int = 1,
    *,
    keep_top: bool = False,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> DenseEvaluation:
    """Run a dense model over blocks of tokens; see `evaluate`.

    Args:
        model: a causal language model of transformers whose logits are its unembedding applied to
            the last hidden state (Llama, Mistral, Qwen2, Qwen3), on the device where it is to run.
        keep_top: also keep the most likely token at every position.

    Raises:
        UserError: there is no block.
    """
    losses, top = [], []
    unembedding = model.get_output_embeddings().weight
    with _evaluating(model):
        for _, input_ids in _batches(blocks, batch_size, model.device):
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            log_probs = head_target_log_probs(hidden, unembedding, next_tokens(input_ids), chunk)
            losses.append(-log_probs[:, :-1].double().mean(dim=1).cpu())
            if keep_top:
                top.append(top_tokens(hidden[:, :-1], unembedding, chunk).cpu())
            if progress is not None:
                progress.update(len(input_ids))
    block_losses = torch.cat(losses)
    return DenseEvaluation(
        tokens=_predicted(blocks),
        loss=float(block_losses.mean()),
        block_losses=tuple(block_losses.tolist()),
        bytes_per_token=_dense_bytes(model),
        top=torch.cat(top) if keep_top else None,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module gets its own mode back, because a frozen part
    of a model in training may be in evaluation mode already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(
    blocks: "Dataset | torch.Tensor", batch_size: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of block numbers and their `[B, T]` tokens."""
    if len(blocks) == 0:
        raise UserError("The text has no whole block, so more text or shorter blocks are needed.")
    for start in range(0, len(blocks), batch_size):
        rows = slice(start, min(start + batch_size, len(blocks)))
        some = blocks[rows] if isinstance(blocks, torch.Tensor) else blocks[rows]["input_ids"]
        yield rows, torch.as_tensor(some).to(device)


def _predicted(blocks: "Dataset | torch.Tensor") -> int:
    first = blocks[0] if isinstance(blocks, torch.Tensor) else blocks[0]["input_ids"]
    return len(blocks) * (len(first) - 1)


def _skipped(model: "NviumForCausalLM") -> tuple[list[bool], list[bool]]:
    """Which routers are constant `[N-1]` and which adapters the identity `[N]`, as vLLM's model
    sees it when it loads these weights."""
    adapters = [exit.adapter for exit in model.exits] + [model.final_adapter]
    return (
        [not bool(exit.router.head.weight.any()) for exit in model.exits],
        [adapter is None or not bool(adapter.fc2.weight.any()) for adapter in adapters],
    )


def _agreement(
    model: "NviumForCausalLM", head_hidden: torch.Tensor, parent_top: torch.Tensor, chunk: int
) -> torch.Tensor:
    """`[B, T, N, H]` head inputs -> `[B, T, N]` bool: a head's top token is the parent's."""
    parent_top = parent_top.to(head_hidden.device)
    hits = [
        top_tokens(head_hidden[..., k, :], unembedding_of(model, k), chunk) == parent_top
        for k in range(head_hidden.shape[-2])
    ]
    return torch.stack(hits, dim=-1)


def _exit_use(
    shares: torch.Tensor, config: "NviumConfig", bytes_per_exit: Sequence[int], dense_bytes: int
) -> ExitUse:
    read = expected_bytes(shares, bytes_per_exit)
    depth = expected_depth(shares.log(), config.exit_layers, config.num_hidden_layers)
    return ExitUse(
        shares=tuple(shares.tolist()),
        mean_depth=float(depth),
        bytes_per_token=read,
        speedup=dense_bytes / read,
    )


def _dense_bytes(model: "PreTrainedModel") -> int:
    """All layers, the norm and the unembedding; of the embeddings one row is read."""
    weights = sum(parameter.numel() for parameter in model.base_model.parameters())
    weights -= model.get_input_embeddings().weight.numel()
    weights += model.get_output_embeddings().weight.numel()
    return weights * next(model.parameters()).element_size()
