# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of catch-up on plain host arrays: ragged ranges of positions, the cache slots
they live in, and how rows are split into passes and products.

These run between two segments of one engine step, so each is a handful of vector operations and
none loops over positions or sequences.
"""

import numpy as np


def ragged_ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenates the inclusive ranges [first_s, last_s].

    Args:
        first, last: [S] int64, first_s <= last_s.

    Returns:
        sequence: [T] int64, which range a row belongs to.
        positions: [T] int64.
        query_start: [S + 1] int32, where each range starts among the rows.
    """
    lengths = last - first + 1
    query_start = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(query_start[-1], dtype=np.int64) + (first - query_start[:-1])[sequence]
    return sequence, positions, query_start


def slots_of(
    block_table: np.ndarray, sequence: np.ndarray, positions: np.ndarray, block_size: int
) -> np.ndarray:
    """Cache slots of positions: `block_table[s, pos // B] * B + pos % B`.

    Args:
        block_table: [R, blocks] int32, physical block of every logical block.
        sequence: [T] int64, row of the block table; positions: [T] int64.

    Returns:
        [T] int64.
    """
    block, offset = np.divmod(positions, block_size)
    return block_table[sequence, block].astype(np.int64) * block_size + offset


def range_starts(sequence: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where ranges of consecutive positions of one sequence begin among rows.

    Args:
        sequence, positions: [T] int64, ascending by sequence and then by position, T >= 1.

    Returns:
        [Q] int64, the first of them 0.
    """
    follows = (sequence[1:] == sequence[:-1]) & (positions[1:] == positions[:-1] + 1)
    return np.concatenate(([0], np.flatnonzero(~follows) + 1))


def stretches(values: np.ndarray, longest: int) -> list[slice]:
    """Where values stay the same: slices of [T], of at most `longest` rows each.

    Args:
        values: [T] int64, equal ones beside each other.
    """
    ends = np.append(np.flatnonzero(np.diff(values)) + 1, len(values)).tolist()
    return [
        slice(start, min(start + longest, end))
        for begin, end in zip([0, *ends], ends, strict=False)
        for start in range(begin, end, longest)
    ]


def passes_of(
    sequence: np.ndarray, positions: np.ndarray, max_rows: int, max_ranges: int
) -> list[np.ndarray]:
    """Splits rows that are too many for one pass, so that none runs before what it attends to.

    A row attends to lower positions only, in blocks that any sequence may own. So rows go by
    position, whatever sequence they belong to.

    Args:
        sequence, positions: [T] int64, each pair once.
        max_rows, max_ranges: most rows, and ranges of consecutive positions, of one pass; >= 1.

    Returns:
        for every pass the indices of its rows, ascending by sequence and then by position.
    """
    by_position = np.lexsort((sequence, positions))
    passes, start = [], 0
    while start < len(by_position):
        count = max_rows
        while True:
            chosen = by_position[start : start + count]
            chosen = chosen[np.lexsort((positions[chosen], sequence[chosen]))]
            num_ranges = len(range_starts(sequence[chosen], positions[chosen]))
            if num_ranges <= max_ranges:
                break
            # So many rows have no more ranges than that.
            count = max(len(chosen) // 2, min(max_ranges, max_rows))
        passes.append(chosen)
        start += len(chosen)
    return passes
