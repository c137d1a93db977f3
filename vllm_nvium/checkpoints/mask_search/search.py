# SPDX-License-Identifier: Apache-2.0
"""The search for the layers that a slim verifier skips: a study of Optuna in which every trial is a
mask, with one parameter per layer. The study lives in Optuna's journal file, from which a stopped
search is resumed.

Source: arXiv:2606.12243, whose search takes random and Bayesian trials by turns.
"""

import json
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.via_sd.mask import even_layers

# Skipped layers in ascending order.
Mask = tuple[int, ...]
# What a slim verifier without these layers is worth, finite.
Score = Callable[[Mask], float]

STUDY = "via-sd-mask"
# Names of the study's attributes: the settings that a resumed search must have, too, and the scores
# without each layer alone.
SETTINGS, ALONE = "settings", "score_without_layer"
# A Bayesian draw needs trials to learn from: so many, or half of all trials if that is less.
MOST_BEFORE_BAYES = 10
# After so many Bayesian draws of masks that have a score, a uniform draw takes their place.
ATTEMPTS = 16


@dataclass(frozen=True)
class SearchSettings:
    """Which masks are searched, and how.

    Attributes:
        num_layers: of the target.
        count: layers that every mask skips.
        trials: masks to score.
        allow_ends: whether the first and the last layer may be skipped.
        seed: of everything that is drawn.
        random_share: of the trials after the first ones (see `MaskSampler`), drawn uniformly.
        ranking: whether to first score every layer left out alone, and then try the mask of those
            that cost least.
    """

    num_layers: int
    count: int
    trials: int
    allow_ends: bool = False
    seed: int = 0
    random_share: float = 0.5
    ranking: bool = True

    @property
    def free(self) -> range:
        """The layers that may be skipped."""
        return range(self.num_layers) if self.allow_ends else range(1, self.num_layers - 1)

    @property
    def masks(self) -> int:
        """How many masks the search ends with: `trials`, or all that there are."""
        return min(self.trials, math.comb(len(self.free), self.count))


def search(
    study: Study, settings: SearchSettings, score: Score, progress: tqdm | None = None
) -> FrozenTrial:
    """Score masks until the study holds as many as it should.

    Args:
        study: holds what was scored already; new scores are added at once.
        progress: told of every score.

    Returns:
        the best trial, of equal ones the first.
    """
    tick = progress.update if progress is not None else lambda: None
    first = {"even": even_layers(settings.num_layers, settings.count)}
    if settings.ranking:
        for layer in settings.free:
            if layer not in scores_alone(study):
                found = scores_alone(study) | {layer: score((layer,))}
                study.set_user_attr(ALONE, {str(key): value for key, value in found.items()})
                tick()
        maximise = study.direction == StudyDirection.MAXIMIZE
        first["ranking"] = cheapest_layers(scores_alone(study), settings.count, maximise)
    # A resumed search gets another seed: the draws of the first one have been tried.
    seed = random.Random(f"{settings.seed}/{len(study.trials)}").getrandbits(32)
    study.sampler = sampler = MaskSampler(settings, seed)
    while len(known := scored_masks(study)) < settings.masks:
        due = next((name for name, mask in first.items() if mask not in known), None)
        if due is not None:
            study.enqueue_trial(sampler.parameters(first[due]))
        trial = study.ask(sampler.choices)
        mask = mask_of(trial)
        trial.set_user_attr("source", due or sampler.source)
        study.tell(trial, score_of(known[mask]) if mask in known else score(mask))
        tick()
    return study.best_trial


def scores_left(study: Study, settings: SearchSettings) -> int:
    """How many scores `search` still has to compute."""
    ranking = len(settings.free) - len(scores_alone(study)) if settings.ranking else 0
    return ranking + max(0, settings.masks - len(scored_masks(study)))


def scored_masks(study: Study) -> dict[Mask, FrozenTrial]:
    """The first trial of every mask that has a score, in the order of the trials."""
    found: dict[Mask, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        found.setdefault(mask_of(trial), trial)
    return found


def mask_of(trial: Trial | FrozenTrial) -> Mask:
    """The mask that a trial is about."""
    return tuple(sorted(int(name) for name, skipped in trial.params.items() if skipped))


def score_of(trial: FrozenTrial) -> float:
    """The score of a trial that has one."""
    assert trial.value is not None
    return trial.value


def scores_alone(study: Study) -> dict[int, float]:
    """The scores of slim verifiers that skip one layer, by that layer."""
    return {int(layer): value for layer, value in study.user_attrs.get(ALONE, {}).items()}


def cheapest_layers(alone: Mapping[int, float], count: int, maximise: bool) -> Mask:
    """The layers that cost least when they are left out alone.

    Args:
        alone: score without each layer.
        maximise: whether a larger score is better.
    """
    sign = -1.0 if maximise else 1.0
    ranked = sorted(alone, key=lambda layer: (sign * alone[layer], layer))
    return tuple(sorted(ranked[:count]))


# ---- which mask is tried next


class MaskSampler(optuna.samplers.TPESampler):
    """Proposes masks without a score yet: at first uniform draws, then uniform and Bayesian ones by
    turns.

    A Bayesian draw is one of the tree-structured Parzen estimator, which sees every layer as a
    choice between two and models all of them jointly: it changes a layer or two of a good mask.
    The number of layers that it skips is only about right, and random layers are put back, or
    taken out, until it is exact. (One number per layer, of which the largest are skipped, does not
    work as well: many points are then the same mask, and the kernels become too narrow to leave
    it.)

    Attributes:
        choices: the parameters of a trial, one per layer that may be skipped.
        source: of the last proposal, `random` or `bayes`.
    """

    def __init__(self, settings: SearchSettings, seed: int) -> None:
        # `constant_liar` is for several processes that try masks at the same time.
        super().__init__(multivariate=True, n_startup_trials=1, constant_liar=False, seed=seed)
        self.settings, self.random = settings, random.Random(seed)
        self.source = "random"
        self.choices: dict[str, BaseDistribution] = {
            str(layer): CategoricalDistribution((False, True)) for layer in settings.free
        }

    def parameters(self, mask: Collection[int]) -> dict[str, Any]:
        """The parameters of a trial of `mask`."""
        return {name: int(name) in mask for name in self.choices}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that `sample_relative` draws: all of them."""
        return self.choices

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw a mask that has no score."""
        known = scored_masks(study)
        if self._is_bayesian(len(known)):
            self.source = "bayes"
            for _ in range(ATTEMPTS):
                wanted = super().sample_relative(study, trial, search_space)
                mask = self._with_count([int(name) for name in wanted if wanted[name]])
                if mask not in known:
                    return self.parameters(mask)
        self.source = "random"
        while True:
            mask = self._with_count([])
            if mask not in known:
                return self.parameters(mask)

    def _is_bayesian(self, number: int) -> bool:
        """Whether the trial after `number` others is Bayesian. Turns are spread evenly: of the
        first n trials, `floor(n * share)` would be random."""
        share = self.settings.random_share
        is_random = math.floor((number + 1) * share) > math.floor(number * share)
        return number >= min(MOST_BEFORE_BAYES, self.settings.trials // 2) and not is_random

    def _with_count(self, layers: list[int]) -> Mask:
        """`layers` with as few random changes as give it the right length."""
        count = self.settings.count
        if len(layers) > count:
            return tuple(sorted(self.random.sample(layers, count)))
        others = [layer for layer in self.settings.free if layer not in layers]
        return tuple(sorted(layers + self.random.sample(others, count - len(layers))))


# ---- the record of a search


class _Journal(JournalFileBackend):
    """Optuna's journal file. What keeps it from being written is told in one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not the default lock, which is a symbolic link: some file systems have none.
        super().__init__(str(path), JournalFileOpenLock(str(path)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror or error})."
            ) from error


def begin_study(path: Path, settings: Mapping[str, Any], maximise: bool) -> Study:
    """A new study, in a file that is not there yet.

    Args:
        settings: what a resumed search must agree with, by the name to use in messages.
    """
    try:
        study = optuna.create_study(
            storage=JournalStorage(_Journal(path)),
            study_name=STUDY,
            direction="maximize" if maximise else "minimize",
        )
        study.set_user_attr(SETTINGS, dict(settings))
    except BaseException:
        path.unlink(missing_ok=True)  # half a record could not be resumed
        raise
    return study


def resume_study(path: Path, settings: Mapping[str, Any], may_lack: Collection[str] = ()) -> Study:
    """The study in a file. A last line that was cut short is dropped.

    Args:
        settings: see `begin_study`.
        may_lack: names whose value may be unknown (`None`), now or then, which is no difference.

    Raises:
        UserError: the file cannot be read, or belongs to a search with other settings.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    whole = content[: content.rfind(b"\n") + 1]
    try:
        for line in whole.splitlines():
            json.loads(line)  # Optuna would see a broken last line only after adding another
        study = optuna.load_study(study_name=STUDY, storage=JournalStorage(_Journal(path)))
        began = dict(study.user_attrs[SETTINGS])
        scored_masks(study), scores_alone(study)
    except Exception as error:  # noqa: BLE001 - Optuna checks nothing that it reads
        raise UserError(
            f"{path} is no record of a search: move it away, or give another -o."
        ) from error
    for name, value in json.loads(json.dumps(dict(settings))).items():
        if name in may_lack and None in (value, began.get(name)):
            continue
        if began.get(name) != value:
            raise UserError(
                f"{name} is {value!r}, and the search in {path} was begun with "
                f"{began.get(name)!r}: use that, or another -o."
            )
    if len(whole) < len(content):
        write_atomically(path, lambda beside: beside.write_bytes(whole))
    return study
