# SPDX-License-Identifier: Apache-2.0
"""How often copies of a target at low precision say what the target says: the target writes greedy
answers, and every kind of copy that this machine has a kernel for reads them and names the next
token at each position. No engine, and no timing.

    python benchmarks/slim_agreement.py TARGET --prompts humaneval.jsonl gsm8k.jsonl
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measured import read_prompts, set_environment
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_nvium.model_executor.layers.low_precision_kernels import layers_for
from vllm_nvium.model_executor.layers.low_precision_linear import LowPrecisionLinear


def main() -> None:
    args = make_parser().parse_args()
    set_environment()
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    texts = [
        answer(model, ids, args.new_tokens)
        for path in args.prompts
        for ids in tqdm(
            read_prompts(path, str(args.target), args.longest_prompt)[: args.most], path.name
        )
    ]
    own = torch.cat([ids[start:] for ids, start in texts])
    print(f"target {args.target.name}, {len(own)} tokens of {len(texts)} answers\n")
    print("| kind | kernel | says the target's token |")
    print("|---|---|---|")
    for layer in layers_for("cpu"):
        with_copies(model, layer)
        found = torch.cat([said(model, *text) for text in tqdm(texts, layer.kernel)])
        without_copies(model)
        share = float((found == own).double().mean())
        error = (share * (1 - share) / len(own)) ** 0.5
        print(f"| {layer.kind} | {layer.kernel} | {share:.3f} ± {error:.3f} |", flush=True)


@torch.inference_mode()
def answer(model: nn.Module, prompt: list[int], new_tokens: int) -> tuple[torch.Tensor, int]:
    """Ids [T] of a prompt and the target's greedy answer, and where that begins."""
    ids = torch.tensor([prompt])
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    text = generate(ids, attention_mask=ids != -1, max_new_tokens=new_tokens, do_sample=False)
    return text[0], len(prompt)


@torch.inference_mode()
def said(model: nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The most likely token at each position of the answer [T - start]."""
    logits: torch.Tensor = model(ids[None, :-1]).logits
    return logits[0, start - 1 :].argmax(dim=-1)


def with_copies(model: nn.Module, layer: type[LowPrecisionLinear]) -> None:
    """Linear layers, the unembedding among them, multiply with copies where a kernel takes them."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and layer.refusal(*module.weight.shape) is None:
            module.forward = product(layer(module.weight.data), module.bias)  # type: ignore


def without_copies(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("forward", None)


def product(
    copy: LowPrecisionLinear, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        output = copy.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return output if bias is None else output + bias

    return forward


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="checkpoint (Hugging Face folder)")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines")
    parser.add_argument("--most", type=int, default=8, help="prompts of each file")
    parser.add_argument("--longest-prompt", type=int, default=128, help="leave longer ones out")
    parser.add_argument("--new-tokens", type=int, default=64)
    return parser


if __name__ == "__main__":
    main()
