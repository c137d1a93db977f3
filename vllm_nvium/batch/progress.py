# SPDX-License-Identifier: Apache-2.0
"""How far a batch job is: rows and tokens per second, how much of the model they took, and the time
that is left."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts, and the lines that tell them.

    Args:
        rows: of the input.
        done: of these, with a result when the command was started.
        tell: prints a line.
        clock: seconds since the epoch, which replicas measure too.
    """

    def __init__(
        self,
        rows: int,
        done: int,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rows, self.done = rows, done
        self.answered = self.errors = self.tokens = 0
        self._tell, self._clock = tell, clock
        self._engines: dict[str, dict[str, Any]] = {}
        self._begun = self._told = clock()

    def add(self, new: int, errors: int, tokens: int, counts: Iterable[str]) -> None:
        """Rows got their result.

        Args:
            counts: what replicas counted since they were started, as JSON; empty ones are none.
        """
        self.done += new
        self.answered += new
        self.errors += errors
        self.tokens += tokens
        for text in filter(None, counts):
            engine = json.loads(text)
            self._engines[engine["replica"]] = engine
        if self._engines:
            # Not the time that they took to start.
            self._begun = min(engine["begun"] for engine in self._engines.values())
        if (now := self._clock()) - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            self._tell(self.line())

    def line(self) -> str:
        """One line."""
        seconds = max(self._clock() - self._begun, 1e-3)
        rate = self.answered / seconds
        parts = [
            f"{self.done} of {self.rows} rows",
            f"{rate:.1f} rows/s",
            f"{self.tokens / seconds:.0f} tokens/s",
            *self._shares(),
        ]
        if self.errors:
            parts.append(f"{self.errors} with an error")
        if rate and self.done < self.rows:
            parts.append(f"{_duration((self.rows - self.done) / rate)} left")
        return ", ".join(parts)

    def _shares(self) -> list[str]:
        shares = []
        for part, whole, name in (
            ("layers", "dense_layers", "mean depth"),
            ("accepted", "drafted", "drafts accepted"),
        ):
            total = sum(engine.get(whole, 0) for engine in self._engines.values())
            if total:
                share = sum(engine.get(part, 0) for engine in self._engines.values()) / total
                shares.append(f"{name} {share:.0%}")
        return shares


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
