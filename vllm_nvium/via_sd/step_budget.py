# SPDX-License-Identifier: Apache-2.0
"""How many of a step's tokens may be drafts, and which request has how many of them."""

from collections.abc import Sequence


def room_for_drafts(
    budget: int, needs: Sequence[int], waiting: int, least: int, in_parts: bool
) -> int:
    """Tokens that the drafts of all requests may take together, so that every running request gets
    its next token in every step, as in plain decoding, and prompts go on.

    Prompts get half of what is left, if they need it: all of it would make those who decode wait
    for long prompts without a draft, and less would make a prompt wait for windows that do not
    bring a text forward by as many tokens as they have.

    Args:
        budget: tokens of the step.
        needs: [R] what each running request needs without drafts, in the order in which vLLM serves
            them: one token, or what is left of its prompt.
        waiting: tokens of prompts that have not begun and may begin.
        least: of a prompt's tokens, with fewer it does not go on.
        in_parts: whether a prompt may be computed in parts.
    """
    last = max((place for place, need in enumerate(needs) if need <= 1), default=-1)
    # A prompt that is served before somebody who decodes takes all that it needs.
    spare = budget - sum(needs[: last + 1])
    prompts = sum(needs[last + 1 :]) + waiting
    share = max((spare + 1) // 2, least) if in_parts else spare
    return max(spare - min(share, prompts), 0)


class Admission:
    """Whether room is kept for prompts that wait. Where it was kept and none began, they wait for
    something else, such as blocks of the KV cache: it is kept again once fewer requests run, and
    now and then."""

    EVERY = 32  # steps

    def __init__(self) -> None:
        self._steps = self._next = self._running = 0

    def is_open(self, running: int) -> bool:
        """Asked once per step, with the number of running requests."""
        self._steps += 1
        return self._steps >= self._next or running < self._running

    def observe(self, running: int, has_begun: bool) -> None:
        """What came of it in a step at whose end so many run: whether a prompt began, or nothing
        was left for one."""
        self._next = 0 if has_begun else self._steps + self.EVERY
        self._running = running


def fair_shares(wanted: Sequence[int], total: int) -> list[int]:
    """What each of several gets of a total: as much as wanted, and where that is too much, the same
    for all who want more. Of drafts the last are the least likely to be kept, so nothing else keeps
    more of them.

    Args:
        wanted: [R]; total: at least 0.
    """
    shares, left = [0] * len(wanted), total
    by_size = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, number in enumerate(by_size):
        shares[number] = min(wanted[number], left // (len(wanted) - place))
        left -= shares[number]
    return shares
