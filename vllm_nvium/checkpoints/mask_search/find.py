# SPDX-License-Identifier: Apache-2.0
"""A whole search for a mask: what it reads, the study, what it leaves."""

import hashlib
from typing import Any

import optuna

from vllm_nvium.checkpoints.mask_search.report import draw_history, make_mask_file, print_report
from vllm_nvium.checkpoints.mask_search.request import SearchRequest
from vllm_nvium.checkpoints.mask_search.search import (
    SearchSettings,
    begin_study,
    resume_study,
    scored_masks,
    scores_alone,
    scores_left,
    search,
)
from vllm_nvium.checkpoints.mask_search.target import load_target_config, load_text, make_score
from vllm_nvium.checkpoints.options import flag_of
from vllm_nvium.console import progress
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.via_sd.mask import (
    Calibration,
    MaskFile,
    ModelIdentity,
    skip_count,
    write_mask_file,
)
from vllm_nvium.weights import fingerprint

# How a message calls the fingerprint of the target's weights; `None` where it cannot be computed.
WEIGHTS = "the fingerprint of TARGET's weights"
# What may differ between a search and its continuation, and TARGET, which is no flag.
NOT_IN_THE_RECORD = {"target", "out", "trials", "resume"}


def find_mask(request: SearchRequest) -> MaskFile:
    """Search, and write mask, record and picture."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = load_target_config(request)
    identity = ModelIdentity.from_config(config)
    settings = _search_settings(request, identity.num_hidden_layers)
    blocks = load_text(request, config)
    calibration = Calibration(
        sources=tuple(request.data),
        prefixes=blocks.numel(),
        block_size=request.block_size,
        sha256=hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
    )
    recorded = _recorded_settings(request, identity, calibration)
    recorded[WEIGHTS] = fingerprint(request.target, settings.num_layers)
    # The record of another search is refused before the model is loaded, and a new record is begun
    # after it, so that a model that cannot be loaded leaves nothing behind.
    resumed = resume_study(request.record, recorded, (WEIGHTS,)) if request.resume else None
    score = make_score(request, blocks)
    study = resumed or begin_study(request.record, recorded, request.maximise)
    try:
        with progress("Searching", scores_left(study, settings), "mask") as bar:
            search(study, settings, score, bar)
    except BaseException:
        if not scored_masks(study) and not scores_alone(study):
            request.record.unlink(missing_ok=True)  # nothing to go on with
        raise
    mask = make_mask_file(request, identity, calibration, study)
    write_mask_file(request.out, mask)
    write_atomically(request.picture, lambda path: draw_history(path, study, request.objective))
    print_report(request, study)
    return mask


def _search_settings(request: SearchRequest, num_layers: int) -> SearchSettings:
    count = skip_count(request.skip_ratio, num_layers)
    # The even mask is where a search begins, and it keeps both ends.
    if not 1 <= count <= num_layers - 2:
        raise UserError(
            f"--skip-ratio is {request.skip_ratio}, which skips {count} of TARGET's {num_layers} "
            f"layers, and from 1 to {num_layers - 2} can be skipped."
        )
    return SearchSettings(
        num_layers,
        count,
        request.trials,
        allow_ends=request.allow_ends,
        seed=request.seed,
        random_share=request.random_share,
        ranking=request.ranking,
    )


def _recorded_settings(
    request: SearchRequest, identity: ModelIdentity, calibration: Calibration
) -> dict[str, Any]:
    """What a resumed search must agree with, by the name that a message gives it."""
    flags = request.model_dump(exclude=NOT_IN_THE_RECORD)
    return (
        {"TARGET": request.target, "TARGET's configuration": identity.model_dump()}
        | {flag_of(name): value for name, value in flags.items()}
        | {"the SHA-256 of the text's tokens": calibration.sha256}
    )
