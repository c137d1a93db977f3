# SPDX-License-Identifier: Apache-2.0
"""The random draw at an exit, as a pure function of (request seed, position, exit).

Nothing here has state, so a draw does not depend on what else is in the batch, on preemption and
recomputation, or on which model runner is used. The generator is SplitMix64 (Steele, Lea, Flood,
OOPSLA 2014) applied to a counter; host integers only, because who leaves must be known on the host.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# The float64 before 1.
_LARGEST = 1.0 - 2.0**-53
_U30, _U27, _U31, _U11 = (np.uint64(s) for s in (30, 27, 31, 11))


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 whose output bits are well mixed."""
    z = (z ^ (z >> _U30)) * _MIX_1
    z = (z ^ (z >> _U27)) * _MIX_2
    return z ^ (z >> _U31)


def uniform_draws(seeds: np.ndarray, positions: np.ndarray, num_exits: int) -> np.ndarray:
    """Uniform draws in (0, 1), one per row and exit.

    Args:
        seeds: [R] uint64, one per request.
        positions: [R] integer, position of the token whose head is drawn.
        num_exits: number of early exits, N - 1.

    Returns:
        [R, num_exits] float64; never exactly 0 or 1, so that hazards of exactly 0 and 1 hold.
    """
    with np.errstate(over="ignore"):
        counters = positions.astype(np.uint64)[:, None] * np.uint64(num_exits + 1)
        counters = counters + np.arange(1, num_exits + 1, dtype=np.uint64)
        bits = _mix(_mix(seeds.astype(np.uint64))[:, None] + counters * _GOLDEN)
    draws = ((bits >> _U11).astype(np.float64) + 0.5) * 2.0**-53
    return np.minimum(draws, _LARGEST)  # the largest of 2^53 draws rounds to 1


def margin_thresholds(seeds: np.ndarray, positions: np.ndarray, num_exits: int) -> np.ndarray:
    """What the margin `e_k - c_k` must exceed for a token to leave at exit k.

    Leaving with probability `p_k = sigmoid(e_k - c_k)` means `u < p_k` for a uniform u, that is
    `e_k - c_k > logit(u)` (arXiv:2605.13190, the hazard of exit k). Comparing margins saves the
    sigmoid and keeps hazards of 0 and 1 exact.

    Returns:
        [R, num_exits] float64, finite.
    """
    u = uniform_draws(seeds, positions, num_exits)
    return np.log(u) - np.log1p(-u)


def request_seed(seed: int | None, name: str, engine_seed: int) -> int:
    """The 64-bit seed of a request's exit draws.

    A request that names a seed uses it alone, so that it reproduces whatever its id and whatever
    else is running; one that does not gets its own stream from its name and the engine's seed, the
    same on every tensor-parallel rank.

    Args:
        name: what tells the request from all others of its engine.
    """
    text = f"seed:{seed}" if seed is not None else f"id:{engine_seed}:{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
