# SPDX-License-Identifier: Apache-2.0
"""Which row of a pool holds the state of which slot, when there are fewer rows than slots.

Most slots hold positions that are complete, and those need no state. Host arrays; each operation is
a handful of vector operations and none loops over slots.
"""

import numpy as np

NONE = -1


class StatePool:
    """A map from slots to rows, and a stack of the rows that are free.

    Slots may be named twice in one call: requests that share a prefix wait at the same slots.

    Args:
        num_slots, num_rows: how many of each there are.

    Attributes:
        num_free: rows that hold nothing.
    """

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._row_of = np.full(num_slots, NONE, dtype=np.int64)
        self._free = np.arange(num_rows, dtype=np.int64)
        self.num_free = num_rows

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Gives every slot in `slots` ([T] int64, holding none) a row.

        Returns:
            [T] int64, the rows. There must be T free ones, fewer if slots are named twice.
        """
        rest = self.num_free - len(slots)
        assert rest >= 0, f"{len(slots)} rows are needed and {self.num_free} are free"
        given = self._free[rest : self.num_free]
        self._row_of[slots] = given
        rows = self._row_of[slots]
        self.num_free = rest
        self._put_back(given[rows != given])  # of a slot named twice, the last row counts
        return rows

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """[T] int64, the rows of `slots` ([T] int64), `NONE` where there is none."""
        return self._row_of[slots]

    def release(self, slots: np.ndarray) -> None:
        """The states of `slots` ([T] int64) are not needed any more; some may have none."""
        rows = self._row_of[slots]
        holding = np.flatnonzero(rows != NONE)
        if len(holding) == 0:
            return
        slots, rows = slots[holding], rows[holding]
        # The number of its last mention stands at a slot for a moment, so that each counts once.
        self._row_of[slots] = holding
        once = self._row_of[slots] == holding
        self._row_of[slots] = NONE
        self._put_back(rows[once])

    def _put_back(self, rows: np.ndarray) -> None:
        stop = self.num_free + len(rows)
        self._free[self.num_free : stop] = rows
        self.num_free = stop
