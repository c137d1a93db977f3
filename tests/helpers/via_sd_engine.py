# SPDX-License-Identifier: Apache-2.0
"""An engine with VIA-SD inside the test's process, driven step by step: what its windows were made
of is recorded, and its tokens, its KV cache and its drafts are held against transformers' models.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from trace_engine import TraceEngine, _public
from transformers import DynamicCache, PreTrainedModel
from vllm.triton_utils import dispatcher

from vllm_nvium.model_executor.ops.tiers import ACCEPT, ESCALATE, REGENERATE
from vllm_nvium.model_executor.via_sd.step import Window
from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.fixed import FixedRounds

# Two tokens whose logits are nearer than this cannot be told apart in float32.
TIE = 1e-4
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}  # fmt: skip
# Fields of `make_dense`, with sizes that all kinds of copies can take.
TARGET: dict[str, Any] = {
    "vocab_size": 64,
    "intermediate_size": 128,
    "bigrams": 0.7,
    "whisper": 0.2,
}


def _many_engines_in_one_process() -> None:
    """For each engine vLLM looks at every object of every module, and stumbles over one of
    llvmlite, which n-grams import: those modules are out of sight meanwhile."""
    rebind = dispatcher._rebind_kernels

    def rebind_out_of_sight(overrides: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if "llvmlite" in name}
        try:
            rebind(overrides)
        finally:
            sys.modules.update(hidden)

    dispatcher._rebind_kernels = rebind_out_of_sight


_many_engines_in_one_process()


@dataclass
class Asked:
    """One answer of the drafter.

    Attributes:
        prefix: all tokens of the request so far, the window's too.
        drafts: what it proposed behind them.
        round: 1 for the drafts that open a window.
        room: most drafts that any window of the call has room for.
    """

    prefix: list[int]
    drafts: list[int]
    round: int
    room: int


@dataclass
class Handed:
    """A window as the full model is to verify it.

    Attributes:
        request: its id in the trace.
        prefix: all tokens of the request before it.
        tokens, tiers: of the window; rounds: how many it has had.
    """

    request: str
    prefix: list[int]
    tokens: list[int]
    tiers: list[int]
    rounds: int
    is_paper: bool


class ViaSDEngine(TraceEngine):
    """A `TraceEngine` whose rounds can be changed while it runs.

    Args:
        drafter: `--speculative-config`, if one is named.
        via_sd: keys of `additional_config`, without the prefix.
    """

    def __init__(
        self, model: str, drafter: dict[str, Any] | None, via_sd: dict[str, Any], **overrides: Any
    ) -> None:
        options = {f"via_sd_{key}": value for key, value in via_sd.items()}
        super().__init__(
            model,
            speculative_config=drafter,
            additional_config={"via_sd": True, **options},
            **overrides,
        )
        self.asked: list[Asked] = []
        # Windows that were handed over, and rounds of each; what is called after every step.
        self.handed: list[Handed] = []
        self.window_rounds: list[int] = []
        self.after_step: Callable[[], None] | None = None
        self._record_windows()
        step = self.engine.step

        def step_and_look() -> Any:
            output = step()
            if self.after_step is not None:
                self.after_step()
            return output

        self.engine.step = step_and_look

    def _record_windows(self) -> None:
        runner = self.runner
        session, plain_drafts = runner.session, runner._plain_drafts
        draft_again, hand_over = session._draft_again, session.hand_over

        def tokens_of(row: int) -> list[int]:
            batch = runner.input_batch
            return batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]].tolist()

        def handed(window: Window) -> Handed:
            return Handed(
                _public(runner.input_batch.req_ids[window.request]),
                tokens_of(window.request),
                list(window.tokens),
                list(window.tiers),
                window.rounds,
                window.is_paper,
            )

        def record_plain() -> Any:
            drafts = plain_drafts()
            for row, tokens in enumerate(drafts):
                if not runner.discard_request_mask.np[row]:
                    self.asked.append(
                        Asked(tokens_of(row), list(tokens), 1, runner.session.options.window)
                    )
            return drafts

        def record_again(view: Any, windows: Any, going: list[int], *args: Any) -> Any:
            # One place is the slim verifier's own.
            room = max(windows[i].room for i in going) - 1
            drafts = draft_again(view, windows, going, *args)
            if drafts is None:
                return None
            for i, tokens in zip(going, drafts.tokens, strict=True):
                window = windows[i]
                prefix = tokens_of(window.request) + window.tokens
                self.asked.append(Asked(prefix, list(tokens), window.rounds + 1, room))
            return drafts

        def record_windows(request_ids: Any, windows: Any) -> None:
            hand_over(request_ids, windows)
            for window in windows:
                self.window_rounds.append(window.rounds)
                self.handed.append(handed(window))

        runner._plain_drafts = record_plain
        session._draft_again, session.hand_over = record_again, record_windows

    @property
    def blocks_in_use(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        # One is the null block.
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def set_rounds(self, drafts: int, rounds: int | str, window: int | None = None) -> None:
        """From the next step on, as if the engine had been started so."""
        runner = self.runner
        if window is not None:
            runner.session.options = replace(runner.session.options, window=window)
        if rounds == "auto":
            runner.session.planner = Planner(drafts, runner.session.options.window)
        else:
            runner.session.planner = FixedRounds(drafts, int(rounds))


# --- the reference --------------------------------------------------------------------------------


def logits_of(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] float32."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def check_greedy_tokens(model: PreTrainedModel, prefix: Sequence[int], new: Sequence[int]) -> None:
    """Every new token is what the model says after those before it."""
    if not new:
        return
    logits = logits_of(model, [*prefix, *new])[len(prefix) - 1 : -1]
    found = logits.gather(1, torch.tensor(list(new))[:, None]).squeeze(1)
    behind = logits.amax(dim=1) - found
    assert behind.max() < TIE, (
        f"token {int(behind.argmax())} of {list(new)} is {float(behind.max()):.3g} behind the "
        f"largest logit; greedy is {logits.argmax(dim=1).tolist()}"
    )


def check_papers_tokens(
    model: PreTrainedModel,
    skipped: Sequence[int],
    prompt: Sequence[int],
    new: Sequence[int],
    windows: Sequence[Handed],
    accept: float,
    escalate: float,
) -> list[int]:
    """Every new token is what the model says after those before it, or one that the paper's rule
    keeps without asking; and each tier of the request's windows is the one that the slim verifier
    gives under its thresholds.

    Returns:
        how many new tokens are of each tier of a window.
    """
    text, kinds = [*prompt, *new], [0, 0, 0]
    kept: set[int] = set()
    for window in windows:
        laws = slim_logits(model, skipped, window.prefix[:-1], [window.prefix[-1], *window.tokens])
        laws = laws.softmax(dim=-1)
        for place, (token, tier) in enumerate(zip(window.tokens, window.tiers, strict=True)):
            share = float(laws[place, token] / laws[place].max())
            least = {ACCEPT: accept, REGENERATE: 1.0, ESCALATE: 0.0}[tier]
            most = escalate if tier == ESCALATE else 1.0
            assert window.is_paper and least - TIE <= share <= most + TIE, (window, place, share)
            length = len(window.prefix) + place + 1
            if text[:length] == window.prefix + window.tokens[: place + 1]:
                kinds[tier] += 1
                if tier != ESCALATE:
                    kept.add(length - 1)
    logits = logits_of(model, text)
    for place in range(len(prompt), len(text)):
        behind = float(logits[place - 1].max() - logits[place - 1, text[place]])
        assert place in kept or behind < TIE, f"token {place} is {behind} behind, and in no window"
    return kinds


@lru_cache(maxsize=4)
def without_layers(model: PreTrainedModel, skipped: tuple[int, ...]) -> PreTrainedModel:
    """A copy of the model without some layers: what the slim verifier computes."""
    slim = copy.deepcopy(model)
    layers = [layer for i, layer in enumerate(slim.model.layers) if i not in skipped]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    slim.model.layers = nn.ModuleList(layers)
    slim.config.num_hidden_layers = slim.model.config.num_hidden_layers = len(layers)
    return slim


def slim_logits(
    model: PreTrainedModel,
    skipped: Sequence[int],
    verified: Sequence[int],
    window: Sequence[int],
    slim: PreTrainedModel | None = None,
) -> torch.Tensor:
    """[W, V] of the slim verifier on the tokens of a window, which read what the full model wrote
    for the verified ones.

    Args:
        slim: the slim verifier, if it is not just the model without some layers.
    """
    return slim_logits_of_all(model, skipped, [verified], [window], slim)[0]


def slim_logits_of_all(
    model: PreTrainedModel,
    skipped: Sequence[int],
    verified: Sequence[Sequence[int]],
    windows: Sequence[Sequence[int]],
    slim: PreTrainedModel | None = None,
) -> torch.Tensor:
    """[P, W, V]: `slim_logits` of windows of one length behind texts of one length."""
    slim = slim or without_layers(model, tuple(skipped))
    cache = DynamicCache()
    with torch.no_grad():
        texts = torch.tensor([list(text) for text in verified])
        full = model(texts, use_cache=True).past_key_values
        kept = [i for i in range(model.config.num_hidden_layers) if i not in skipped]
        for new, old in enumerate(kept):
            cache.update(full.layers[old].keys, full.layers[old].values, new)
        tokens = torch.tensor([list(window) for window in windows])
        return slim(tokens, past_key_values=cache, use_cache=True).logits.float()


def looked_up(tokens: Sequence[int], count: int, longest: int) -> list[int]:
    """What n-grams draft: what follows the first occurrence of the longest suffix that has one."""
    tokens = list(tokens)
    for length in range(longest, 0, -1):
        suffix = tokens[-length:]
        for start in range(len(tokens) - length):
            if tokens[start : start + length] == suffix:
                return tokens[start + length : start + length + count]
    return []


# --- the KV cache ---------------------------------------------------------------------------------


def check_kv_cache(engine: ViaSDEngine, reference: PreTrainedModel, tolerance: float = 1e-4) -> int:
    """The K/V of all computed positions of all running requests are the reference's.

    Returns:
        how many positions were compared.
    """
    compared = 0
    for request in engine.scheduler.running:
        if request.num_computed_tokens:
            compared += _check_request(engine, reference, request, tolerance)
    return compared


def _check_request(
    engine: ViaSDEngine, reference: PreTrainedModel, request: Any, tolerance: float
) -> int:
    runner, compared = engine.runner, 0
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    count = request.num_computed_tokens
    with torch.no_grad():
        tokens = torch.tensor([list(request.all_token_ids)[:count]])
        # A cache made without a config keeps what has left a sliding window.
        cache = reference(tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
    for group, manager in zip(runner.kv_cache_config.kv_cache_groups, managers, strict=True):
        size = group.kv_cache_spec.block_size
        blocks = manager.req_to_blocks[request.request_id]
        # Blocks that have left a sliding window are null.
        alive = [p for p in range(count) if not blocks[p // size].is_null]
        slots = torch.tensor([blocks[p // size].block_id * size + p % size for p in alive])
        for name in group.layer_names:
            if not name.startswith("model.layers."):
                continue  # a draft model's
            layer = cache.layers[int(name.split(".")[2])]
            keys, values = (kv[0].transpose(0, 1)[alive] for kv in (layer.keys, layer.values))
            worst, position = _difference(runner, name, keys, values, slots)
            assert worst < tolerance, (
                f"{request.request_id}, {name}: position {alive[position]} of {count} differs by "
                f"{worst}"
            )
        compared += len(alive)
    return compared


def _difference(
    runner: Any, name: str, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> tuple[float, int]:
    """The largest difference between the cache of a layer and K/V [P, kv_heads, head_dim] at some
    slots, and where it is. Attention's own kernel lays the latter out as it does the former."""
    layer = runner.compilation_config.static_forward_context[name]
    cache = layer.kv_cache
    used, blocks = (slots // cache.shape[2]).unique(return_inverse=True)
    slots = blocks * cache.shape[2] + slots % cache.shape[2]
    due, place = (torch.zeros_like(cache[: len(used)]) for _ in range(2))
    numbers = torch.arange(1.0, len(slots) + 1)[:, None, None].expand_as(keys).contiguous()
    update = layer.impl.do_kv_cache_update
    update(layer, keys.contiguous(), values.contiguous(), due, slots)
    update(layer, numbers, numbers, place, slots)
    assert int((place > 0).sum()) == 2 * keys.numel()
    difference = ((cache[used] - due).abs() * (place > 0)).flatten()
    worst = int(difference.argmax())
    return float(difference[worst]), int(place.flatten()[worst]) - 1
