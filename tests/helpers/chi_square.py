# SPDX-License-Identifier: Apache-2.0
"""Whether counts come from a law."""

import numpy as np
from scipy import stats

SIGNIFICANCE = 1e-3


def chi_square(observed: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """p-value over groups of counts, each group given its own total; rare bins are pooled."""
    seen, due, groups = [], [], 0
    for counts, probabilities in zip(observed, expected, strict=True):
        mean = counts.sum() * probabilities / probabilities.sum()
        order = np.argsort(mean)
        # Together: all with fewer than five expected, and as many as it takes to expect five.
        enough = int(np.searchsorted(np.cumsum(mean[order]), 5.0)) + 1
        pooled = max(enough, int((mean < 5.0).sum()))
        starts = np.r_[0, pooled : len(mean)]
        due_here = np.add.reduceat(mean[order], starts)
        if len(due_here) > 1:
            seen.append(np.add.reduceat(counts[order], starts))
            due.append(due_here)
            groups += 1
    if not groups:
        return 1.0
    return stats.chisquare(np.concatenate(seen), np.concatenate(due), ddof=groups - 1).pvalue
