# SPDX-License-Identifier: Apache-2.0
"""How the demo shows what came of a run: the text with each token coloured, or marked, by where it
came from, and the table of all runs. Nothing here knows an engine."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from vllm_nvium.cli.demo.runs import Run
from vllm_nvium.console import interactive, say

RESET = "\x1b[0m"
# Red, green and blue from the cheapest source to the dearest, and the same in basic colours.
CHEAPEST, DEAREST = (60, 200, 90), (235, 150, 40)
BASIC = (32, 36, 33, 35, 34, 31)
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


@dataclass(frozen=True)
class Palette:
    """What the terminal can: `depth` 0 is no colours, 8 basic ones, 24 bits of them."""

    depth: int

    def paint(self, text: str, place: int, count: int, mark: str) -> str:
        """Text of source `place` of `count`; the last, the whole model, has no colour."""
        if not mark or not text:
            return text
        if not self.depth:
            return f"[{mark}:{text}]"
        if self.depth == 8:
            code = str(BASIC[place % len(BASIC)])
        else:
            share = place / max(count - 2, 1)
            mixed = (round(a + share * (b - a)) for a, b in zip(CHEAPEST, DEAREST, strict=True))
            code = "38;2;" + ";".join(map(str, mixed))
        # Line by line, so that a pager or a log that cuts lines keeps colours apart.
        return "\n".join(f"\x1b[{code}m{line}{RESET}" if line else "" for line in text.split("\n"))


def colours_of(environment: Mapping[str, str]) -> Palette:
    """What standard output can show; NO_COLOR (https://no-color.org) switches colours off."""
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb" or not interactive():
        return Palette(0)
    return Palette(24 if environment.get("COLORTERM") in ("truecolor", "24bit") else 8)


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

    def legend(self, palette: Palette) -> list[str]:
        """One line, of several if it is long."""
        if not self.sources:
            return []
        count = len(self.sources)
        parts = [
            palette.paint(source.meaning, place, count, source.mark)
            for place, source in enumerate(self.sources)
        ]
        return ["Tokens: " + ", ".join(parts)]

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


def painted(answer: Answer, sources: Sequence[Source], palette: Palette) -> str:
    """The text of an answer, with runs of tokens of one source coloured or marked together."""
    if not sources:
        return "".join(answer.pieces)
    whole = len(sources) - 1
    known = [*answer.sources, *[whole] * (len(answer.pieces) - len(answer.sources))]
    text = ""
    for place, run in groupby(zip(known, answer.pieces, strict=True), key=lambda pair: pair[0]):
        joined = "".join(piece for _, piece in run)
        text += palette.paint(joined, place, len(sources), sources[place].mark)
    return text


def show_answer(answer: Answer, sources: Sequence[Source], palette: Palette) -> None:
    """Print a prompt and what was said."""
    say("", f"> {textwrap.shorten(answer.prompt, WIDTH - 2)}", painted(answer, sources, palette))


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
