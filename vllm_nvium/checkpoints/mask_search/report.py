# SPDX-License-Identifier: Apache-2.0
"""What a search for a mask leaves: the mask's file, a table on standard output, a picture."""

import warnings
from pathlib import Path

import matplotlib
import optuna
import torch
import transformers
from optuna.study import Study
from optuna.trial import FrozenTrial

from vllm_nvium.checkpoints.mask_search.request import SearchRequest
from vllm_nvium.checkpoints.mask_search.search import mask_of, score_of, scored_masks
from vllm_nvium.console import say, table
from vllm_nvium.model_executor.via_sd.mask import Calibration, MaskFile, ModelIdentity, layer_list
from vllm_nvium.version import __version__
from vllm_nvium.weights import fingerprint

UNITS = {"divergence": "nats", "agreement": "agree", "speed": "tokens/s"}
AXES = {
    "divergence": "divergence from the full model (nats per prefix)",
    "agreement": "share of prefixes with the full model's top token",
    "speed": "speed (tokens per second)",
}
# Fields of the mask file that are flags of the command.
FLAGS = {"skip_ratio", "objective", "drafter", "seed", "random_share", "dtype"}


def make_mask_file(
    request: SearchRequest, identity: ModelIdentity, calibration: Calibration, study: Study
) -> MaskFile:
    """The best mask of a study and how it was found.

    Args:
        identity: the target's.
        calibration: the text that the masks were scored on.
    """
    best, is_divergence = study.best_trial, request.objective == "divergence"
    return MaskFile.model_validate(
        request.model_dump(include=FLAGS)
        | {
            "model": request.target,
            "identity": identity,
            # Computed again: a model of the hub may have been downloaded meanwhile.
            "weights": fingerprint(request.target, identity.num_hidden_layers),
            "num_layers": identity.num_hidden_layers,
            "skipped": mask_of(best),
            "alpha": request.alpha if is_divergence else None,
            "beta": request.beta if is_divergence else None,
            "calibration": calibration,
            "trials": len(scored_masks(study)),
            "ends_allowed": request.allow_ends,
            "ranked": request.ranking,
            "score": score_of(best),
            "even_score": score_of(_by_source(study, "even")[0]),
            "made_with": {
                "vllm_nvium": __version__,
                "optuna": optuna.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )


def print_report(request: SearchRequest, study: Study) -> None:
    """A table on standard output: the best mask, and what it is compared with."""
    best = study.best_trial
    rows = [("mask", UNITS[request.objective], "layers skipped")]
    shown = [("best", best)]
    shown += [(name, t) for name in ("even", "ranking") for t in _by_source(study, name)]
    rows += [(name, f"{score_of(t):.4g}", layer_list(mask_of(t))) for name, t in shown]
    if drawn := sorted(score_of(t) for t in _by_source(study, "random")):
        rows.append(("random", f"{drawn[len(drawn) // 2]:.4g}", f"median of {len(drawn)}"))
    say(
        "",
        f"{request.target}: {len(scored_masks(study))} masks, the best from "
        f"{best.user_attrs['source']!r}",
        "more is better" if request.maximise else "less is better",
        "",
    )
    table(rows)
    say("")


def draw_history(path: Path, study: Study, objective: str) -> None:
    """Write a PNG: the score of every mask in the order of the trials, and the best so far.

    Args:
        path: file to write, whatever its name ends in.
        study: at least one mask has a score.
    """
    matplotlib.use("Agg")  # needs no screen, whatever MPLBACKEND says
    from matplotlib import pyplot

    # Optuna sets a style for the whole process, and warns that its pictures may change.
    with pyplot.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        plot = optuna.visualization.matplotlib.plot_optimization_history
        plot(study, target_name=AXES[objective])
        pyplot.savefig(path, format="png", dpi=150)
        pyplot.close()


def _by_source(study: Study, source: str) -> list[FrozenTrial]:
    """The trials of masks that come from `even`, `ranking`, `random` or `bayes`."""
    return [t for t in scored_masks(study).values() if t.user_attrs["source"] == source]
