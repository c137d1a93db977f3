# SPDX-License-Identifier: Apache-2.0
"""What `vllm_nvium` offers by name."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import vllm_nvium
from tiny_models import make_nvium


def test_every_public_name_is_there() -> None:
    for name in vllm_nvium.__all__:
        assert getattr(vllm_nvium, name) is not None
    assert set(vllm_nvium.__all__) - set(vllm_nvium._WHERE) == {"UserError", "__version__"}
    assert set(vllm_nvium.__all__) <= set(dir(vllm_nvium))


def test_importing_the_package_imports_nothing_large() -> None:
    code = (
        "import sys, json, vllm_nvium, vllm_nvium as v; v.UserError;"
        "print(json.dumps([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []


def test_options_become_what_an_engine_is_given() -> None:
    options = vllm_nvium.NviumOptions(sampling="mixture", max_deferred=8)
    assert options.to_config() == {"nvium_sampling": "mixture", "nvium_max_deferred": 8}
    assert vllm_nvium.NviumOptions().to_config() == {}
    via_sd = vllm_nvium.ViaSDOptions(mask="even:0.3", window=8)
    assert vllm_nvium.ViaSDOptions.from_config(via_sd.to_config()) == via_sd


def test_transformers_reads_a_checkpoint_after_one_call(tmp_path: Path) -> None:
    made = make_nvium(tmp_path / "nvium")
    vllm_nvium.register_with_transformers()
    tokens = torch.tensor([[5, 6, 7]])
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "nvium"),
        vllm_nvium.load_reference(tmp_path / "nvium"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, made(tokens).logits)
