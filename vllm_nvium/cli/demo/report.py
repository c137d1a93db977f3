# SPDX-License-Identifier: Apache-2.0
"""How the demo shows what came of a run: the text with each token coloured, or marked, by where it
came from, and the table of all runs. Nothing here knows an engine."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from vllm_nvium.cli.demo.runs import Run
from vllm_nvium.console import interactive, say

# Of the terminal, from the cheapest source to the dearest.
COLOURS = (32, 36, 33, 35, 34, 31)
WIDTH = 80


@dataclass(frozen=True)
class Source:
    """Where tokens come from.

    Attributes:
        mark: for text without colours; empty for the whole model, whose tokens stay as they are.
        meaning: for the legend; name: for the shares.
    """

    mark: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Answer:
    """What a run said to one prompt; see `engine.main`."""

    prompt: str
    pieces: list[str]
    token_ids: list[int]
    sources: list[int]
    seconds: float
    full_passes: int


def paint(text: str, place: int, source: Source, coloured: bool) -> str:
    """Text of the source at `place`; that of the whole model stays as it is."""
    if not source.mark or not text:
        return text
    if not coloured:
        return f"[{source.mark}:{text}]"
    code = COLOURS[place % len(COLOURS)]
    # Line by line, so that a pager or a log that cuts lines keeps colours apart.
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def shows_colours(environment: Mapping[str, str]) -> bool:
    """Whether standard output does; NO_COLOR (https://no-color.org) switches them off."""
    return interactive() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


@dataclass
class Result:
    """A run and what came of it.

    Attributes:
        sources: of its tokens, from the cheapest to the whole model; layers: run for a token of
            each, and num_layers of the whole model.
    """

    run: Run
    answers: list[Answer] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    num_layers: int = 0

    def start(self, num_layers: int, exit_layers: Sequence[int]) -> None:
        """The engine is there, and tells its depth."""
        self.num_layers = num_layers
        if self.run.kind == "nvium":
            self.sources = exits_of(exit_layers, num_layers)
            self.layers = [*exit_layers, num_layers]
        elif self.run.kind == "via_sd":
            self.sources = list(TIERS)

    def legend(self, coloured: bool) -> list[str]:
        """One line, or none where there is one source."""
        parts = [paint(s.meaning, place, s, coloured) for place, s in enumerate(self.sources)]
        return ["Tokens: " + ", ".join(parts)] if parts else []

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def seconds(self) -> float:
        return sum(answer.seconds for answer in self.answers)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    def counts(self) -> list[int]:
        """Tokens of each source."""
        found = [source for answer in self.answers for source in answer.sources]
        return [found.count(place) for place in range(len(self.sources))]

    def shares(self) -> str:
        """A line on the tokens of all answers."""
        line = f"{self.num_tokens} tokens in {self.seconds:.1f} s"
        counts = self.counts()
        if total := sum(counts):
            parts = (
                f"{100 * count / total:.0f} % {source.name}"
                for source, count in zip(self.sources, counts, strict=True)
            )
            line += ": " + ", ".join(parts)
        return line + "."

    def mean_depth(self) -> float | None:
        """Share of the layers below the heads that the tokens left at."""
        if self.run.kind == "plain":
            return 1.0
        counts = self.counts()
        if self.run.kind != "nvium" or not sum(counts):
            return None
        run = sum(count * layers for count, layers in zip(counts, self.layers, strict=True))
        return run / (sum(counts) * self.num_layers)


# In the order of `via_sd.session.DRAFTER`, `SLIM` and `FULL`.
TIERS = (
    Source("d", "drafted", "drafted from the text before"),
    Source("s", "slim verifier", "said by the slim verifier first"),
    Source("", "whole model", "said by the whole model"),
)


def exits_of(exit_layers: Sequence[int], num_layers: int) -> list[Source]:
    """The sources of an N-vium model's tokens."""
    exits = [
        Source(
            str(number), f"exit {number}", f"exit {number} (after {layers} of {num_layers} layers)"
        )
        for number, layers in enumerate(exit_layers, 1)
    ]
    return [*exits, Source("", "final head", f"final head (all {num_layers} layers)")]


def painted(answer: Answer, sources: Sequence[Source], coloured: bool) -> str:
    """The text of an answer, with runs of tokens of one source coloured or marked together."""
    if not sources:
        return "".join(answer.pieces)
    whole = len(sources) - 1
    known = [*answer.sources, *[whole] * (len(answer.pieces) - len(answer.sources))]
    text = ""
    for place, run in groupby(zip(known, answer.pieces, strict=True), key=lambda pair: pair[0]):
        joined = "".join(piece for _, piece in run)
        text += paint(joined, place, sources[place], coloured)
    return text


def show_answer(answer: Answer, sources: Sequence[Source], coloured: bool) -> None:
    """Print a prompt and what was said."""
    say("", f"> {textwrap.shorten(answer.prompt, WIDTH - 2)}", painted(answer, sources, coloured))


def same_text(plain: Sequence[Answer], other: Sequence[Answer]) -> str:
    """Whether all tokens are equal, or the first that is not."""
    for number, (a, b) in enumerate(zip(plain, other, strict=True), 1):
        if a.token_ids != b.token_ids:
            pairs = zip(a.token_ids, b.token_ids, strict=False)
            equal = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
            at = min(len(a.token_ids), len(b.token_ids)) if equal is None else equal
            return f"no (prompt {number}, token {at + 1})"
    return "yes"


def summary(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The rows of the table, its head first."""
    plain = next((result for result in results if result.run.kind == "plain"), None)
    rows: list[tuple[str, ...]] = [
        ("", "tokens/s", "ratio", "mean depth", "full passes/token", "same text")
    ]
    for result in results:
        depth = result.mean_depth()
        passes = sum(answer.full_passes for answer in result.answers)
        compared = result.run.kind == "via_sd" and plain is not None
        rows.append(
            (
                result.run.name,
                f"{result.speed:.1f}",
                "-" if plain is None else f"{result.speed / plain.speed:.2f}x",
                "-" if depth is None else f"{100 * depth:.0f} %",
                f"{passes / max(result.num_tokens, 1):.2f}",
                same_text(plain.answers, result.answers) if compared and plain else "-",
            )
        )
    return rows
