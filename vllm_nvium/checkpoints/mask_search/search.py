# SPDX-License-Identifier: Apache-2.0
"""The search for the layers that a slim verifier skips: what a mask is worth, and which mask is
tried next. Formulas are small functions of plain tensors; every trial is written down at once, and
the next one depends on nothing but what is written, so a search that was stopped goes on as if it
had not been.

Notation: L layers, B blocks of T tokens, N = B T prefixes, V vocabulary, q the full model, q' the
slim verifier (q with some of its layers left out). Divergences are in nats per prefix.

Source: arXiv:2606.12243, the objective DIMR and its search, random and Bayesian by turns.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vllm_nvium.console import Progress
from vllm_nvium.errors import UserError
from vllm_nvium.files import write_atomically
from vllm_nvium.model_executor.via_sd import DEFAULT_WINDOW
from vllm_nvium.model_executor.via_sd.mask import even_layers, layer_list

# Skipped layers in ascending order -> what such a slim verifier is worth.
Score = Callable[[tuple[int, ...]], float]

# GiB of the engines that measure speed, unless the environment says something else.
CPU_KV_CACHE = "2"
# Of the full model's log-probabilities, which are kept in memory.
LARGEST_CACHE = 4 * 2**30
CACHE_DTYPE = torch.float16
# Rows of logits whose float32 log-probabilities are in memory at a time.
CHUNK = 128
# Trials before the first Bayesian draw, which needs something to learn from; half of the trials
# where they are few.
MOST_BEFORE_BAYES = 10
# Draws before a search that only proposes masks it knows is sent elsewhere.
ATTEMPTS = 16
# Rounds of slim checks in every window while speed is measured: with `auto` an engine would leave a
# tier that does not pay alone, and all masks would be as fast as plain decoding. Its windows, which
# are those of `--via-sd-window`; and timed runs, of which the median counts.
ROUNDS, WINDOW, TIMED_RUNS = 2, DEFAULT_WINDOW, 3
# Up to so many masks are listed rather than drawn.
MOST_LISTED = 10_000


# ---- formulas


def divergence(log_q: torch.Tensor, log_p: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """How much of p lies where q has less; the paper's R(q || p), at every prefix.

        R(q || p) = sum_v p(v) max(0, z1(v)) + sum_v q(v) max(0, z2(v))
        z1 = log(1 - alpha) + log p - log q,   z2 = log beta + log p - log q

    With alpha = 0 and beta = 1 it is 0 exactly where p = q; a larger alpha and a smaller beta
    forgive what p has too much of.

    Args:
        log_q: `[..., V]`, of the full model, finite.
        log_p: `[..., V]`, of the slim verifier, finite.
        alpha: in [0, 1).
        beta: at least 1 - alpha.

    Returns:
        `[...]`, nats.
    """
    ratio = log_p - log_q
    z1, z2 = ratio + math.log1p(-alpha), ratio + math.log(beta)
    return (log_p.exp() * z1.relu() + log_q.exp() * z2.relu()).sum(dim=-1)


def agreement(top_q: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Whether both models' most likely tokens are the same, at every prefix.

        1[ argmax_v q(v) = argmax_v q'(v) ]

    Args:
        top_q: `[...]` int64, `argmax_v q(v)`.
        top_p: `[...]` int64, `argmax_v q'(v)`.

    Returns:
        `[...]` float64, 0 or 1.
    """
    return (top_q == top_p).double()


# ---- scores by teacher forcing


class Skipped(nn.Module):
    """Stands where a skipped layer stood and returns what it is given. It keeps the place, because
    models look up a layer's attention window by its index."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`hidden_states` `[B, T, H]`, unchanged."""
        return hidden_states


@contextmanager
def without_layers(model: Any, skipped: Sequence[int]) -> Iterator[Any]:
    """Within the block, `model` is its slim verifier: same weights, some layers left out.

    Args:
        model: a decoder of `transformers` whose layers are the list `model.model.layers`.
        skipped: indices.
    """
    layers = model.model.layers
    model.model.layers = nn.ModuleList(
        Skipped() if index in skipped else layer for index, layer in enumerate(layers)
    )
    try:
        yield model
    finally:
        model.model.layers = layers


class TeacherForcing:
    """Scores masks on text: at every prefix the slim verifier's prediction is compared with the
    full model's, which is computed once.

    Args:
        model: see `without_layers`; in eval mode.
        blocks: `[B, T]` int64, token ids; every position of every block is a prefix.
        objective: `divergence` (the mean over prefixes, less is better) or `agreement` (the share
            of prefixes, more is better).
        alpha: see `divergence`.
        beta: see `divergence`.
    """

    def __init__(
        self,
        model: Any,
        blocks: torch.Tensor,
        objective: str,
        alpha: float = 0.0,
        beta: float = 1.0,
    ) -> None:
        self.model, self.blocks, self.objective = model, blocks, objective
        self.alpha, self.beta = alpha, beta
        self._full = [self._summary(logits) for logits in self._logits()]
        self(())  # refuses a model whose own predictions are not finite

    def __call__(self, skipped: tuple[int, ...]) -> float:
        """The score of a mask.

        Raises:
            UserError: the slim verifier's predictions are not finite.
        """
        total = 0.0
        with without_layers(self.model, skipped):
            for full, logits in zip(self._full, self._logits(), strict=True):
                total += float(self._compare(full, logits).double().sum())
        if not math.isfinite(total):
            where = f"Without layers {layer_list(skipped)} " if skipped else ""
            raise UserError(
                f"{where}TARGET's predictions are not finite in {self.model.dtype}: use --dtype "
                "float32, or another checkpoint."
            )
        return total / self.blocks.numel()

    @torch.inference_mode()
    def _logits(self) -> Iterator[torch.Tensor]:
        for block in self.blocks:
            ids = block[None].to(self.model.device)
            yield self.model(input_ids=ids, use_cache=False).logits[0]  # [T, V]

    def _summary(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of the full model's predictions: `[T]` int64, or `[T, V]` float16."""
        if self.objective == "agreement":
            return logits.argmax(dim=-1)
        rows = [part.float().log_softmax(dim=-1).to(CACHE_DTYPE) for part in logits.split(CHUNK)]
        return torch.cat(rows).cpu()

    def _compare(self, full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.objective == "agreement":
            # The most likely of what is not finite would be token 0.
            same = agreement(full, logits.argmax(dim=-1))
            return torch.where(logits.isfinite().all(dim=-1), same, math.nan)
        parts = zip(full.split(CHUNK), logits.split(CHUNK), strict=True)
        return torch.cat(
            [
                divergence(
                    log_q.to(part.device).float(),
                    part.float().log_softmax(dim=-1),
                    self.alpha,
                    self.beta,
                )
                for log_q, part in parts
            ]
        )


def most_tokens(vocab_size: int) -> int:
    """How many prefixes the objective `divergence` can be computed on: what it keeps of the full
    model, `N V` numbers of 2 bytes, may take `LARGEST_CACHE`."""
    return LARGEST_CACHE // (vocab_size * CACHE_DTYPE.itemsize)


# ---- scores by measured speed


@dataclass(frozen=True)
class SpeedRun:
    """What is generated to measure a mask's speed; the engine has a process of its own.

    Attributes:
        target: checkpoint of the full model.
        drafter: checkpoint of the draft model; `None` for n-gram drafts.
        prompts: token ids.
        new_tokens: after each prompt, whatever they are (eos does not end a text).
        dtype: vLLM's `dtype`.
        drafts: tokens proposed at a time, the paper's gamma.
    """

    target: str
    drafter: str | None
    prompts: list[list[int]]
    new_tokens: int
    dtype: str
    drafts: int = 5


def measure_speed(run: SpeedRun, skipped: tuple[int, ...]) -> float:
    """Tokens per second that VIA-SD generates greedily with a mask, all prompts at once.

    Raises:
        UserError: the engine stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"run": asdict(run), "skipped": skipped}))
        child = subprocess.run(
            [sys.executable, "-m", __name__, str(request), str(answer)],
            # On a CPU vLLM would take most of the memory for a KV cache that a few texts leave
            # empty, and stop where other processes have some of it.
            env={"VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE} | os.environ,
            capture_output=True,
            text=True,
            errors="replace",
        )
        found = json.loads(answer.read_text()) if answer.is_file() else {}
        if "tokens_per_second" not in found:
            last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
            why = found.get("error") or last
            raise UserError(
                f"vLLM stopped with status {child.returncode} while the speed without layers "
                f"{layer_list(skipped)} was measured ({why.rstrip('.')})."
            )
        return float(found["tokens_per_second"])


def _generate(run: SpeedRun, skipped: Sequence[int]) -> float:
    """In the engine's process: new tokens per second, the median of some runs after one in which
    everything is compiled."""
    from vllm import LLM, SamplingParams

    drafter: dict[str, Any] = {"num_speculative_tokens": run.drafts}
    if run.drafter is None:
        drafter |= {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    else:
        drafter |= {"method": "draft_model", "model": run.drafter}
    options = {"mask": layer_list(skipped), "rounds": ROUNDS, "window": WINDOW}
    llm = LLM(
        run.target,
        dtype=run.dtype,
        # vLLM drafts nothing where a whole window would not fit.
        max_model_len=max(map(len, run.prompts)) + run.new_tokens + WINDOW,
        enable_prefix_caching=False,
        speculative_config=drafter,
        additional_config={"via_sd": True}
        | {f"via_sd_{name}": value for name, value in options.items()},
    )
    if not llm.llm_engine.vllm_config.parallel_config.worker_cls.startswith("vllm_nvium."):
        raise UserError("VLLM_PLUGINS leaves vllm-nvium out, and without it there is no VIA-SD")
    sampling = SamplingParams(temperature=0.0, max_tokens=run.new_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in run.prompts]
    llm.generate(prompts, sampling, use_tqdm=False)
    speeds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(speeds)


# ---- which mask is tried next


@dataclass(frozen=True)
class Space:
    """The masks that a search chooses from: all with `count` of the layers in `free` skipped.

    Attributes:
        num_layers: of the target.
        count: layers to skip.
        allow_ends: whether the first and the last layer may be skipped.
    """

    num_layers: int
    count: int
    allow_ends: bool = False

    @property
    def free(self) -> range:
        return range(self.num_layers) if self.allow_ends else range(1, self.num_layers - 1)

    @property
    def size(self) -> int:
        return math.comb(len(self.free), self.count)


@dataclass(frozen=True)
class Plan:
    """How a search goes.

    Attributes:
        trials: masks to score.
        seed: of everything that is drawn.
        random_share: of the trials after the first ones (see `propose`), drawn uniformly; the
            others come from Bayesian optimisation.
        ranking: first leave out every layer alone, and try the mask of those that cost least.
        maximise: whether a larger score is better.
    """

    trials: int
    seed: int = 0
    random_share: float = 0.5
    ranking: bool = True
    maximise: bool = False


@dataclass(frozen=True)
class Trial:
    """A mask that was scored.

    Attributes:
        source: `even`, `ranking`, `random` or `bayes`.
        skipped: layers in ascending order.
    """

    source: str
    skipped: tuple[int, ...]
    score: float


def search(
    space: Space, plan: Plan, score: Score, journal: "Journal", progress: Progress | None = None
) -> Trial:
    """Score masks until the journal holds `plan.trials` of them, or all that there are.

    Args:
        journal: what was scored already; what is scored is added to it.
        progress: told of every pass.

    Returns:
        the best trial, of equal ones the first.
    """
    if plan.ranking:
        for layer in space.free:
            if layer not in journal.alone:
                journal.add_alone(layer, score((layer,)))
                if progress is not None:
                    progress.update()
    while len(journal.trials) < min(plan.trials, space.size):
        source, skipped = propose(space, plan, journal.trials, journal.alone)
        journal.add(Trial(source, skipped, score(skipped)))
        if progress is not None:
            progress.update()
    return best_of(journal.trials, plan.maximise)


def best_of(trials: Sequence[Trial], maximise: bool) -> Trial:
    """The trial with the best score, of equal ones the first."""
    sign = -1.0 if maximise else 1.0
    return min(trials, key=lambda trial: sign * trial.score)


def propose(
    space: Space, plan: Plan, trials: Sequence[Trial], alone: Mapping[int, float]
) -> tuple[str, tuple[int, ...]]:
    """The next mask to score, never one that was scored already.

    First the even mask, then the ranked one, then uniform draws until half of the trials are done,
    or ten if that is less, then uniform draws and Bayesian ones by turns. The answer is a function
    of the arguments: every draw is seeded by the number of the trial.

    Args:
        trials: all so far, fewer than `space.size`.
        alone: score without each layer alone; empty if they are not ranked.

    Returns:
        where the mask comes from, and the mask.
    """
    seen = {trial.skipped for trial in trials}
    number = len(trials)
    if number == 0:
        return "even", even_layers(space.num_layers, space.count)
    if number == 1 and alone:
        ranked = ranked_layers(space, plan, alone)
        if ranked not in seen:
            return "ranking", ranked
    before = min(MOST_BEFORE_BAYES, plan.trials // 2)
    if number >= before and not _is_random_turn(number, plan.random_share):
        drawn = _draw_bayesian(space, plan, trials, seen)
        if drawn is not None:
            return "bayes", drawn
    return "random", _draw_uniform(space, random.Random(f"{plan.seed}/{number}"), seen)


def ranked_layers(space: Space, plan: Plan, alone: Mapping[int, float]) -> tuple[int, ...]:
    """The layers that cost least when they are left out alone."""
    sign = -1.0 if plan.maximise else 1.0
    ranked = sorted(space.free, key=lambda layer: (sign * alone[layer], layer))
    return tuple(sorted(ranked[: space.count]))


def _is_random_turn(number: int, share: float) -> bool:
    """Turns of one kind are spread evenly: of the first n trials `floor(n * share)` are random."""
    return math.floor((number + 1) * share) > math.floor(number * share)


def _draw_uniform(
    space: Space, draw: random.Random, seen: "set[tuple[int, ...]]"
) -> tuple[int, ...]:
    if space.size <= MOST_LISTED:
        return draw.choice([m for m in combinations(space.free, space.count) if m not in seen])
    # Far fewer were seen than there are, so this ends soon.
    while True:
        mask = tuple(sorted(draw.sample(space.free, space.count)))
        if mask not in seen:
            return mask


def _draw_bayesian(
    space: Space, plan: Plan, trials: Sequence[Trial], seen: "set[tuple[int, ...]]"
) -> tuple[int, ...] | None:
    """A draw of the tree-structured Parzen estimator; `None` when it only repeats itself.

    Each layer is a choice between two, modelled jointly: a draw changes a layer or two of a good
    mask. (One number per layer, of which the largest are skipped, does not work as well: many
    points are one mask then, and the estimator's kernels become too narrow to leave it.) The
    number of layers a draw skips is only about right, and layers are put back, or taken out, at
    random until it is.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    choices: dict[str, Any] = {
        str(layer): optuna.distributions.CategoricalDistribution((False, True))
        for layer in space.free
    }
    study = optuna.create_study(direction="maximize" if plan.maximise else "minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: int(name) in trial.skipped for name in choices},
                distributions=choices,
                value=trial.score,
            )
            for trial in trials
        ]
    )
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{plan.seed}/{len(trials)}/{attempt}")
        # A new sampler each time: the state of an old one is not in the journal. A liar would look
        # at the attempts that came to nothing.
        study.sampler = optuna.samplers.TPESampler(
            seed=draw.getrandbits(32), n_startup_trials=1, multivariate=True, constant_liar=False
        )
        wanted = study.ask(choices).params
        mask = _with_count({layer for layer in space.free if wanted[str(layer)]}, space, draw)
        if mask not in seen:
            return mask
    return None


def _with_count(layers: "set[int]", space: Space, draw: random.Random) -> tuple[int, ...]:
    """`layers` with as few changes as make them `space.count`."""
    kept = sorted(layers)
    if len(kept) > space.count:
        return tuple(sorted(draw.sample(kept, space.count)))
    others = [layer for layer in space.free if layer not in layers]
    return tuple(sorted(kept + draw.sample(others, space.count - len(kept))))


# ---- what was tried


@dataclass
class Journal:
    """The trials of a search, in a file of one JSON object a line; the first line says what the
    search was told.

    Attributes:
        path: `None` for a search that cannot be resumed.
        trials: in their order.
        alone: score without each layer alone.
    """

    path: Path | None = None
    trials: list[Trial] = field(default_factory=list)
    alone: dict[int, float] = field(default_factory=dict)

    @classmethod
    def create(cls, path: Path, told: Mapping[str, Any]) -> "Journal":
        """Begin a file.

        Raises:
            UserError: it cannot be written.
        """
        write_atomically(path, lambda beside: beside.write_text(_line({"told": told})))
        return cls(path)

    @classmethod
    def resume(
        cls, path: Path, told: Mapping[str, Any], unknown: Collection[str] = ()
    ) -> "Journal":
        """Go on with a file. A last line that was cut short is dropped.

        Args:
            told: what this search is told, by the name to use in messages.
            unknown: names whose value may not be known, then or now, which is no difference.

        Raises:
            UserError: it cannot be read, or belongs to a search that was told something else.
        """
        try:
            lines = path.read_text().splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from error
        whole = [line for line in lines if line.endswith("\n")]
        journal = cls(path)
        try:
            began = dict(json.loads(whole[0])["told"])
            for line in whole[1:]:
                journal._take(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path} is no record of a search: move it away, or give another -o."
            ) from error
        for name, value in json.loads(json.dumps(told)).items():
            if name in unknown and None in (value, began.get(name)):
                continue
            if began.get(name) != value:
                raise UserError(
                    f"{name} is {value!r}, and the search in {path} was begun with "
                    f"{began.get(name)!r}: use that, or another -o."
                )
        if len(whole) < len(lines):
            write_atomically(path, lambda beside: beside.write_text("".join(whole)))
        return journal

    def add(self, trial: Trial) -> None:
        """Take a trial up, in the file first."""
        self._write(asdict(trial))
        self.trials.append(trial)

    def add_alone(self, layer: int, score: float) -> None:
        """Take up what leaving out one layer alone costs."""
        self._write({"alone": layer, "score": score})
        self.alone[layer] = score

    def _take(self, row: Mapping[str, Any]) -> None:
        if "alone" in row:
            self.alone[row["alone"]] = row["score"]
        else:
            self.trials.append(Trial(row["source"], tuple(row["skipped"]), row["score"]))

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror or error})."
            ) from error


def _line(row: Mapping[str, Any]) -> str:
    # Python writes a float so that reading it gives the same float.
    return json.dumps(row) + "\n"


def main(argv: Sequence[str]) -> None:
    """The engine's process of `measure_speed`: a request's file, and where to write the answer."""
    # What stops the engine is known here, and not in yet another process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    given = json.loads(Path(argv[0]).read_text())
    answer: dict[str, Any]
    try:
        answer = {"tokens_per_second": _generate(SpeedRun(**given["run"]), given["skipped"])}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        answer = {"error": _one_line(error)}
    Path(argv[1]).write_text(json.dumps(answer))
    raise SystemExit("error" in answer)


def _one_line(error: Exception) -> str:
    """What an exception says; pydantic's say it in a list."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    main(sys.argv[1:])
