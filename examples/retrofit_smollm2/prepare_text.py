# SPDX-License-Identifier: Apache-2.0
"""Lays out text to train and measure the exits of SmolLM2-135M-Instruct on: prose
(WikiText-2), code (the Python standard library) and word problems (GSM8K), each in a part for
training, one for validation and one for the test, and prompts for chat answers in the same parts,
made from the part's own text.

    python examples/retrofit_smollm2/prepare_text.py OUT [--wikitext-valid FILE ...]

Files that are not given are fetched through the `datasets` library. WikiText-2's own training split
is not used: its validation split is long enough, and its test split is never trained on.
"""

import argparse
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests of the standard library and its bundled programs repeat each other a lot.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "site-packages",
           "__pycache__", "ensurepip", "pydoc_data", "encodings"}  # fmt: skip
HELD_OUT_PROBLEMS = 200
SUBJECTS = (
    "Tell me about {}.",
    "Write a short story in which {} plays a part.",
    "What are the five most important facts about {}?",
    "Explain {} to a child.",
    "Write an email to a friend about {}.",
    "I have to give a talk about {}. Give me an outline.",
    "Write a poem about {}.",
    "What would you ask an expert on {}?",
)
PARAGRAPHS = (
    "Summarize this text in two sentences.",
    "Rewrite this text in simpler words.",
    "List the names and dates in this text.",
    "Ask three questions about this text and answer them.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for name in ("wikitext-valid", "wikitext-test", "gsm8k-train", "gsm8k-test"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    parser.add_argument("--bytes", type=int, default=1_200_000, help="of training text, each kind")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty.")

    prose = text_of(args.wikitext_valid, "validation")
    cut = prose.rindex("\n = ", 0, len(prose) * 9 // 10)  # at the start of an article
    write(args.out / "train" / "wikitext.txt", prose[:cut][: args.bytes])
    write(args.out / "valid" / "wikitext.txt", prose[cut:])
    write(args.out / "test" / "wikitext.txt", text_of(args.wikitext_test, "test"))

    most = {"train": args.bytes, "valid": args.bytes // 10, "test": args.bytes // 2}
    code: dict[str, list[str]] = {part: [] for part in most}
    for name, source in modules():
        # By a digest of the name: the same split on every machine with this Python.
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
        code["test" if share == 0 else "valid" if share == 1 else "train"].append(source)
    for part, sources in code.items():
        size = 0
        for number, source in enumerate(sources):
            if size < most[part]:
                write(args.out / part / "python" / f"{number:04}.py", source)
            size += len(source)

    problems = [json.dumps(row) for row in rows_of(args.gsm8k_train, "train")]
    training = "\n".join(problems[:-HELD_OUT_PROBLEMS])[: args.bytes]
    write(args.out / "train" / "gsm8k.jsonl", training[: training.rindex("\n") + 1])
    write(args.out / "valid" / "gsm8k.jsonl", "\n".join(problems[-HELD_OUT_PROBLEMS:]) + "\n")
    test = [json.dumps(row) for row in rows_of(args.gsm8k_test, "test")][:HELD_OUT_PROBLEMS]
    write(args.out / "test" / "gsm8k.jsonl", "\n".join(test) + "\n")
    for part, questions in (
        ("train", problems[: -2 * HELD_OUT_PROBLEMS]),
        ("valid", problems[-HELD_OUT_PROBLEMS:]),
        ("test", test),
    ):
        prose = (args.out / part / "wikitext.txt").read_text()
        asked = list(prompts(prose, code[part], [json.loads(row)["question"] for row in questions]))
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked)
        write(args.out / part / "prompts.jsonl", text)


def text_of(file: Path | None, split: str) -> str:
    """WikiText-2 as one text."""
    if file is not None:
        return file.read_text()
    from datasets import load_dataset

    return "".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])


def rows_of(file: Path | None, split: str) -> Iterator[dict[str, str]]:
    """Questions and answers of GSM8K."""
    if file is not None:
        yield from map(json.loads, file.read_text().splitlines())
        return
    from datasets import load_dataset

    yield from load_dataset("openai/gsm8k", "main", split=split)


def modules() -> Iterator[tuple[str, str]]:
    """Names and sources of the standard library's modules, in an order of no meaning."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    names = {str(path.relative_to(root)): path for path in files}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        yield name, names[name].read_text(errors="ignore")


def prompts(prose: str, sources: list[str], questions: list[str]) -> Iterator[str]:
    """What a user may ask: about subjects, paragraphs and code of the text, and problems."""
    titles = re.findall(r"^ = ([^=\n]+) = $", prose, flags=re.MULTILINE)
    for number, title in enumerate(titles):
        yield SUBJECTS[number % len(SUBJECTS)].format(title)
        yield SUBJECTS[(number + 1) % len(SUBJECTS)].format(title)
    paragraphs = [line.strip() for line in prose.splitlines() if 300 < len(line) < 900]
    for number, paragraph in enumerate(paragraphs[: 2 * len(titles)]):
        yield f"{PARAGRAPHS[number % len(PARAGRAPHS)]}\n\n{paragraph}"
    described = re.compile(r'^def (\w+)\(.*\n +r?"""([^"\n]{20,})', flags=re.MULTILINE)
    functions = [found for source in sources for found in described.findall(source)]
    for name, purpose in functions[: 2 * len(titles)]:
        yield f"Write a Python function `{name}`. {purpose}"
    for source in sources[: len(titles)]:
        yield f"Explain what this Python code does.\n\n```python\n{source[:700]}\n```"
    yield from questions[: 2 * len(titles)]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
