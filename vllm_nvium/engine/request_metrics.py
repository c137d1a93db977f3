# SPDX-License-Identifier: Apache-2.0
"""What an answer tells of its own tokens, for requests that ask: sums, and on request a value for
each token. A model runner's notes of a step travel in `kv_transfer_params`, the free-form field of
vLLM's output of a request: both methods refuse KV connectors, so it is unused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# An attribute of vLLM's ModelRunnerOutput, and a key in its free-form fields.
KEY = "vllm_nvium"
# As vLLM's --per-request-spec-decode-metrics has it. `detailed` has all that `summary` has.
Level = Literal["none", "summary", "detailed"]
NEEDED_LEVEL = "'none', 'summary' or 'detailed'"
# The name of the option, behind the prefix of a method.
OPTION = "request_metrics"
# An observer of tokens, in the engine's own process: called after a step for each request that got
# some, with vLLM's id of the request and a number for each of its new tokens, in order. What the
# numbers mean the method says. The last tokens may be cut off behind a stop.
OnTokens = Callable[[str, Sequence[int]], None]
# Of a model runner's report: the notes of a step.
NOTES = "notes"


class TokenNotes:
    """What a model runner's observer notes of new tokens, for whoever wants to know.

    Args:
        asked: vLLM's id -> level, of the requests that want to be told of their tokens.
        method: its folder in this package.
        scale: what the method needs to sum its numbers up; see the method's `summary`.

    Attributes:
        on_tokens: told of every token, whatever requests ask for.
    """

    on_tokens: OnTokens | None = None

    def __init__(self, asked: Mapping[str, Level], method: str, scale: Sequence[int] = ()) -> None:
        self._asked, self._method, self._scale = asked, method, list(scale)
        self._notes: dict[str, dict[str, Any]] = {}

    @property
    def anybody(self) -> bool:
        """Whether anybody wants to know of any token."""
        return self.on_tokens is not None or bool(self._asked)

    def wants(self, request_id: str) -> bool:
        """Whether anybody wants to know of the tokens of this request."""
        return self.on_tokens is not None or request_id in self._asked

    def note(self, request_id: str, numbers: Sequence[int], work: int) -> None:
        """A request got tokens from a step.

        Args:
            numbers: one for each token; work: what the step did for them, to be summed up.
        """
        if self.on_tokens is not None:
            self.on_tokens(request_id, numbers)
        if (level := self._asked.get(request_id)) is not None:
            self._notes[request_id] = {
                "method": self._method,
                "level": level,
                "scale": self._scale,
                "numbers": list(numbers),
                "work": work,
            }

    def with_notes(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a step with what was noted since the last."""
        if self._notes:
            report[NOTES], self._notes = self._notes, {}
        return report


def take_notes(report: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The notes of a report, by request; they are gone afterwards."""
    return report.pop(NOTES, {}) if report else {}


def send(outputs: Mapping[int, Any], notes: Mapping[str, dict[str, Any]]) -> None:
    """Adds notes to the outputs of their requests.

    Args:
        outputs: vLLM's `EngineCoreOutputs` of a step, by client.
    """
    for of_client in outputs.values() if notes else ():
        for output in of_client.outputs:
            if output.new_token_ids and (note := notes.get(output.request_id)) is not None:
                output.kv_transfer_params = {KEY: note}


def received(kv_transfer_params: dict[str, Any] | None) -> dict[str, Any] | None:
    """The note that `send` has put there, if it has."""
    return kv_transfer_params.get(KEY) if kv_transfer_params else None


@dataclass
class Told:
    """What came of one sequence so far, in the process that answers clients.

    Attributes:
        method, level, scale: as noted last.
        numbers: one for each token, in order; None of a token from before anybody asked, which only
            a conversation that goes on can have.
        passes: steps that it got tokens from; work: of these, summed up.
    """

    method: str = ""
    level: Level = "none"
    scale: list[int] = field(default_factory=list)
    numbers: list[int | None] = field(default_factory=list)
    passes: int = 0
    work: int = 0

    def add(self, note: Mapping[str, Any], start: int, count: int) -> None:
        """A step's note.

        Args:
            start: tokens before those of the step; count: that stay of those.
        """
        self.method, self.level, self.scale = note["method"], note["level"], note["scale"]
        self._align(start)
        self.numbers += note["numbers"][:count]
        self.passes += 1
        self.work += note["work"]

    def of(self, start: int, end: int) -> list[int | None]:
        """Numbers of the tokens start..end-1: as many as there are of these."""
        self._align(end)
        return self.numbers[start:]

    def known(self) -> list[int]:
        return [number for number in self.numbers if number is not None]

    def _align(self, count: int) -> None:
        """So many tokens there are."""
        del self.numbers[count:]
        self.numbers += [None] * (count - len(self.numbers))


@dataclass(frozen=True)
class AnswerFormat:
    """How a method puts what was told into an answer.

    Attributes:
        sums: key of the sums in the `metrics` of a response.
        tokens: key of the list of all tokens in a choice, and attribute of vLLM's
            `CompletionOutput`; `sums_attribute` is that of the sums.
        level: what a request asks for, from its `vllm_xargs` and the engine's configuration.
        named: a number as the answer shows it.
        summary: the sums.
    """

    sums: str
    tokens: str
    level: Callable[[Any, "VllmConfig"], Level]
    named: Callable[[int], int | str]
    summary: Callable[[Told], dict[str, Any]]

    @property
    def sums_attribute(self) -> str:
        return f"{self.sums}_metrics"

    def describe(self, output: Any, told: Told, num_tokens: int) -> None:
        """Adds to vLLM's output of a sequence what the request asked for.

        Args:
            output: a `CompletionOutput`: of all tokens, or of the newest.
            num_tokens: of the sequence so far.
        """
        if told.level == "detailed":
            numbers = told.of(num_tokens - len(output.token_ids), num_tokens)
            values = [None if number is None else self.named(number) for number in numbers]
            setattr(output, self.tokens, values)
        if output.finish_reason is not None:
            setattr(output, self.sums_attribute, self.summary(told))

    def merge(self, output: Any, newer: Any) -> None:
        """vLLM has added the tokens of a newer output of the same sequence."""
        found = vars(newer)
        if self.tokens in found:
            setattr(output, self.tokens, [*getattr(output, self.tokens, ()), *found[self.tokens]])
        if self.sums_attribute in found:
            setattr(output, self.sums_attribute, found[self.sums_attribute])
