# SPDX-License-Identifier: Apache-2.0
"""Writes what a test of the paper's claim at small scale needs: a tokenizer, and the configurations
of a Quadrivium (three exits) and of a dense twin with as many parameters and a wider MLP.

    python examples/scratch_pair/make_pair.py TEXT OUT

TEXT is a folder that examples/retrofit_smollm2/prepare_text.py wrote (with --bytes 8000000). Then
`vllm-nvium train` with dense.yaml and with nvium.yaml beside this file; see docs/checkpoints.md.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXITS = [2, 4, 6]
# On CPU, at the short context of this training, faster than torch's fused attention.
ATTENTION = {"attn_implementation": "eager"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(args.text / "train").save_pretrained(args.out / "tokenizer")

    nvium = NviumConfig(**SHAPE, exit_layers=EXITS)
    total = sum(size(shape) for shape in expected_shapes(nvium).values())
    own = sum(
        size(shape)
        for name, shape in expected_shapes(nvium).items()
        if name.startswith(("exits.", "final_adapter."))
    )
    # Three matrices of a layer's MLP grow by as much as the exits hold.
    per_unit = 3 * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"]
    wider = SHAPE["intermediate_size"] + round(own / per_unit)
    dense = SHAPE | {"intermediate_size": wider, "model_type": "llama"}
    for name, config in (("nvium", nvium.to_dict()), ("dense", dense)):
        folder = args.out / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | ATTENTION, indent=2) + "\n")
    twin = total - own + per_unit * (wider - SHAPE["intermediate_size"])
    print(f"nvium {total / 1e6:.2f}M parameters, dense twin {twin / 1e6:.2f}M")


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the training text."""
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train(files, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>"
    )


if __name__ == "__main__":
    main()
