# SPDX-License-Identifier: Apache-2.0
"""The process of one run of the demo: an engine of vLLM inside it, an observer of its tokens, and
one line of JSON for each answer. Prompts go one at a time, as a single user would send them."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

# Tokens before anything is measured: the first pay for what is compiled once, and VIA-SD times its
# plans on them.
WARM_UP = 40


def main(events: TextIO, request: dict[str, Any]) -> int:
    """Answer prompts.

    Args:
        events: gets a line `{"event": "loaded", ...}`, then `{"event": "answer", ...}` for each
            prompt: its text by token, token ids, whose word each token was (empty for a plain
            run), seconds, and passes of the full model.
        request: see `demo._one`.
    """
    from vllm import LLM, SamplingParams

    def tell(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=events, flush=True)

    start = time.perf_counter()
    llm = LLM(
        model=request["model"],
        max_model_len=request["max_model_len"],
        enforce_eager=request["enforce_eager"],
        additional_config=request["additional_config"],
        max_num_seqs=1,
    )
    runner = runner_of(llm)
    config = llm.llm_engine.vllm_config.model_config
    tokenizer = llm.get_tokenizer()
    is_chat = bool(getattr(tokenizer, "chat_template", None))

    def answer(prompt: str, max_tokens: int, ignore_eos: bool = False) -> Any:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=request["temperature"], seed=0, ignore_eos=ignore_eos
        )
        if is_chat:
            chat: list[Any] = [{"role": "user", "content": prompt}]
            return llm.chat([chat], sampling, use_tqdm=False)[0].outputs[0]
        return llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]

    answer("Hello", WARM_UP, ignore_eos=True)
    tell(
        "loaded",
        seconds=time.perf_counter() - start,
        num_layers=config.hf_text_config.num_hidden_layers,
        exit_layers=list(getattr(config.hf_config, "exit_layers", ())),
    )
    watch = Watch(runner, request["kind"])
    for prompt in request["prompts"]:
        watch.restart()
        start = time.perf_counter()
        output = answer(prompt, request["max_tokens"])
        seconds = time.perf_counter() - start
        ids = list(output.token_ids)
        tell(
            "answer",
            prompt=prompt,
            pieces=pieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ids),
            token_ids=ids,
            # The last step may have drawn more than what stayed.
            sources=watch.sources[: len(ids)],
            seconds=seconds,
            full_passes=watch.full_passes(len(ids)),
        )
    return 0


def runner_of(llm: Any) -> Any:
    """vLLM's model runner, of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


class Watch:
    """Follows one request at a time.

    Args:
        runner: vLLM's; kind: plain, nvium or via_sd.

    Attributes:
        sources: of each token since `restart`: the exit that it left at (nvium), or whose word it
            was (via_sd).
    """

    def __init__(self, runner: Any, kind: str) -> None:
        self.kind, self.sources, self._passes = kind, list[int](), 0
        self._counts: Callable[[], list[int]] = list
        if kind == "nvium":
            # Of Model Runner V1, and of the state that V2 asks the model for.
            observer = getattr(runner, "nvium_observer", None) or runner.model_state.observer
            observer.on_tokens = self._note
            self._counts = lambda: list(observer.reporter.counts.step_depths)
        elif kind == "via_sd":
            runner.session.on_tokens = self._note

    def _note(self, request_id: str, sources: Sequence[int]) -> None:
        self.sources += sources
        self._passes += 1

    def restart(self) -> None:
        """A new request is about to start."""
        self.sources, self._passes, self._before = [], 0, self._counts()

    def full_passes(self, num_tokens: int) -> int:
        """Passes of all layers since `restart`, in which so many tokens were made."""
        if self.kind == "plain":
            return num_tokens
        if self.kind == "nvium":
            return self._counts()[-1] - self._before[-1]
        return self._passes


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token; together they are the text of all. A character of several tokens is
    counted for the last of them."""
    found, done = list[str](), ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[:end]))
        is_whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        found.append(text[len(done) :] if is_whole else "")
        done = text if is_whole else done
    return found


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        sys.exit(main(pipe, json.loads(sys.argv[2])))
