# SPDX-License-Identifier: Apache-2.0
"""What the paper's rule of VIA-SD does to answers: GSM8K (exact number) and HumanEval (pass@1) of
the target itself, of lossless VIA-SD, and of paper mode at given thresholds, greedy, the same
problems and prompts for all, with tokens per second and full passes per token beside the scores.

    python benchmarks/via_sd_quality.py TARGET --drafter DRAFT_MODEL --mask even:0.2 \\
        --gsm8k gsm8k-test.jsonl --humaneval humaneval.jsonl --out answers.jsonl

Programs that models wrote are run, isolated by Bubblewrap or `unshare` (see `sandbox.py`); where
neither works, only with --unsandboxed. Answers are added to --out as they come; engines whose
answers are all there are not started again.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import sandbox
from measured import drafter_config, machine

GSM8K = "\n\nReason step by step. End with a line '#### ' and the answer as a number."
HUMANEVAL = "Complete this Python function. Answer with one code block that holds all of it.\n\n"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
PLAIN, LOSSLESS = "target alone", "lossless"


@dataclass(frozen=True)
class Problem:
    """One question, and what tells whether an answer is right."""

    name: str
    task: str
    prompt: str
    key: str


def gsm8k(path: Path) -> Iterator[Problem]:
    for number, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        answer = row["answer"].rsplit("####", 1)[1]
        yield Problem(f"gsm8k/{number}", "gsm8k", row["question"] + GSM8K, answer.strip())


def humaneval(path: Path) -> Iterator[Problem]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        key = f"{row['test']}\n\ncheck({row['entry_point']})\n"
        yield Problem(row["task_id"], "humaneval", HUMANEVAL + row["prompt"], key)


# --- Answers --------------------------------------------------------------------------------------


def is_right(problem: Problem, answer: str, isolation: str) -> bool:
    """Whether the final number is the expected one, or the program passes its tests."""
    if problem.task == "gsm8k":
        return number_of(answer) == float(problem.key.replace(",", ""))
    stub = problem.prompt.removeprefix(HUMANEVAL)
    # What stands above the function (imports, helpers) is part of the task.
    above = stub[: stub.rindex("\ndef ") + 1] if "\ndef " in stub else ""
    return sandbox.passes(f"{above}\n{code_of(answer)}\n\n{problem.key}", isolation)


def number_of(answer: str) -> float | None:
    """The number behind `####`, or else the last one."""
    found = NUMBER.findall(answer.rsplit("####", 1)[-1]) if "####" in answer else []
    found = found[:1] or NUMBER.findall(answer)[-1:]
    return float(found[0].replace(",", "")) if found else None


def code_of(answer: str) -> str:
    """The first code block, or everything where there is none."""
    found = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, flags=re.DOTALL)
    return found.group(1) if found else answer


# --- Engines, each in a process of its own --------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How an engine decodes; thresholds are those of the paper's rule."""

    name: str
    accept: float = 0.0
    escalate: float = 0.0

    @property
    def extra_args(self) -> dict[str, Any] | None:
        if self.name == PLAIN:
            return None
        if self.name == LOSSLESS:
            return {"via_sd_mode": "lossless"}
        return {
            "via_sd_mode": "paper",
            "via_sd_accept": self.accept,
            "via_sd_escalate": self.escalate,
        }


def rules(args: argparse.Namespace) -> list[Rule]:
    found = [Rule(PLAIN)]
    if args.lossless:
        found.append(Rule(LOSSLESS))
    for pair in args.thresholds.split(","):
        accept, escalate = map(float, pair.split(":"))
        found.append(Rule(f"paper {accept}, {escalate}", accept, escalate))
    return found


def generate(todo: list[Rule], problems: list[Problem], args: argparse.Namespace) -> None:
    """Answers of one engine: the target alone, or all rules of VIA-SD."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is all there is on stdout
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if todo[0].name != PLAIN:
        own = {"via_sd": True, "via_sd_mask": args.mask, "via_sd_rounds": args.rounds}
        own |= {"via_sd_window": args.window, "via_sd_allow_paper_mode": True}
        drafter = drafter_config(args.drafter, args.drafts)
        options = {"speculative_config": drafter, "additional_config": own}
    llm = LLM(
        str(args.target),
        dtype="bfloat16",
        max_model_len=1536,
        max_num_seqs=args.batch,
        enforce_eager=args.enforce_eager,
        disable_log_stats=False,
        async_scheduling=False,
        seed=0,
        **options,
    )
    for rule in todo:
        for task in dict.fromkeys(problem.task for problem in problems):
            own_problems = [problem for problem in problems if problem.task == task]
            params = SamplingParams(
                temperature=0.0, max_tokens=args.max_tokens, extra_args=rule.extra_args
            )
            chats: Any = [[{"role": "user", "content": each.prompt}] for each in own_problems]
            before, start = counters(llm), time.perf_counter()
            outputs = llm.chat(chats, params)
            seconds = time.perf_counter() - start
            counted = {name: value - before[name] for name, value in counters(llm).items()}
            record = {
                "rule": asdict(rule),
                "settings": settings(args),
                "task": task,
                "seconds": seconds,
                "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
                "counts": counted,
                "answers": {
                    problem.name: output.outputs[0].text
                    for problem, output in zip(own_problems, outputs, strict=True)
                },
            }
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def counters(llm: Any) -> dict[str, float]:
    """VIA-SD's counters of an engine; none of the target alone."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:via_sd") and hasattr(metric, "value"):
            tier = metric.labels.get("tier", "")
            found[f"{metric.name.removeprefix('vllm:via_sd_')} {tier}".strip()] = metric.value
    return found


# --- The table ------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes answers comparable; --rounds and --drafter change times only, not the target's
    answers, but do change those of the paper's rule."""
    names = ("mask", "drafts", "rounds", "window", "batch", "max_tokens", "problems")
    return {name: getattr(args, name) for name in names} | {
        "target": args.target.name,
        "drafter": Path(args.drafter).name,
    }


def recorded(args: argparse.Namespace, rule: Rule, task: str) -> dict[str, Any] | None:
    """What --out holds of one engine and task."""
    if not args.out.is_file():
        return None
    for line in args.out.read_text().splitlines():
        row = json.loads(line)
        same = row["rule"] == asdict(rule) and row["task"] == task
        if same and row["settings"] == settings(args):
            return row
    return None


def row_of(name: str, task: str, right: dict[str, bool], own: dict[str, bool], record: Any) -> str:
    """One rule and task.

    Args:
        own: what the target alone got right.
    """
    count, score = len(right), sum(right.values()) / len(right)
    error = math.sqrt(score * (1 - score) / count)
    lost = sum(own[each] and not right[each] for each in right)
    won = sum(right[each] and not own[each] for each in right)
    counts = record["counts"]
    passes_per_token, tiers = "", ""
    if counts.get("decode_tokens"):
        per = counts["full_pass_requests"] / counts["decode_tokens"]
        passes_per_token = f"{per:.3f}"
        of = [counts.get(f"tier_tokens {tier}", 0.0) for tier in TIERS]
        if sum(of):
            tiers = " / ".join(f"{value / sum(of):.0%}" for value in of)
    cells = [task, name, str(count), f"{score:.3f} ({error:.3f})", f"{lost} / {won}"]
    cells += [f"{record['tokens'] / record['seconds']:.1f}", passes_per_token, tiers]
    cells += [f"{record['tokens'] / count:.0f}"]
    return "| " + " | ".join(cells) + " |"


TIERS = ("accept", "regenerate", "escalate")
HEADER = (
    "| task | rule | problems | score (standard error) | lost / won against the target | tok/s | "
    "full passes per token | tokens of tiers A / B / C | tokens per answer |",
    "|" + "---|" * 9,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="checkpoint with a chat template (folder)")
    parser.add_argument("--drafter", default="ngram", help="ngram, or a checkpoint")
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--mask", default="even:0.2")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--rounds", default="auto", help="auto or a number, as --via-sd-rounds")
    parser.add_argument("--thresholds", default="0.5:0.3", help="accept:escalate, several by comma")
    parser.add_argument("--lossless", action="store_true", help="measure the lossless mode too")
    parser.add_argument("--gsm8k", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--humaneval", type=Path, help="JSON lines as OpenAI released them")
    parser.add_argument("--problems", type=int, default=1000, help="of each file, its first ones")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--unsandboxed", action="store_true", help="run programs with your rights")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of answers")
    args = parser.parse_args()
    if args.rounds != "auto":
        args.rounds = int(args.rounds)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    problems: list[Problem] = []
    for read, path in ((gsm8k, args.gsm8k), (humaneval, args.humaneval)):
        if path:
            problems += list(read(path))[: args.problems]
    if not problems:
        parser.error("give --gsm8k, --humaneval, or both")
    isolation = sandbox.NONE
    if args.humaneval:
        # Before any engine starts, so that no hours end in a refusal.
        try:
            isolation = sandbox.choose(args.unsandboxed)
        except RuntimeError as error:
            parser.error(f"{error}; --unsandboxed runs them with your own rights")
        print(sandbox.described(isolation))
    tasks = list(dict.fromkeys(problem.task for problem in problems))
    wanted = rules(args)
    missing = [r for r in wanted if any(recorded(args, r, task) is None for task in tasks)]
    plain = [rule for rule in missing if rule.name == PLAIN]
    for group in (plain, [rule for rule in missing if rule.name != PLAIN]):
        if group:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(generate, group, problems, args).result()
    print(f"{machine()}, " + ", ".join(f"{k} {v}" for k, v in settings(args).items()))
    print("greedy, bfloat16, chat template; tok/s of the whole batch, prompts included", "")
    print(*HEADER, sep="\n")
    for task in tasks:
        own: dict[str, bool] = {}
        for rule in wanted:
            record = recorded(args, rule, task)
            assert record is not None
            right = {
                problem.name: is_right(problem, record["answers"][problem.name], isolation)
                for problem in tqdm(
                    problems, desc=f"{task}, {rule.name}", disable=None, leave=False
                )
                if problem.task == task
            }
            own = own or right
            print(row_of(rule.name, task, right, own, record))


if __name__ == "__main__":
    main()
