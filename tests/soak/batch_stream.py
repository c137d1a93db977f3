# SPDX-License-Identifier: Apache-2.0
"""A batch job of a million rows whose engine answers at once: how many rows Ray moves in a second,
and that memory does not grow with the rows.

    PYTHONPATH=tests/helpers python tests/soak/batch_stream.py [--rows N] [--replicas N]
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from tiny_models import make_nvium
from vllm_nvium.batch import pipeline
from vllm_nvium.batch.engine import Engine
from vllm_nvium.batch.job import Job, run
from vllm_nvium.batch.results import answered, encoded

PROMPT, ANSWER = "w3 " * 100, "w4 " * 200


class Echo(StatefulStageUDF):
    """In place of `Replica`."""

    def __init__(self, data_column: str, expected_input_keys: list[str], **_: Any) -> None:
        super().__init__(data_column)

    async def udf(self, rows: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        body = {"choices": [{"text": ANSWER}], "usage": {"completion_tokens": 200}}
        for row in rows:
            yield {
                self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
                "result": encoded(answered(int(row["index"]), None, body)),
                "counts": "",
            }


def watch(every: float) -> None:
    """Prints megabytes that processes have to themselves: the command, and with all of Ray."""
    begun, me = time.monotonic(), psutil.Process()
    while True:
        time.sleep(every)
        own = me.memory_full_info().uss
        total = own
        for process in me.children(recursive=True):
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                continue
        seconds = time.monotonic() - begun
        print(f"{seconds:.0f} s: command {own >> 20} MB, all {total >> 20} MB", flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    pipeline.Replica = Echo  # type: ignore[misc,assignment]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        make_nvium(Path(folder) / "model")
        line = json.dumps({"prompt": PROMPT, "max_tokens": 200}) + "\n"
        with source.open("w") as file:
            file.writelines(line for _ in range(args.rows))
        engine = Engine(str(Path(folder) / "model"), {}, {}, {}, True, 256, 1)
        threading.Thread(target=watch, args=(30.0,), daemon=True).start()
        cluster = pipeline.Cluster(replicas=args.replicas)
        print(run(Job(source, output, engine, cluster), print).line())  # noqa: T201
        with output.open() as file:
            ids = [json.loads(line)["id"] for line in file]
    assert ids == [f"row-{index}" for index in range(args.rows)]


if __name__ == "__main__":
    main()
