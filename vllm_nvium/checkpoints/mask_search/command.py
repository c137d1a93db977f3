# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask TARGET --data FILE... -o mask.json`: finds which layers of a target
VIA-SD's slim verifier should skip. A search that was interrupted goes on with `--resume`; masks are
scored on the text as it stands, so text that the target wrote itself is the best to give.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_nvium.checkpoints.inputs import load_config
from vllm_nvium.console import complain, progress, say, table
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.via_sd.mask import (
    Calibration,
    MaskFile,
    ModelIdentity,
    Objective,
    layer_list,
    skip_count,
    write_mask_file,
)

if TYPE_CHECKING:
    import torch

    from vllm_nvium.checkpoints.mask_search.search import Journal, Plan, Score, Space, Trial

OBJECTIVES: tuple[str, ...] = get_args(Objective)
DTYPES = ("float32", "bfloat16")
# model_type of the decoders whose layers are a plain list: each takes the hidden states of the one
# before and gives its own, so that one can be left out.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# The values of a lossless verifier; the paper prints none.
ALPHA, BETA = 0.0, 1.0
# What a record calls the fingerprint of the target's weights, which older ones lack.
WEIGHTS = "the fingerprint of TARGET's weights"
# Beside the mask file.
RECORD = ".trials.jsonl"
COLOURS = {"even": "black", "ranking": "#009E73", "random": "#0072B2", "bayes": "#E69F00"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-nvium search-mask` to a parser."""
    parser.add_argument("target", metavar="TARGET", help="the full model: folder or hub id")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="calibration text: files, folders, globs, .jsonl or names of the `datasets` library",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="MASK.json", help="mask file to write"
    )
    parser.add_argument(
        "--skip-ratio",
        type=float,
        default=0.45,
        metavar="R",
        help="share of the layers to skip (default: 0.45, the paper's best for 9B)",
    )
    parser.add_argument(
        "--objective",
        default=OBJECTIVES[0],
        metavar="NAME",
        help="divergence: the paper's, how far the slim verifier's predictions are from the full "
        "model's; agreement: how often their most likely tokens are the same; speed: measured "
        "tokens per second of VIA-SD in vLLM (default: divergence)",
    )
    parser.add_argument(
        "--drafter",
        metavar="MODEL",
        help="with --objective speed: the draft model (default: n-gram drafts)",
    )
    parser.add_argument(
        "--trials", type=int, default=100, metavar="N", help="masks to score (default: 100)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="of the text (default: 4096)"
    )
    parser.add_argument(
        "--block-size", type=int, default=256, metavar="T", help="longest prefix (default: 256)"
    )
    parser.add_argument(
        "--random-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the trials after the first half (after ten, if that is less), drawn uniformly as "
        "those are; the others are Bayesian (default: 0.5, by turns)",
    )
    parser.add_argument(
        "--no-ranking",
        action="store_true",
        help="do not first leave out every layer alone (which is not done for speed) to try the "
        "mask of those that cost least",
    )
    parser.add_argument(
        "--allow-ends", action="store_true", help="let the first and the last layer be skipped too"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="of the divergence, in [0, 1): where the slim verifier gives a token more than 1 / "
        f"(1 - A) times what the full model gives it, its own weight counts (default: {ALPHA:g})",
    )
    parser.add_argument(
        "--beta",
        type=float,
        metavar="B",
        help="of the divergence, at least 1 - A: where it gives a token more than 1 / B times as "
        f"much, the full model's weight counts (default: {BETA:g})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of all draws (default: 0)"
    )
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"{' or '.join(DTYPES)}, of the model (default: {DTYPES[0]}, and {DTYPES[1]} for "
        "speed, as it is served)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the search whose record is beside -o; only --trials may differ",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the mask is written, 2 with one line on stderr when it is not, 130
    when the search was interrupted."""
    try:
        request = check(args)
        mask = find_mask(request)
    except UserError as error:
        complain(f"vllm-nvium search-mask: error: {error}")
        return 2
    except KeyboardInterrupt:
        goes_on = args.out.expanduser().with_suffix(RECORD).is_file()
        resume = " with --resume goes on" if goes_on else " begins anew"
        complain(f"vllm-nvium search-mask: interrupted; the same command{resume}.")
        return 130
    say(f"vllm-nvium search-mask: wrote {request.out} ({len(mask.skipped)} layers are skipped)")
    return 0


# ---- what is asked for


@dataclass(frozen=True)
class Request:
    """Arguments that are possible as far as can be said without opening a model."""

    target: str
    data: tuple[str, ...]
    out: Path
    skip_ratio: float
    objective: str
    drafter: str | None
    trials: int
    tokens: int
    block_size: int
    random_share: float
    ranking: bool
    allow_ends: bool
    alpha: float
    beta: float
    seed: int
    dtype: str
    resume: bool

    @property
    def record(self) -> Path:
        """The trials of the search."""
        return self.out.with_suffix(RECORD)

    @property
    def picture(self) -> Path:
        """Scores over trials."""
        return self.out.with_suffix(".png")

    @property
    def maximise(self) -> bool:
        return self.objective != "divergence"


def check(args: argparse.Namespace) -> Request:
    """Refuse what cannot work, before anything slow starts.

    Raises:
        UserError: a flag has a value that cannot be used.
    """
    dtype = args.dtype or DTYPES[args.objective == "speed"]
    for flag, value, choices in (
        ("--objective", args.objective, OBJECTIVES),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in choices:
            raise UserError(f"{flag} is {value!r}, and it must be one of {', '.join(choices)}.")
    for flag, count, smallest in (
        ("--trials", args.trials, 1),
        ("--block-size", args.block_size, 2),
        ("--seed", args.seed, 0),
    ):
        if count < smallest:
            raise UserError(f"{flag} is {count}, and it must be at least {smallest}.")
    if args.tokens < args.block_size:
        raise UserError(
            f"--tokens is {args.tokens}, which is less than one block of --block-size "
            f"{args.block_size}."
        )
    if not 0 < args.skip_ratio < 1:
        raise UserError(
            f"--skip-ratio is {args.skip_ratio}, and it must be greater than 0 and less than 1."
        )
    if not 0 <= args.random_share <= 1:
        raise UserError(f"--random-share is {args.random_share}, and a share lies in 0..1.")
    alpha, beta = _check_divergence(args)
    if args.drafter is not None and args.objective != "speed":
        raise UserError(
            f"--drafter is {args.drafter!r}, and --objective {args.objective} drafts nothing: "
            "leave it out, or use --objective speed."
        )
    if args.no_ranking and args.objective == "speed":
        raise UserError(
            "--no-ranking is given, and --objective speed ranks no layers: leave it out."
        )
    request = Request(
        target=args.target,
        data=tuple(args.data),
        out=args.out.expanduser(),
        skip_ratio=args.skip_ratio,
        objective=args.objective,
        drafter=args.drafter,
        trials=args.trials,
        tokens=args.tokens,
        block_size=args.block_size,
        random_share=args.random_share,
        ranking=not args.no_ranking and args.objective != "speed",
        allow_ends=args.allow_ends,
        alpha=alpha,
        beta=beta,
        seed=args.seed,
        dtype=dtype,
        resume=args.resume,
    )
    _check_output(request)
    _require("optuna", "datasets", "matplotlib")
    if request.objective == "speed" and find_spec("vllm") is None:
        raise UserError("--objective speed needs vLLM, which is not installed.")
    return request


def _check_divergence(args: argparse.Namespace) -> tuple[float, float]:
    for flag, value in (("--alpha", args.alpha), ("--beta", args.beta)):
        if value is not None and args.objective != "divergence":
            raise UserError(
                f"{flag} is {value}, and --objective {args.objective} has none: leave it out."
            )
    alpha = ALPHA if args.alpha is None else args.alpha
    beta = BETA if args.beta is None else args.beta
    if not 0 <= alpha < 1:
        raise UserError(f"--alpha is {alpha}, and it must be at least 0 and less than 1.")
    if not 1 - alpha <= beta < math.inf:
        raise UserError(
            f"--beta is {beta}, and it must be a number of at least 1 - alpha = {1 - alpha:g}."
        )
    return alpha, beta


def _check_output(request: Request) -> None:
    out, folder = request.out, request.out.absolute().parent
    if out.suffix != ".json":
        raise UserError(f"-o is {str(out)!r}, and the name of a mask file ends in .json.")
    if not folder.is_dir():
        raise UserError(f"-o is {str(out)!r}, and the folder {folder} does not exist.")
    if out.is_dir():
        raise UserError(f"-o is {str(out)!r}, which is a folder; a file name is needed.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"-o is {str(out)!r}, and {folder} cannot be written to.")
    if request.record.exists() and not request.resume:
        raise UserError(
            f"-o is {str(out)!r}, beside which {request.record.name} holds a search already: give "
            "--resume to go on with it, or another name."
        )
    for path in (out, request.picture):
        if path.exists() and not request.resume:
            raise UserError(
                f"-o is {str(out)!r}, and {path} exists already: move it away, or give another "
                "name."
            )
    if request.resume and not request.record.is_file():
        raise UserError(
            f"--resume needs the record of a search, and there is no {request.record}: leave it "
            "out to begin one."
        )


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the package {missing[0]!r} is not installed: pip install 'vllm-nvium[search]'."
        )


# ---- the work


def find_mask(request: Request) -> MaskFile:
    """Search, and write mask, record and picture.

    Raises:
        UserError: target or text cannot be used; nothing was written.
        UserError: the target is of another kind, or the mask cannot be written.
    """
    from vllm_nvium.checkpoints.mask_search.search import Journal, Plan, search
    from vllm_nvium.model_executor.models.nvium_reference import register_with_transformers
    from vllm_nvium.weights import fingerprint

    register_with_transformers()  # to refuse such a target by its name
    config = load_config(request.target, "TARGET")
    _check_family(request, config)
    identity = ModelIdentity.from_config(config)
    space = _space(request, identity.num_hidden_layers)
    blocks = _load_text(request, config)
    calibration = Calibration(
        sources=request.data,
        prefixes=blocks.numel(),
        block_size=request.block_size,
        sha256=hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
    )
    told = _told(request, identity, calibration)
    told[WEIGHTS] = fingerprint(request.target, space.num_layers)
    # Another search is refused before the model is loaded, and a new one leaves nothing behind
    # when the model is.
    resumed = Journal.resume(request.record, told, (WEIGHTS,)) if request.resume else None
    score = _scorer(request, config, blocks)
    journal = resumed or Journal.create(request.record, told)
    plan = Plan(
        request.trials, request.seed, request.random_share, request.ranking, request.maximise
    )
    try:
        with progress("Searching", _passes_left(space, plan, journal), "mask") as bar:
            best = search(space, plan, score, journal, bar)
    except BaseException:
        if not journal.trials and not journal.alone:
            request.record.unlink(missing_ok=True)  # nothing to go on with
        raise
    mask = _mask_file(request, identity, calibration, journal.trials, best)
    write_mask_file(request.out, mask)
    write_atomically(request.picture, lambda path: draw(path, journal.trials, request.objective))
    print_report(request, journal.trials, best)
    return mask


def _space(request: Request, num_layers: int) -> "Space":
    from vllm_nvium.checkpoints.mask_search.search import Space

    count = skip_count(request.skip_ratio, num_layers)
    # The even mask is where a search begins, and it keeps both ends.
    if not 1 <= count <= num_layers - 2:
        raise UserError(
            f"--skip-ratio is {request.skip_ratio}, which skips {count} of TARGET's {num_layers} "
            f"layers, and from 1 to {num_layers - 2} can be skipped."
        )
    return Space(num_layers, count, request.allow_ends)


def _passes_left(space: "Space", plan: "Plan", journal: "Journal") -> int:
    ranking = len(space.free) - len(journal.alone) if plan.ranking else 0
    return ranking + max(0, min(plan.trials, space.size) - len(journal.trials))


def _told(request: Request, identity: ModelIdentity, calibration: Calibration) -> dict[str, Any]:
    """What a search that goes on must agree with, by the name that a message gives it."""
    return {
        "TARGET": request.target,
        "TARGET's configuration": identity.model_dump(),
        "--data": request.data,
        "--skip-ratio": request.skip_ratio,
        "--objective": request.objective,
        "--drafter": request.drafter,
        "--tokens": request.tokens,
        "--block-size": request.block_size,
        "--random-share": request.random_share,
        "--no-ranking": not request.ranking,
        "--allow-ends": request.allow_ends,
        "--alpha": request.alpha,
        "--beta": request.beta,
        "--seed": request.seed,
        "--dtype": request.dtype,
        "the SHA-256 of the text's tokens": calibration.sha256,
    }


def _check_family(request: Request, config: Any) -> None:
    if config.model_type == "nvium":
        raise UserError(
            f"TARGET is {request.target!r}, an N-vium model, which chooses its own depth for every "
            "token: give a dense model."
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"TARGET is {request.target!r}, whose model_type is {config.model_type!r}, and masks "
            f"can be searched for {', '.join(FAMILIES)}."
        )
    if request.objective == "speed":
        _check_speed(request, config)
    if request.block_size > config.max_position_embeddings:
        raise UserError(
            f"--block-size is {request.block_size}, and TARGET has max_position_embeddings = "
            f"{config.max_position_embeddings}, which it must not exceed."
        )


def _check_speed(request: Request, config: Any) -> None:
    """What would stop the first engine, or keep it from drafting."""
    from vllm_nvium.checkpoints.mask_search.search import WINDOW

    if request.block_size + WINDOW > config.max_position_embeddings:
        raise UserError(
            f"--block-size is {request.block_size}, and with a window of {WINDOW} tokens it must "
            f"not exceed TARGET's max_position_embeddings = {config.max_position_embeddings}."
        )
    if request.drafter is None:
        return
    drafter = load_config(request.drafter, "--drafter")
    if getattr(drafter, "vocab_size", None) != config.vocab_size:
        raise UserError(
            f"--drafter is {request.drafter!r}, whose vocabulary has "
            f"{getattr(drafter, 'vocab_size', None)} tokens and TARGET's {config.vocab_size}; give "
            "a draft model of the same vocabulary."
        )


def _load_text(request: Request, config: Any) -> "torch.Tensor":
    """`[B, T]` int64."""
    from transformers import AutoTokenizer

    from vllm_nvium.checkpoints.mask_search.search import most_tokens
    from vllm_nvium.checkpoints.text import check_tokenizer, load_blocks

    most = most_tokens(config.vocab_size)
    if request.objective == "divergence" and request.tokens > most:
        raise UserError(
            f"--tokens is {request.tokens}, and the target's predictions over its "
            f"{config.vocab_size} tokens are kept in memory for at most {most}: give fewer, or use "
            "--objective agreement."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.target)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"TARGET is {request.target!r}, whose tokenizer cannot be read ({first_line(error)})."
        ) from error
    check_tokenizer(tokenizer, config.vocab_size)
    found = load_blocks(
        request.data,
        tokenizer,
        request.block_size,
        max_tokens=request.tokens,
        seed=0,  # another seed tries other masks, but on the same text
    )
    return found[:]["input_ids"]


def _scorer(request: Request, config: Any, blocks: "torch.Tensor") -> "Score":
    from vllm_nvium.checkpoints.mask_search.search import SpeedRun, TeacherForcing, measure_speed

    if request.objective != "speed":
        model = _load(request, config)
        with progress("Full model", 1, "pass") as bar:
            scorer = TeacherForcing(model, blocks, request.objective, request.alpha, request.beta)
            bar.update()
        return scorer
    half = request.block_size // 2
    speed_run = SpeedRun(
        target=request.target,
        drafter=request.drafter,
        prompts=blocks[:, :half].tolist(),
        new_tokens=request.block_size - half,
        dtype=request.dtype,
    )
    return lambda skipped: measure_speed(speed_run, skipped)


def _load(request: Request, config: Any) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = request.target
    # The other kinds of attention of transformers leave out the cap on Gemma 2's attention logits,
    # which vLLM does not.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    attention = {"attn_implementation": "eager"} if capped else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, request.dtype), output_loading_info=True, **attention
        )
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"TARGET is {name!r}, which does not fit into memory in --dtype {request.dtype}: use "
            "--dtype bfloat16, or leave CUDA_VISIBLE_DEVICES empty."
        ) from error
    except (
        ValueError, OSError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError
    ) as error:  # fmt: skip
        raise UserError(
            f"TARGET is {name!r}, whose weights cannot be loaded ({first_line(error)})."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"TARGET is {name!r}, which has no tensor {missing[0]}, and a whole checkpoint is "
            "needed."
        )
    return model


# ---- what comes out


def _mask_file(
    request: Request,
    identity: ModelIdentity,
    calibration: Calibration,
    trials: "Sequence[Trial]",
    best: "Trial",
) -> MaskFile:
    import optuna
    import torch
    import transformers

    from vllm_nvium.version import __version__
    from vllm_nvium.weights import fingerprint

    is_divergence = request.objective == "divergence"
    return MaskFile.model_validate(
        {
            "model": request.target,
            "identity": identity,
            # Again: a model of the hub may have been downloaded meanwhile.
            "weights": fingerprint(request.target, identity.num_hidden_layers),
            "num_layers": identity.num_hidden_layers,
            "skipped": best.skipped,
            "skip_ratio": request.skip_ratio,
            "objective": request.objective,
            "alpha": request.alpha if is_divergence else None,
            "beta": request.beta if is_divergence else None,
            "drafter": request.drafter,
            "calibration": calibration,
            "seed": request.seed,
            "trials": len(trials),
            "random_share": request.random_share,
            "ends_allowed": request.allow_ends,
            "ranked": request.ranking,
            "dtype": request.dtype,
            "score": best.score,
            "even_score": trials[0].score,
            "made_with": {
                "vllm_nvium": __version__,
                "optuna": optuna.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )


def print_report(request: Request, trials: "Sequence[Trial]", best: "Trial") -> None:
    """A table on standard output: the best mask, and what it is compared with."""
    units = {"divergence": "nats", "agreement": "agree", "speed": "tokens/s"}
    rows = [("mask", units[request.objective], "layers skipped")]
    rows.append(("best", _short(best.score), layer_list(best.skipped)))
    for trial in trials:
        if trial.source in ("even", "ranking"):
            rows.append((trial.source, _short(trial.score), layer_list(trial.skipped)))
    drawn = sorted(trial.score for trial in trials if trial.source == "random")
    if drawn:
        rows.append(("random", _short(drawn[len(drawn) // 2]), f"median of {len(drawn)}"))
    say("", f"{request.target}: {len(trials)} masks, the best from {best.source!r}")
    say("less is better" if not request.maximise else "more is better", "")
    table(rows)
    say("")


def draw(path: Path, trials: "Sequence[Trial]", objective: str) -> None:
    """Write a PNG: the score of every mask in the order of the trials, and the best so far.

    Args:
        path: file to write, whatever its name ends in.
        trials: at least one.
    """
    # A figure made without pyplot is drawn by Agg and leaves the caller's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for source, colour in COLOURS.items():
        places = [i for i, trial in enumerate(trials, start=1) if trial.source == source]
        if places:
            scores = [trials[i - 1].score for i in places]
            ax.scatter(places, scores, color=colour, s=22, label=source, zorder=2)
    ax.step(
        range(1, len(trials) + 1),
        best_so_far([trial.score for trial in trials], max if objective != "divergence" else min),
        where="post",
        color="0.6",
        linewidth=1,
        label="best so far",
        zorder=1,
    )
    names = {
        "divergence": "divergence from the full model (nats per prefix)",
        "agreement": "share of prefixes with the full model's top token",
        "speed": "speed (tokens per second)",
    }
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("trial")
    ax.set_ylabel(names[objective])
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def best_so_far(scores: Sequence[float], better: Callable[[float, float], float]) -> list[float]:
    """The best of each score and those before it; `better` is `min` or `max`."""
    found: list[float] = []
    for score in scores:
        found.append(better(found[-1], score) if found else score)
    return found


def _short(score: float) -> str:
    return f"{score:.4g}"
