# SPDX-License-Identifier: Apache-2.0
"""A batch job as a user starts it, on a real Ray: a replica is killed, then the command, and the
same command goes on. Every row has one result, equal to that of an engine left in peace."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_nvium.batch.journal import folder_of
from vllm_nvium.batch.rows import row_seed

pytest.importorskip("ray")

ROWS, SEED = 200, 3
BAD: dict[int, tuple[Any, str]] = {
    11: ("{no json", "not JSON"),
    50: ({"prompt": "w3", "temprature": 1}, "unknown field 'temprature'"),
    77: ({"prompt": "w3", "vllm_xargs": {"nvium_max_deferred": "many"}}, "nvium_max_deferred"),
    120: ({"custom_id": "b", "url": "/v1/embeddings", "body": {}}, "url"),
    199: ({"prompt": " ".join(["w3"] * 600), "max_tokens": 4}, "512"),
}


def row(index: int) -> dict[str, Any]:
    """Prompts and chats, seeded by the job and by themselves, greedy, and with options."""
    draw = random.Random(index)
    text = " ".join(f"w{draw.randrange(3, 250)}" for _ in range(draw.randrange(1, 30)))
    found: dict[str, Any] = {"max_tokens": draw.randrange(40, 80), "ignore_eos": True}
    found["temperature"] = draw.choice([0.0, 0.7, 1.0])
    if index % 7 == 0:
        found["seed"] = index
    if index % 5 == 0:
        found["vllm_xargs"] = {"nvium_max_deferred": index % 4, "nvium_sampling": None}
    if index % 3 == 0:
        return found | {"prompt": text}
    chat = found | {"messages": [{"role": "user", "content": text}]}
    if index % 3 == 1:
        return chat
    return {
        "custom_id": f"row {index}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": chat,
    }


def text_of(entry: Any) -> str:
    return entry if isinstance(entry, str) else json.dumps(entry)


def undisturbed(checkpoint: Path) -> dict[int, str]:
    """The text of every good row, out of `vllm.LLM`."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(checkpoint), dtype="float32", enforce_eager=True, disable_log_stats=True)
    indices, prompts, params = [], [], []
    for index in range(ROWS):
        if index in BAD:
            continue
        body = row(index)
        body = body.get("body", body)
        text = body.get("prompt") or body["messages"][0]["content"] + " "
        extra = {k: v for k, v in body.get("vllm_xargs", {}).items() if v is not None}
        indices.append(index)
        prompts.append(text)
        params.append(
            SamplingParams(
                temperature=body["temperature"],
                max_tokens=body["max_tokens"],
                ignore_eos=True,
                seed=body.get("seed", row_seed(SEED, index)),
                extra_args=extra or None,
            )
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {i: output.outputs[0].text for i, output in zip(indices, outputs, strict=True)}


def written(output: Path) -> dict[int, bytes]:
    """Whole lines in the folder of the job, by row; no row may stand there twice."""
    found: dict[int, bytes] = {}
    for shard in sorted(folder_of(output).glob("rows-*.jsonl")):
        for line in shard.read_bytes().split(b"\n")[:-1]:
            index, _, text = line.partition(b"\t")
            assert int(index) not in found
            found[int(index)] = text
    return found


def wait_for(what: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + 800
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])


def replicas_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those that have an engine."""
    found = []
    for worker in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(worker.cmdline()) and worker.children():
                found.append(worker)
        except psutil.NoSuchProcess:
            pass  # one of Ray's many, which has ended since it was listed
    return found


def name_of(process: psutil.Process) -> str:
    """Empty for one that has ended since it was listed."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.timeout(2000)
@pytest.mark.usefixtures("read_environment")
def test_a_job_survives_the_death_of_a_replica_and_of_itself(
    tmp_path: Path, nvium_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No process of its own for the worker of an engine: one start less to wait for.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    source, output, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log"))
    entries = [BAD[index][0] if index in BAD else row(index) for index in range(ROWS)]
    source.write_text("\n".join(map(text_of, entries)) + "\n")
    command = [sys.executable, "-m", "vllm_nvium.cli", "batch", str(source), str(output)]
    command += ["--model", str(nvium_checkpoint), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "4", "--seed", str(SEED), "--engine-logs"]

    def start(replicas: int) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            more = ["--replicas", str(replicas)]
            return subprocess.Popen([*command, *more], stdout=file, stderr=file)

    process = start(2)
    engines: list[psutil.Process] = []
    try:
        wait_for(lambda: len(written(output)) >= 20, process, log)
        [first, *_] = wait_for(lambda: replicas_of(process), process, log)
        engines += first.children(recursive=True)
        first.kill()
        before = len(written(output))
        wait_for(lambda: len(written(output)) >= max(before + 20, 60), process, log)
        # Ray's agents stay a little longer.
        every = psutil.Process(process.pid).children(recursive=True)
        engines += [one for one in every if not name_of(one).endswith("Agent")]
        process.kill()
        process.wait()
    finally:
        process.kill()
    kept = written(output)
    assert 60 <= len(kept) < ROWS, "the rows are too short for this test"
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive, "processes that outlive the job"

    process = start(1)  # how many there are may be changed
    try:
        again = process.wait(800)
    finally:
        process.send_signal(signal.SIGTERM)
    assert again == 0, log.read_text()[-4000:]
    assert sorted(tmp_path.iterdir()) == sorted([source, output, log])
    assert f"{len(kept)} of {ROWS} rows have their result already" in log.read_text()

    lines = output.read_bytes().splitlines()
    assert len(lines) == ROWS
    # Their ids are random, so these were not run again.
    assert all(lines[index] == text for index, text in kept.items())
    expected = undisturbed(nvium_checkpoint)
    for index, result in enumerate(map(json.loads, lines)):
        assert result["id"] == f"row-{index}"
        body = result["response"]["body"]
        if index in BAD:
            assert BAD[index][1] in result["error"]["message"], result
            assert result["response"]["status_code"] == 400
            continue
        assert result["error"] is None, result
        [choice] = body["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert text == expected[index], index
        assert choice["finish_reason"] == "length"
        asked = row(index).get("body", row(index))["max_tokens"]
        assert body["usage"]["completion_tokens"] == asked
        assert result["custom_id"] == (f"row {index}" if index % 3 == 2 else None)
