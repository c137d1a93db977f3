# SPDX-License-Identifier: Apache-2.0
"""A batch job from its input to its output: what has no result yet is run, what comes is written at
once, and when every row has its result the output is made."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_nvium.batch import inputs, journal
from vllm_nvium.batch.engine import Engine
from vllm_nvium.batch.pipeline import Cluster, results
from vllm_nvium.batch.progress import Progress
from vllm_nvium.batch.results import tokens_of, write_output
from vllm_nvium.errors import UserError

# Rows that are read, answered and written together: a job that is killed loses what it has of
# blocks that are not complete, and each block costs Ray some milliseconds.
FEWEST_ROWS, USUAL_ROWS, MOST_ROWS = 1, 16, 128
# So that replicas of a small job, too, end together.
BLOCKS_PER_REPLICA = 32
# Above, blocks grow.
MANY_BLOCKS = 8192


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        source: file of rows; output: file of results.
        seed: of rows that give none; None leaves them without.
    """

    source: Path
    output: Path
    engine: Engine
    cluster: Cluster
    seed: int | None = 0


def run(job: Job, tell: Callable[[str], None]) -> Progress:
    """Do it, or what is left of it.

    Args:
        tell: prints a line of progress.

    Returns:
        what was done now.

    Raises:
        UserError: something given cannot be used, or the job stopped; results that were written
            are kept, and the same job goes on.
    """
    digest, state = inputs.digest_of(job.source)
    about = {"INPUT (its SHA-256)": digest, **job.engine.about, "row seeds": job.seed}
    folder = journal.folder_of(job.output)
    with journal.on_disk(folder):
        lock = journal.claim(folder, about, job.output)
    written = None
    try:
        with journal.on_disk(folder):
            lines = _lines(job, folder)
            inputs.check_unchanged(job.source, state)
            written = journal.Journal(folder, lines.rows)
        if written.done < lines.rows:
            journal.refuse_existing(job.output)
        progress = Progress(lines.rows, written.done, tell)
        if written.done:
            tell(f"{written.done} of {lines.rows} rows have their result already.")
        _answer(job, lines, written, progress)
        write_output(written, lines.rows, job.output)
        journal.remove(folder)
        return progress
    except BaseException:
        if not journal.has_results(folder):
            journal.remove(folder)
        raise
    finally:
        if written is not None:
            written.close()
        lock.close()


def _lines(job: Job, folder: Path) -> inputs.Lines:
    path = job.source
    if path.suffix == inputs.PARQUET_SUFFIX:
        path = folder / journal.SPOOL
        if not path.exists():
            inputs.parquet_to_lines(job.source, path)
    lines = inputs.scan(path, USUAL_ROWS)
    best = rows_per_block(lines.rows, job.cluster.replicas)
    return lines if best == USUAL_ROWS else inputs.scan(path, best)


def rows_per_block(rows: int, replicas: int) -> int:
    """Rows of a block, for a job of so many."""
    fair = -(-rows // (replicas * BLOCKS_PER_REPLICA))
    return max(FEWEST_ROWS, min(fair, USUAL_ROWS), min(rows // MANY_BLOCKS, MOST_ROWS))


def _answer(job: Job, lines: inputs.Lines, written: journal.Journal, progress: Progress) -> None:
    for table in results(job.engine, job.cluster, lines, written.has, job.seed):
        indices, rows = table["index"].to_pylist(), table["result"].to_pylist()
        with journal.on_disk(written.folder):
            new = written.add(zip(indices, rows, strict=True))
        parsed = [json.loads(row) for row in rows]
        progress.add(
            new,
            sum(row["error"] is not None for row in parsed),
            sum(map(tokens_of, parsed)),
            table["counts"].to_pylist(),
        )
    if written.done < lines.rows:
        raise UserError(
            f"{lines.rows - written.done} of {lines.rows} rows have no result: the same command "
            "goes on with them."
        )
