# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of catch-up on plain host arrays: ragged ranges of positions, the cache slots
they live in, and the frontier of every sequence.

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


def frontiers(
    marks: np.ndarray, complete: np.ndarray, first: np.ndarray, query_start: np.ndarray, level: int
) -> np.ndarray:
    """First position of every sequence that has not been through segment `level`.

    Depth marks never rise along a sequence, so the frontier is the number of leading positions
    whose mark exceeds `level`; the leading `complete_s` are known to be through every segment, and
    positions from `first_s` on are already rows of the present pass.

    Args:
        marks: [M] uint8, marks of the positions [complete_s, first_s) of all sequences, in order.
        complete, first: [S] int64, complete_s <= first_s.
        query_start: [S + 1] int, where each sequence's marks start.
        level: segments a position must have been through more than.

    Returns:
        [S] int64, complete_s <= frontier_s <= first_s.
    """
    through = np.zeros(len(marks) + 1, dtype=np.int64)
    np.cumsum(marks > level, out=through[1:])
    return complete + through[query_start[1:]] - through[query_start[:-1]]
