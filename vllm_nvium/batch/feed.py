# SPDX-License-Identifier: Apache-2.0
"""What the small tasks of a batch job do: read rows, and keep what is written of them. Apart from
the rest, so that the processes that do it import neither torch nor vLLM."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from vllm_nvium.batch.inputs import Lines, State, read_block

ROW = pa.schema({"index": pa.int64(), "text": pa.binary()})


class Rows(Datasource):
    """Blocks of rows of a file of JSON lines, each read when its turn comes.

    Args:
        todo: numbers of blocks that have rows without a result.
        has: whether a row has one.
    """

    def __init__(self, lines: Lines, todo: Sequence[int], has: Callable[[int], bool]) -> None:
        super().__init__()
        self._lines, self._todo, self._has = lines, todo, has

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One for each block."""
        return [self._task(number) for number in self._todo]

    def _task(self, number: int) -> ReadTask:
        lines = self._lines
        indices = lines.indices(number)
        done = [index for index in indices if self._has(index)]
        read = partial(_read, str(lines.path), lines.offsets[number], indices, done, lines.state)
        about = BlockMetadata(
            num_rows=len(indices) - len(done), size_bytes=None, input_files=None, exec_stats=None
        )
        return ReadTask(read, about, ROW)


def _read(path: str, offset: int, indices: range, done: list[int], state: State) -> list[pa.Table]:
    rows = [row for row in read_block(Path(path), offset, indices, state) if row[0] not in done]
    return [pa.table({"index": [i for i, _ in rows], "text": [t for _, t in rows]}, ROW)]


def only_results(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are written, of a row that was answered."""
    return {name: row[name] for name in ("index", "result", "counts")}
