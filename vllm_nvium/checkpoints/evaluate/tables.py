# SPDX-License-Identifier: Apache-2.0
"""A report as two tables on standard output: by head, and by text."""

from collections.abc import Mapping

from vllm_nvium.checkpoints.evaluate.plots import layer_count, shortened
from vllm_nvium.checkpoints.evaluate.results import Comparison, Report, TextResult
from vllm_nvium.console import say, table

LONGEST_NAME = 24


def print_report(report: Report) -> None:
    """What was measured, the two tables, and how to read them."""
    first = next(iter(report.texts.values())).nvium
    exits = ", ".join(map(str, first.exit_layers))
    say(
        "",
        f"{report.model}: exits after {exits} of {first.num_layers} layers; {report.dtype}, "
        f"blocks of {report.block_size} tokens",
    )
    if report.dense is not None:
        say(f"dense parent: {report.dense}")
    say("")
    table(head_rows(report.texts), numbers=True)
    say("")
    columns = {shortened(name, LONGEST_NAME): summary(r) for name, r in report.texts.items()}
    labels = next(iter(columns.values()))
    rows = [(label, *(cells[label] for cells in columns.values())) for label in labels]
    table([("", *columns), *rows], numbers=True)
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


def summary(result: TextResult) -> dict[str, str]:
    """Every quantity that was measured on one text."""
    found, dense, comparison = result.nvium, result.dense, result.comparison
    cells = {
        "predicted tokens": f"{found.tokens:,}",
        "perplexity, mixture": _perplexity(found.perplexity),
        "perplexity, greedy exits": _perplexity(found.greedy_perplexity),
    }
    # Over the dense model given, else over the same backbone without exits.
    drawn, greedy = found.sampled.expected_speedup, found.greedy.expected_speedup
    if dense is not None and comparison is not None:
        cells["perplexity, dense parent"] = _perplexity(dense.perplexity)
        cells["mixture / parent (standard error)"] = _ratio(comparison)
        drawn, greedy = comparison.sampled_expected_speedup, comparison.greedy_expected_speedup
    for rule, use in (("drawn", found.sampled), ("greedy", found.greedy)):
        layers = use.mean_depth * found.num_layers
        cells[f"mean depth, {rule}"] = f"{use.mean_depth:.1%} ({layers:.1f} layers)"
    cells["expected speed-up, drawn"] = f"{drawn:.3f}x"
    cells["expected speed-up, greedy"] = f"{greedy:.3f}x"
    if found.greedy_agreement is not None:
        cells["greedy token is the parent's"] = f"{found.greedy_agreement:.1%}"
    return cells


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e5 else f"{value:.2e}"


def _ratio(comparison: Comparison) -> str:
    ratio, log_error = comparison.perplexity_ratio, comparison.log_ratio_standard_error
    # d exp(x) = exp(x) dx
    return f"{ratio:.5f}" + ("" if log_error is None else f" ({ratio * log_error:.5f})")
