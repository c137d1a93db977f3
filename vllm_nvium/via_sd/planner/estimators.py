# SPDX-License-Identifier: Apache-2.0
"""Estimators of one quantity each: the time of one kind of pass, or one rate. Outliers must not
change them, lasting changes must.
"""

from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

from vllm_nvium.via_sd.planner.model import PassTimeCurve

# Trials in the long and in the short memory of a rate. The long one is dropped if the two differ by
# more than `SURPRISE` standard deviations.
LONG_MEMORY, SHORT_MEMORY, SURPRISE = 2000.0, 50.0, 3.0
# Samples from which a median is used.
MIN_SAMPLES = 5


class PassTimeEstimator:
    """Seconds of one kind of pass by its size. Medians, so that a few slow passes change nothing.

    Args:
        keep: newest samples of a bucket of sizes that are used.
        memory: a bucket without a sample for this many steps is dropped, once there are newer ones
            in others, or the present step is given.
        average: of the samples of a bucket.
    """

    def __init__(
        self,
        keep: int = 15,
        memory: int = 2000,
        average: Callable[[Sequence[float]], float] = median_low,
    ) -> None:
        self.keep, self.memory, self.average = keep, memory, average
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._last_step: dict[int, int] = {}

    def observe(self, size: int, seconds: float, step: int) -> None:
        """A pass of this size in step number `step`."""
        bucket = _bucket(size)
        if bucket not in self._samples:
            self._samples[bucket] = deque(maxlen=self.keep)
        elif step - self._last_step[bucket] > self.memory:
            self._samples[bucket].clear()
        self._samples[bucket].append((size, seconds))
        self._last_step[bucket] = step

    def points(self, now: int = 0) -> list[tuple[float, float]]:
        """Sizes and seconds, neither of which ever falls; empty before the first pass.

        Args:
            now: the present step.
        """
        newest = max([now, *self._last_step.values()])
        for bucket in [b for b, step in self._last_step.items() if newest - step > self.memory]:
            del self._last_step[bucket], self._samples[bucket]
        groups = [list(group) for _, group in sorted(self._samples.items())]
        if groups:
            groups = [g for g in groups if len(g) >= MIN_SAMPLES] or [sum(groups, [])]
        found: list[tuple[int, float, float]] = []  # number of samples, size, seconds
        for group in groups:
            sizes, times = zip(*group, strict=True)
            # Both by the same average: the median time belongs to the median size.
            count, size, seconds = len(group), float(self.average(sizes)), self.average(times)
            # Larger passes that seem faster than smaller ones are merged with them.
            while found and seconds < found[-1][2]:
                other = found.pop()
                total = count + other[0]
                size = (size * count + other[1] * other[0]) / total
                seconds = (seconds * count + other[2] * other[0]) / total
                count = total
            found.append((count, size, seconds))
        return [(size, seconds) for _, size, seconds in found]

    def curve(self) -> PassTimeCurve | None:
        """None before the first pass."""
        points = self.points()
        return PassTimeCurve(*zip(*points, strict=True)) if points else None


def _bucket(size: int) -> int:
    """Sizes with the same three leading bits share a median. Sizes that differ more must not: where
    half of the samples have one size and half another, the median is right for neither."""
    shift = max(size.bit_length() - 3, 0)
    return size >> shift << shift


@dataclass(slots=True)
class RateEstimate:
    """A probability per trial, from counts that fade: a long memory, and a short one that replaces
    it when the two no longer fit the same probability."""

    successes: float = 0.0
    trials: float = 0.0
    recent_successes: float = 0.0
    recent_trials: float = 0.0

    def observe(self, successes: float, failures: float) -> None:
        """A check of drafts stops at its first failure. It has one failure at most, and drafts
        behind it were not tried."""
        count = successes + failures
        keep = max(1 - count / LONG_MEMORY, 0.0)
        self.successes = self.successes * keep + successes
        self.trials = self.trials * keep + count
        keep = max(1 - count / SHORT_MEMORY, 0.0)
        self.recent_successes = self.recent_successes * keep + successes
        self.recent_trials = self.recent_trials * keep + count
        # p of the older trials; the recent successes have variance m p (1 - p) (1 + m / older).
        older = max(self.trials - self.recent_trials, 0.0) + 2
        p = min(max((self.successes - self.recent_successes + 1) / older, 0.01), 0.99)
        deviation = self.recent_successes - p * self.recent_trials
        variance = p * (1 - p) * self.recent_trials * (1 + self.recent_trials / older)
        if deviation * deviation > SURPRISE**2 * variance:
            self.successes, self.trials = self.recent_successes, self.recent_trials

    def fade(self, keep: float) -> None:
        """Makes future trials count for more."""
        self.successes, self.trials = self.successes * keep, self.trials * keep
        # With more of them than of all, the next trial would be a surprise.
        self.recent_successes, self.recent_trials = (
            self.recent_successes * keep,
            self.recent_trials * keep,
        )

    def estimate(self, prior: float, prior_trials: float) -> float:
        """(successes + prior * prior_trials) / (trials + prior_trials)"""
        return (self.successes + prior * prior_trials) / (self.trials + prior_trials)


class SurvivalByConfidence:
    """The probability that the full model keeps a token of a window, by how sure the slim verifier
    was of it: a rate for each range of its largest probability."""

    EDGES = (0.4, 0.6, 0.75, 0.85, 0.92, 0.96, 0.98, 0.99, 0.995, 0.999)
    # What is believed of a range before it was seen, the rate of all tokens, counts for so many.
    PRIOR_TRIALS = 8.0

    def __init__(self) -> None:
        self._rates = [RateEstimate() for _ in range(len(self.EDGES) + 1)]

    def observe(self, confidence: float, kept: bool) -> None:
        self._rates[bisect(self.EDGES, confidence)].observe(int(kept), int(not kept))

    def estimate(self, confidence: float, usual: float) -> float:
        """Given the rate of all tokens."""
        return self._rates[bisect(self.EDGES, confidence)].estimate(usual, self.PRIOR_TRIALS)


class WindowSurvival:
    """The probability that the full model keeps all tokens of a window that grows: only its newest
    ones are looked up.

    Args:
        survival: the probability for a request's tokens, by how sure the slim verifier was of each.
    """

    def __init__(self, survival: Callable[[str, Sequence[float]], float]) -> None:
        self._survival = survival
        # By request: tokens that were looked up, and their probability.
        self._known: dict[str, tuple[int, float]] = {}

    def __call__(self, request_id: str, confidences: Sequence[float]) -> float:
        """Of all tokens of the request's window, which has grown since the last call."""
        seen, survives = self._known.get(request_id, (0, 1.0))
        survives *= self._survival(request_id, confidences[seen:])
        self._known[request_id] = len(confidences), survives
        return survives
