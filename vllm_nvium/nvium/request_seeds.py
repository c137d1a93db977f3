# SPDX-License-Identifier: Apache-2.0
"""Which seed of exit draws every request of an engine gets: no two without a seed of their own
share one, and an offline run gives its requests the same ones again.
"""

import re

from vllm_nvium.model_executor.ops.draws import request_seed

# "7-1f0c9a2b", and with n > 1 "0_7-1f0c9a2b": a number, and the random characters that vLLM
# appends to every id it is given. No engine counts past 18 digits, and Python refuses to read
# thousands of them.
_NUMBERED = re.compile(r"(?:([0-9]{1,18})_)?([0-9]{1,18})-[0-9a-f]{8}")
# Far more than an engine runs and has preempted at a time; about 3 MB.
REMEMBERED = 1 << 14


class RequestSeeds:
    """Seeds by request id.

    Ids are unique by their random characters. Offline generation numbers its requests upwards, and
    there the characters have to be left out, or no run would repeat with its `--seed`. But whoever
    chooses ids himself may send "7" twice. So a number stands for itself only if it is higher than
    every one before it, which gives it to one request and needs no memory of those before. All
    other numbered requests are counted. The count repeats if requests come in the same order, as
    vLLM's own seeds of such requests do; it is the same on all tensor-parallel ranks, which are
    told of requests in one order.

    Model Runner V2 adds a preempted request again, without telling that it was preempted, so what
    was given is remembered by whole id. If so many others came meanwhile that it is forgotten, it
    goes on with fresh draws: no law depends on that.

    Args:
        engine_seed: what `engine_seed` gives.
    """

    def __init__(self, engine_seed: int) -> None:
        self._engine_seed = engine_seed
        self._highest = (-1, -1)
        self._counted = 0
        self._names: dict[str, str] = {}

    def seed_of(self, seed: int | None, request_id: str) -> int:
        """The seed of a request that is added, for the first time or again."""
        name = self._name(request_id) if seed is None else ""
        return request_seed(seed, name, self._engine_seed)

    def _name(self, request_id: str) -> str:
        """What tells a request from all others of this engine."""
        numbered = _NUMBERED.fullmatch(request_id)
        if numbered is None:
            return request_id
        if (known := self._names.get(request_id)) is not None:
            return known
        name = self._names[request_id] = self._new_name(int(numbered[2]), int(numbered[1] or -1))
        if len(self._names) > REMEMBERED:
            del self._names[next(iter(self._names))]
        return name

    def _new_name(self, number: int, child: int) -> str:
        if (number, child) > self._highest:
            self._highest = (number, child)
            return f"{number}.{child}"
        self._counted += 1
        return f"other {self._counted}"
