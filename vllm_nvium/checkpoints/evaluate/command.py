# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium eval MODEL --text SOURCE`: perplexity of an N-vium checkpoint and of each of its
heads, where its tokens leave, and the speed-up to expect, beside the dense parent if one is given.
Printed as a table, written as JSON and drawn as a PNG.
"""

import argparse
import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.evaluate.plots import HistoryPoint, draw, layer_count, read_history
from vllm_nvium.checkpoints.inputs import (
    check_block_size,
    check_parent,
    check_tokenizers_agree,
    load_tokenizer,
    open_model,
    open_parent,
)
from vllm_nvium.console import complain, progress, say, table
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

    from vllm_nvium.checkpoints.evaluate.measure import (
        Comparison,
        DenseEvaluation,
        Evaluation,
        ExitUse,
    )

DTYPES = ("float32", "bfloat16")
LONGEST_NAME = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium eval` to a parser."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="N-vium checkpoint folder")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="[NAME=]SOURCE",
        help="text that the model was not trained on: files, folders, globs or names of the "
        "`datasets` library; every name is measured for itself, and sources that are given the "
        "same NAME are one text",
    )
    parser.add_argument(
        "--dense",
        metavar="PARENT",
        help="dense model to compare with: a Hugging Face folder or a hub id",
    )
    parser.add_argument(
        "--agreement",
        action="store_true",
        help="with --dense: also how often each head's most likely token is the parent's; costs "
        "all unembeddings once more",
    )
    parser.add_argument("--block-size", type=int, default=1024, metavar="T", help="default: 1024")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of each text (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="default: 1")
    parser.add_argument(
        "--dtype",
        default=DTYPES[0],
        metavar="DTYPE",
        help=f"{' or '.join(DTYPES)}, of both models (default: {DTYPES[0]})",
    )
    parser.add_argument("--text-field", metavar="FIELD", help="field of JSON lines and data sets")
    parser.add_argument("--split", default="train", help="of data sets (default: train)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write every number")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the exit shares")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="RUN_FOLDER",
        help="with --plot: also draw loss and depth over the training run in this folder",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when everything is written, 2 with one line on stderr when not."""
    try:
        request = check(args)
        report = measure(request)
        print_report(report)
        if request.json is not None:
            text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
            write_atomically(request.json, lambda path: path.write_text(text))
        if request.plot is not None:
            evaluations = {name: result.nvium for name, result in report.results.items()}
            write_atomically(request.plot, lambda path: draw(path, evaluations, request.history))
    except UserError as error:
        complain(f"vllm-nvium eval: error: {error}")
        return 2
    return 0


# ---- what is asked for


@dataclass(frozen=True)
class Request:
    """Arguments that are possible as far as can be said without opening a model.

    Attributes:
        texts: name -> sources.
        history: the points of `--history`, read already.
    """

    model: Path
    texts: dict[str, list[str]]
    dense: str | None
    agreement: bool
    block_size: int
    max_tokens: int | None
    batch_size: int
    dtype: str
    text_field: str | None
    split: str
    json: Path | None
    plot: Path | None
    history: Sequence[HistoryPoint]


def check(args: argparse.Namespace) -> Request:
    """Refuse what cannot work, before anything slow starts.

    Raises:
        UserError: a flag has a value that cannot be used.
    """
    for name, smallest in (("block_size", 2), ("batch_size", 1)):
        if getattr(args, name) < smallest:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(args, name)}, and it must be at least {smallest}.")
    if args.max_tokens is not None and args.max_tokens < args.block_size:
        raise UserError(
            f"--max-tokens is {args.max_tokens}, which is less than one block of --block-size "
            f"{args.block_size}."
        )
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype is {args.dtype!r}, and it must be {' or '.join(DTYPES)}.")
    if args.agreement and args.dense is None:
        raise UserError("--agreement is with the dense parent, so --dense must be given too.")
    if args.history is not None and args.plot is None:
        raise UserError("--history is drawn by --plot, so --plot must be given too.")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            _check_output(flag, path)
    if args.json is not None and args.plot is not None and _same(args.json, args.plot):
        raise UserError(f"--json and --plot are both {str(args.json)!r}; give two files.")
    require("datasets", *(["matplotlib"] if args.plot is not None else []))
    history: Sequence[HistoryPoint] = ()
    if args.history is not None:
        history = read_history(args.history)
    return Request(
        model=args.model.expanduser(),
        texts=parse_texts(args.text),
        dense=args.dense,
        agreement=args.agreement,
        block_size=args.block_size,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        dtype=args.dtype,
        text_field=args.text_field,
        split=args.split,
        json=args.json,
        plot=args.plot,
        history=history,
    )


def parse_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=SOURCE` or `SOURCE` words as name -> sources; a source alone is named after itself.

    Raises:
        UserError: a name or a source is empty, or two texts would have one name by chance.
    """
    texts: dict[str, list[str]] = {}
    automatic: set[str] = set()
    for word in words:
        name, equals, source = word.partition("=")
        # A path may have an equals sign in it, a name has no slash.
        is_named = bool(equals) and "/" not in name and not Path(word).expanduser().exists()
        if not is_named:
            name, source = _name_of(word), word
        if not name.strip() or not source.strip():
            raise UserError(f"--text has {word!r}, and NAME=SOURCE or SOURCE is needed.")
        if name in texts and (not is_named or name in automatic):
            raise UserError(
                f"--text has two texts that would be called {name!r}; name them, as in "
                f"NAME={source}."
            )
        if not is_named:
            automatic.add(name)
        texts.setdefault(name, []).append(source)
    return texts


def _name_of(source: str) -> str:
    return source if glob.has_magic(source) else Path(source).stem or source


def _check_output(flag: str, path: Path) -> None:
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} is {str(path)!r}, and the folder {folder} does not exist.")
    if path.expanduser().is_dir():
        raise UserError(f"{flag} is {str(path)!r}, which is a folder; a file name is needed.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} is {str(path)!r}, and {folder} cannot be written to.")


def _same(one: Path, other: Path) -> bool:
    return one.expanduser().resolve() == other.expanduser().resolve()


# ---- the work


@dataclass(frozen=True)
class TextResult:
    """Both models on one text; `dense` and `comparison` are `None` without `--dense`."""

    nvium: "Evaluation"
    dense: "DenseEvaluation | None"
    comparison: "Comparison | None"


@dataclass(frozen=True)
class Report:
    """Everything measured, by the name of the text, and on what device."""

    request: Request
    results: dict[str, TextResult]
    device: str


def measure(request: Request) -> Report:
    """Load text and models and evaluate them, one model in memory at a time.

    Raises:
        UserError: a model or a text cannot be used; found before any weights are loaded, unless
            they are the reason.
    """
    import torch

    from vllm_nvium.checkpoints.evaluate.measure import compare
    from vllm_nvium.checkpoints.text import check_tokenizer
    from vllm_nvium.model_executor.models.nvium_reference import register_with_transformers

    register_with_transformers()
    config = open_model(request.model)
    check_block_size(request.block_size, config.max_position_embeddings, "MODEL")
    if request.dense is not None:
        check_parent(request.dense, config, open_parent(request.dense), request.block_size)
    tokenizer = load_tokenizer(str(request.model), "MODEL")
    check_tokenizer(tokenizer, config.vocab_size)
    if request.dense is not None:
        check_tokenizers_agree(request.dense, tokenizer)
    texts = _load_texts(request, tokenizer)
    if request.dense is not None:
        some = tokenizer.decode(next(iter(texts.values()))[0]["input_ids"])
        check_tokenizers_agree(request.dense, tokenizer, some)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = _evaluate_dense(request, texts, device)
    nvium = _evaluate_nvium(request, texts, device, dense)
    results = {
        name: TextResult(
            found, dense.get(name), compare(found, dense[name]) if name in dense else None
        )
        for name, found in nvium.items()
    }
    return Report(request, results, device)


def _load_texts(request: Request, tokenizer: Any) -> "dict[str, Dataset]":
    from vllm_nvium.checkpoints.text import load_blocks

    texts = {}
    for name, sources in request.texts.items():
        texts[name] = load_blocks(
            sources,
            tokenizer,
            request.block_size,
            max_tokens=request.max_tokens,
            text_field=request.text_field,
            split=request.split,
        )
    return texts


def _evaluate_dense(
    request: Request, texts: "Mapping[str, Dataset]", device: str
) -> "dict[str, DenseEvaluation]":
    """By name of the text; empty without `--dense`. The model is gone afterwards."""
    from vllm_nvium.checkpoints.evaluate.measure import evaluate_dense

    if request.dense is None:
        return {}
    model = _load(request.dense, "--dense", request.dtype, device)
    found = {}
    for name, text in texts.items():
        with progress(f"Dense parent on {name}", len(text), "block") as bar:
            found[name] = evaluate_dense(
                model, text, request.batch_size, keep_top=request.agreement, progress=bar
            )
    return found


def _evaluate_nvium(
    request: Request,
    texts: "Mapping[str, Dataset]",
    device: str,
    dense: "Mapping[str, DenseEvaluation]",
) -> "dict[str, Evaluation]":
    from vllm_nvium.checkpoints.evaluate.measure import evaluate

    model = _load(str(request.model), "MODEL", request.dtype, device)
    found = {}
    for name, text in texts.items():
        top = dense[name].top if name in dense else None
        with progress(f"N-vium on {name}", len(text), "block") as bar:
            found[name] = evaluate(model, text, request.batch_size, parent_top=top, progress=bar)
    return found


def _load(name: str, flag: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{flag} is {name!r}, whose weights cannot be loaded ({first_line(error)})."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{flag} is {name!r}, which has no tensor {missing[0]}, and a whole checkpoint is "
            "needed."
        )
    return model.to(device)


# ---- what comes out


def to_json(report: Report) -> dict[str, Any]:
    """Every number, and what it was measured with."""
    import torch
    import transformers

    from vllm_nvium.version import __version__

    request = report.request
    return {
        "model": str(request.model),
        "dense": request.dense,
        "dtype": request.dtype,
        "device": report.device,
        "block_size": request.block_size,
        "batch_size": request.batch_size,
        "max_tokens": request.max_tokens,
        "texts": {
            name: {
                "sources": request.texts[name],
                "nvium": result.nvium.to_json(),
                "dense": None if result.dense is None else result.dense.to_json(),
                "comparison": None if result.comparison is None else result.comparison.to_json(),
            }
            for name, result in report.results.items()
        },
        "versions": {
            "vllm_nvium": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def print_report(report: Report) -> None:
    """Two tables on standard output: by head, and by text."""
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
    table(_aligned(head_rows(report.results), headers=2))
    say("")
    table(_aligned(summary_rows(report.results), headers=1))
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
    layers = first.nvium.exit_layers
    labels = [
        "",
        "head",
        *(f"exit {k}, {layer_count(layer)}" for k, layer in enumerate(layers, start=1)),
    ]
    labels += [f"final, {layer_count(first.nvium.num_layers)}", "mixture"]
    labels += [] if first.dense is None else ["dense parent"]
    columns = [labels]
    for name, result in results.items():
        columns += _columns(name, result)
    return list(zip(*columns, strict=True))


def _columns(name: str, result: TextResult) -> list[list[str]]:
    """The columns of one text, each from its name down to the last row."""
    found, dense = result.nvium, result.dense
    perplexities = [*found.head_perplexities, found.perplexity]
    perplexities += [] if dense is None else [dense.perplexity]
    columns = [[_shortened(name), "perplexity", *map(_perplexity, perplexities)]]
    for header, shares in (
        ("drawn", found.sampled.shares),
        ("greedy", found.greedy.shares),
        ("as parent", found.agreement),
    ):
        if shares is not None:
            cells = ["", header, *map(_percent, shares)]
            columns.append(cells + [""] * (len(columns[0]) - len(cells)))
    return columns


def summary_rows(results: Mapping[str, TextResult]) -> list[tuple[str, ...]]:
    """One row per quantity, one column per text."""

    def row(label: str, cell: Callable[[TextResult], str | None]) -> tuple[str, ...]:
        return (label, *(cell(result) or "" for result in results.values()))

    rows = [
        ("", *map(_shortened, results)),
        row("predicted tokens", lambda r: f"{r.nvium.tokens:,}"),
        row("perplexity, mixture", lambda r: _perplexity(r.nvium.perplexity)),
        row("perplexity, greedy exits", lambda r: _perplexity(r.nvium.greedy_perplexity)),
        row("perplexity, dense parent", _dense_perplexity),
        row("mixture / parent (standard error)", _ratio),
        row("mean depth, drawn", lambda r: _depth(r.nvium, r.nvium.sampled)),
        row("mean depth, greedy", lambda r: _depth(r.nvium, r.nvium.greedy)),
        row("expected speed-up, drawn", lambda r: f"{_speedups(r)[0]:.3f}x"),
        row("expected speed-up, greedy", lambda r: f"{_speedups(r)[1]:.3f}x"),
        row("greedy token is the parent's", _greedy_agreement),
    ]
    return [cells for cells in rows if any(cells[1:])]


def _aligned(rows: Sequence[tuple[str, ...]], headers: int) -> list[tuple[str, ...]]:
    """Right-align all but the first column; names in the very first row stay on the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    result = []
    for number, row in enumerate(rows):
        left = headers > 1 and number == 0
        cells = [row[0]] + [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        result.append(tuple(cells))
    return result


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e5 else f"{value:.2e}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _greedy_agreement(result: TextResult) -> str | None:
    share = result.nvium.greedy_agreement
    return None if share is None else _percent(share)


def _speedups(result: TextResult) -> tuple[float, float]:
    """Over the dense model given, else over the same backbone without exits; drawn and greedy."""
    if result.comparison is not None:
        return result.comparison.sampled_speedup, result.comparison.greedy_speedup
    return result.nvium.sampled.speedup, result.nvium.greedy.speedup


def _dense_perplexity(result: TextResult) -> str | None:
    return None if result.dense is None else _perplexity(result.dense.perplexity)


def _ratio(result: TextResult) -> str | None:
    comparison = result.comparison
    if comparison is None:
        return None
    if comparison.log_ratio_error is None:
        return f"{comparison.ratio:.5f}"
    # d exp(x) = exp(x) dx
    return f"{comparison.ratio:.5f} ({comparison.ratio * comparison.log_ratio_error:.5f})"


def _depth(evaluation: "Evaluation", use: "ExitUse") -> str:
    layers = use.mean_depth * evaluation.num_layers
    return f"{use.mean_depth:.1%} ({layers:.1f} layers)"
