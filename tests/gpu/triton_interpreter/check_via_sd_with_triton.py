# SPDX-License-Identifier: Apache-2.0
"""VIA-SD on a CPU build that has Triton, where Model Runner V2 is vLLM's default. Run by
`test_via_sd_with_triton.py` in a process of its own."""

from pathlib import Path

from trace_engine import Arrival
from via_sd_engine import NGRAM, ViaSDEngine, check_greedy_tokens
from vllm import EngineArgs, SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tiny_models import make_dense


def test_the_engine_runs_on_v1_and_the_next_one_has_vllms_choice(tmp_path: Path) -> None:
    reference = make_dense(tmp_path, seed=1, bigrams=0.7)
    plain = EngineArgs(str(tmp_path), max_model_len=256)
    assert plain.create_engine_config().use_v2_model_runner
    options = {"mask": "2", "window": 8, "rounds": 2}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, num_gpu_blocks_override=20)
    assert isinstance(engine.runner, CPUModelRunner)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    # Without top-p: the interpreter does not know the kernel.
    drawn = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True)
    tokens = engine.run([Arrival(0, prompt, greedy), Arrival(0, [*prompt, 9], drawn)])
    check_greedy_tokens(reference, prompt, tokens["0"].tokens)
    assert len(tokens["0"].tokens) == 12 and len(tokens["1"].tokens) == 6
    assert any(rounds > 0 for rounds in engine.window_rounds)
    assert plain.create_engine_config().use_v2_model_runner
