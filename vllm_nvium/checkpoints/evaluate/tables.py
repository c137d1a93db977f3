# SPDX-License-Identifier: Apache-2.0
"""A report as two tables on standard output: by head, and by text."""

from collections.abc import Callable, Mapping

from vllm_nvium.checkpoints.evaluate.checkpoint import Report, TextResult
from vllm_nvium.checkpoints.evaluate.plots import layer_count, shortened
from vllm_nvium.checkpoints.evaluate.results import Evaluation, ExitUse
from vllm_nvium.console import say, table

LONGEST_NAME = 24


def print_report(report: Report) -> None:
    """What was measured, the two tables, and how to read them."""
    request, first = report.request, next(iter(report.results.values())).nvium
    exits = ", ".join(map(str, first.exit_layers))
    say(
        "",
        f"{request.model}: exits after {exits} of {first.num_layers} layers; {request.dtype}, "
        f"blocks of {request.block_size} tokens",
    )
    if request.dense is not None:
        say(f"dense parent: {request.dense}")
    say("")
    table(head_rows(report.results), numbers=True)
    say("")
    table(summary_rows(report.results), numbers=True)
    say(
        "",
        "drawn: exits drawn as at temperature 1; greedy: left where the log-odds of leaving "
        "exceed the model's greedy_margin.",
        "An expected speed-up is a ratio of bytes of weights read per token at batch 1 (dense over "
        "N-vium), not a measured time.",
    )


def head_rows(results: Mapping[str, TextResult]) -> list[tuple[str, ...]]:
    """One row per head, with a group of columns for every text."""
    first = next(iter(results.values()))
    *exits, last = map(layer_count, first.nvium.depths())
    labels = ["", "head", *(f"exit {k}, {layers}" for k, layers in enumerate(exits, start=1))]
    labels += [f"final, {last}", "mixture"] + ["dense parent"] * (first.dense is not None)
    columns = [labels]
    for name, result in results.items():
        columns += _columns(name, result, len(labels))
    return list(zip(*columns, strict=True))


def _columns(name: str, result: TextResult, length: int) -> list[list[str]]:
    """The columns of one text, each of so many cells from its name down to the last row."""
    found, dense = result.nvium, result.dense
    perplexities = [*found.head_perplexities, found.perplexity]
    perplexities += [] if dense is None else [dense.perplexity]
    name = shortened(name, LONGEST_NAME)
    columns = [[name, "perplexity", *map(_perplexity, perplexities)]]
    for header, shares in (
        ("drawn", found.sampled.shares),
        ("greedy", found.greedy.shares),
        ("as parent", found.agreement),
    ):
        if shares is not None:
            cells = ["", header, *(f"{share:.1%}" for share in shares)]
            columns.append(cells + [""] * (length - len(cells)))
    return columns


def summary_rows(results: Mapping[str, TextResult]) -> list[tuple[str, ...]]:
    """One row per quantity that was measured, one column per text."""
    quantities: dict[str, Callable[[TextResult], str]] = {
        "predicted tokens": lambda r: f"{r.nvium.tokens:,}",
        "perplexity, mixture": lambda r: _perplexity(r.nvium.perplexity),
        "perplexity, greedy exits": lambda r: _perplexity(r.nvium.greedy_perplexity),
        "perplexity, dense parent": lambda r: _perplexity(r.dense.perplexity) if r.dense else "",
        "mixture / parent (standard error)": _ratio,
        "mean depth, drawn": lambda r: _depth(r.nvium, r.nvium.sampled),
        "mean depth, greedy": lambda r: _depth(r.nvium, r.nvium.greedy),
        "expected speed-up, drawn": lambda r: f"{_speedups(r)[0]:.3f}x",
        "expected speed-up, greedy": lambda r: f"{_speedups(r)[1]:.3f}x",
        "greedy token is the parent's": _greedy_agreement,
    }
    rows = [("", *(shortened(name, LONGEST_NAME) for name in results))]
    for label, cell in quantities.items():
        cells = [cell(result) for result in results.values()]
        if any(cells):
            rows.append((label, *cells))
    return rows


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e5 else f"{value:.2e}"


def _ratio(result: TextResult) -> str:
    comparison = result.comparison
    if comparison is None:
        return ""
    ratio, log_error = comparison.perplexity_ratio, comparison.log_ratio_standard_error
    # d exp(x) = exp(x) dx
    return f"{ratio:.5f}" + ("" if log_error is None else f" ({ratio * log_error:.5f})")


def _depth(evaluation: Evaluation, use: ExitUse) -> str:
    layers = use.mean_depth * evaluation.num_layers
    return f"{use.mean_depth:.1%} ({layers:.1f} layers)"


def _speedups(result: TextResult) -> tuple[float, float]:
    """Over the dense model given, else over the same backbone without exits; drawn and greedy."""
    if (comparison := result.comparison) is not None:
        return comparison.sampled_expected_speedup, comparison.greedy_expected_speedup
    return result.nvium.sampled.expected_speedup, result.nvium.greedy.expected_speedup


def _greedy_agreement(result: TextResult) -> str:
    share = result.nvium.greedy_agreement
    return "" if share is None else f"{share:.1%}"
