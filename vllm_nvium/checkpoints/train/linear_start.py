# SPDX-License-Identifier: Apache-2.0
"""Where a retrofit's exits start: at the linear map that best turns an exit's state into the final
one, found by least squares in one pass over little text. Gradient steps from the identity need many
times the text to get as far.
"""

from collections.abc import Callable, Iterable

import torch

from vllm_nvium.model_executor.models.nvium_reference import NviumAdapter, NviumForCausalLM


@torch.no_grad()
def fit_linear_maps(
    model: NviumForCausalLM,
    batches: Iterable[torch.Tensor],
    ridge: float = 1e-3,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For every exit, the map from its normed states to the final ones.

        M_k = argmin_M  sum_t | f_t - M n_kt |^2 + lambda |M|^2
            = F N^T (N N^T + lambda I)^-1,      lambda = ridge * mean diagonal of N N^T

    with `n_k = RMSNorm_k(h_k)` and `f` the output of the final norm.

    Args:
        batches: token ids, `[B, T]` each.
        progress: called with the number of tokens after each batch.

    Returns:
        the maps `M_k`, and the second moments `N N^T` per token, `[H, H]` float32 each.
    """
    hidden = model.config.hidden_size
    exits = len(model.exits)
    moments = torch.zeros(exits, hidden, hidden, dtype=torch.float64)
    cross = torch.zeros(exits, hidden, hidden, dtype=torch.float64)
    count = 0
    for input_ids in batches:
        residuals, final = model.residuals(input_ids=input_ids.to(model.device), use_cache=False)
        final = final.reshape(-1, hidden).float()
        for k, (exit_, residual) in enumerate(zip(model.exits, residuals, strict=True)):
            normed = exit_.norm(residual).reshape(-1, hidden).float()
            moments[k] += (normed.T @ normed).double().cpu()
            cross[k] += (final.T @ normed).double().cpu()
        count += input_ids.numel()
        progress(input_ids.numel())
    moments, cross = moments / count, cross / count
    maps = []
    for k in range(exits):
        loading = ridge * moments[k].diagonal().mean()
        regular = moments[k] + loading * torch.eye(hidden, dtype=torch.float64)
        maps.append(torch.linalg.solve(regular, cross[k], left=False).float())
    return maps, [moment.float() for moment in moments]


def low_rank(
    change: torch.Tensor, moments: torch.Tensor, metric: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `change ~ up @ down` of a rank, in what it does to the logits.

    Minimises `E |W (change - up down) n|^2`: with `G = W^T W` and `S = E n n^T`, the truncated
    singular value decomposition of `G^1/2 change S^1/2`, its factors led back.

    Args:
        change: `[H, H]`.
        moments: `S`, `[H, H]`.
        metric: `G`, `[H, H]`.

    Returns:
        `up` `[H, rank]` and `down` `[rank, H]`, of equal size.
    """
    left, left_inverse = _root(metric)
    right, right_inverse = _root(moments)
    u, s, v = torch.linalg.svd(left @ change.double() @ right)
    size = s[:rank].sqrt()
    up = left_inverse @ (u[:, :rank] * size)
    down = (size[:, None] * v[:rank]) @ right_inverse
    # The same product with factors of the same size: neither then needs its own learning rate.
    balance = (down.norm() / up.norm()).sqrt()
    return (up * balance).float(), (down / balance).float()


def _root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`M^1/2` and its inverse of a symmetric matrix, its smallest eigenvalues lifted."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp(min=float(values[-1]) * 1e-9).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


@torch.no_grad()
def set_linear(adapter: NviumAdapter, up: torch.Tensor, down: torch.Tensor) -> None:
    """Makes `u = n + A_2 SiLU(A_1 n)` equal to `n + up down n`.

    `SiLU(x) - SiLU(-x) = x`, so `A_1 = [down; -down]` and `A_2 = [up, -up]` cancel the
    nonlinearity. Rows that are left over keep what they started with, at no effect.

    Args:
        up, down: `[H, r]` and `[r, H]`; `2 r` at most the adapter's inner width.
    """
    rank = down.shape[0]
    adapter.fc1.weight[: 2 * rank] = torch.cat([down, -down]).to(adapter.fc1.weight)
    adapter.fc2.weight.zero_()
    adapter.fc2.weight[:, : 2 * rank] = torch.cat([up, -up], dim=1).to(adapter.fc2.weight)


@torch.no_grad()
def start_linear(
    model: NviumForCausalLM,
    batches: Iterable[torch.Tensor],
    progress: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Gives every exit's adapter the linear map that fits `batches` best."""
    maps, moments = fit_linear_maps(model, batches, progress=progress)
    unembedding = model.lm_head.weight.float()
    metric = unembedding.T @ unembedding
    for exit_, linear, moment in zip(model.exits, maps, moments, strict=True):
        if exit_.adapter is None:
            continue
        change = linear - torch.eye(len(linear))
        rank = exit_.adapter.fc1.weight.shape[0] // 2
        set_linear(exit_.adapter, *low_rank(change, moment, metric.cpu(), rank))
