# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints made on the fly: dense models of every family that can be converted, and
N-vium models whose heads disagree and whose routers really choose. Every folder has a tokenizer, so
that vLLM can serve it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

BOS, EOS, PAD = 0, 1, 2

DENSE_KINDS: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# Layers of two kinds, with and without a sliding window.
SLIDING_KINDS = ("gemma2", "gemma3")

# head_dim 32 is the smallest head that vLLM's CPU attention accepts.
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of whole words: `w3 w4 ...` are 3, 4, ... after `<s>`, `</s>`, `<pad>`."""
    names = ["<s>", "</s>", "<pad>"] + [f"w{i}" for i in range(3, vocab_size)]
    word_level = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    tokenizer = Tokenizer(word_level)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    ).save_pretrained(path)


def save_character_tokenizer(path: Path) -> None:
    """A tokenizer of single characters: `<s>`, `</s>`, `<pad>`, then those of ASCII from 3 on."""
    names = ["<s>", "</s>", "<pad>", *map(chr, range(32, 127))]
    characters = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    tokenizer = Tokenizer(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    # guidance has to see how tokens become bytes; no token here is a byte.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
    ).save_pretrained(path)


def randomise_vectors(model: PreTrainedModel, seed: int) -> None:
    """Give norms and biases random values: freshly made ones (1 and 0) would hide mistakes."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * noise if name.endswith("bias") else 1.0 + 0.2 * noise)


def dense_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny dense model.

    Args:
        kind: a key of `DENSE_KINDS`.
        overrides: fields that replace those of `SIZES`.
    """
    fields = dict(SIZES)
    if kind in ("qwen3", "qwen3_moe"):
        fields["head_dim"] = 32
    if kind == "qwen3_moe":  # a layer without experts among those that have them
        fields |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        fields |= {"norm_topk_prob": True, "mlp_only_layers": [1]}
    if kind == "mistral":
        fields["sliding_window"] = None
    if kind in SLIDING_KINDS:
        fields |= {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
        fields["layer_types"] = ["sliding_attention", "full_attention"] * 2
        fields["attn_implementation"] = "eager"  # the one that caps attention's logits
    return DENSE_KINDS[kind][0](**(fields | overrides))


def make_dense(
    path: str | Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    bigrams: float = 0.0,
    whisper: float = 1.0,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny random dense checkpoint to `path` and return the model (in eval mode).

    Args:
        kind: a key of `DENSE_KINDS`.
        bigrams: weight of a table of next tokens that all models made with it share, so that they
            often agree whatever their sizes are.
        whisper: factor of what each layer adds; the smaller, the less it matters to skip one.
        overrides: configuration fields that replace those of `SIZES`.
    """
    torch.manual_seed(seed)
    model = DENSE_KINDS[kind][1](dense_config(kind, **overrides)).to(dtype).eval()
    randomise_vectors(model, seed)
    if bigrams:
        _share_bigrams(model, bigrams)
    if whisper != 1.0:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(whisper)
                layer.mlp.down_proj.weight.mul_(whisper)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(Path(path), model.config.vocab_size)
    return model


def make_eagle(path: str | Path, method: str, target: PreTrainedModel, seed: int = 7) -> None:
    """Write a random EAGLE or EAGLE-3 head of one layer for a Llama `target` to `path`. It says
    mostly what follows from the token alone, as targets made with `bigrams` do.

    Args:
        method: `"eagle"` (reads the target's last states) or `"eagle3"` (states of three layers).
    """
    config = LlamaConfig(**(target.config.to_dict() | {"num_hidden_layers": 1}))
    torch.manual_seed(seed)
    layer = LlamaForCausalLM(config).model.layers[0].state_dict()
    hidden = config.hidden_size
    states = {"eagle": 1, "eagle3": 3}[method]
    inputs = hidden * (states + (method == "eagle"))
    tensors = {"fc.weight": 0.02 * torch.randn(hidden, inputs)}
    if method == "eagle":
        tensors["fc.weight"] = torch.eye(hidden, inputs)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer[f"{name}.weight"] *= 0.1
        del layer["input_layernorm.weight"]
        tensors |= {f"layers.0.{name}": tensor for name, tensor in layer.items()}
        config.architectures = ["LlamaForCausalLM"]
    else:
        for name in ("q_proj", "k_proj", "v_proj"):  # embedding and state side by side
            weight = layer[f"self_attn.{name}.weight"]
            layer[f"self_attn.{name}.weight"] = torch.cat([weight, weight], dim=1)
        _attend_to_the_own_token(layer)
        layer["hidden_norm.weight"] = torch.ones(hidden)
        tensors |= {f"midlayer.{name}": tensor for name, tensor in layer.items()}
        tensors["norm.weight"] = torch.ones(hidden)
        tensors["lm_head.weight"] = target.get_output_embeddings().weight.detach().clone()
        config.architectures = ["LlamaForCausalLMEagle3"]
        config.eagle_aux_hidden_state_layer_ids = [1, 2, 3]
    Path(path).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file({k: v.contiguous() for k, v in tensors.items()}, Path(path) / "model.safetensors")


def _attend_to_the_own_token(layer: dict[str, torch.Tensor], rank: int = 16) -> None:
    """Lets the first head of an EAGLE-3 layer, whose residual stream has states and no embeddings,
    put the first columns of the token's own embedding there, and weakens everything else."""
    chosen = torch.eye(rank)
    for name, factor in (("q_proj", 3.0), ("k_proj", 3.0), ("v_proj", 1.0)):
        rows = layer[f"self_attn.{name}.weight"]
        rows[: 2 * rank] = 0.0
        rows[:rank, :rank] = factor * chosen
    layer["self_attn.o_proj.weight"] *= 0.1
    layer["self_attn.o_proj.weight"][:rank, :rank] = 4.0 * chosen
    layer["mlp.down_proj.weight"] *= 0.1


def make_mimo(path: str | Path, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a random MiMo checkpoint: Qwen2 with a head that reads the last states and predicts a
    token more, mostly what follows from the token before it alone. transformers has no class of it,
    so the folder brings its configuration."""
    path = Path(path)
    model = make_dense(path, "qwen2", seed=seed, **overrides)
    hidden = model.config.hidden_size
    torch.manual_seed(seed + 1)
    head = {f"{name}layernorm.weight": torch.ones(hidden) for name in ("token_", "hidden_")}
    head |= {"final_layernorm.weight": torch.ones(hidden)}
    head |= {"input_proj.weight": torch.eye(2 * hidden)[hidden:]}
    layer = type(model)(model.config).model.layers[0].state_dict()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer[f"{name}.weight"] *= 0.1
    head |= layer
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.mtp_layers.0.{name}": tensor.clone() for name, tensor in head.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    config |= {"num_nextn_predict_layers": 1}
    config |= {"auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_mimo.py").write_text(
        "from transformers import Qwen2Config\n\n\n"
        'class MiMoConfig(Qwen2Config):\n    model_type = "mimo"\n'
    )
    return model


def _share_bigrams(model: PreTrainedModel, weight: float, rank: int = 16) -> None:
    """Makes the first columns of embedding and unembedding those that all such models have."""
    generator = torch.Generator().manual_seed(0)
    rows = model.config.vocab_size
    left, right = (torch.randn(rows, rank, generator=generator) for _ in range(2))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :rank] = left
        model.get_output_embeddings().weight[:, :rank] = weight * right


def make_nvium(
    path: str | Path,
    *,
    exit_layers: Sequence[int] = (1, 2, 3),
    hazards: Sequence[float] | None = None,
    seed: int = 0,
    tied: bool = False,
    exit_head: str = "final",
    dtype: torch.dtype = torch.float32,
    router_scale: float = 2.5,
    parent: PreTrainedConfig | None = None,
    **overrides: Any,
) -> NviumForCausalLM:
    """Write a tiny random N-vium checkpoint to `path` and return the model (in eval mode).

    Adapters are far from the identity, heads disagree, and random routers give hazards that differ
    between tokens over most of (0, 1).

    Args:
        hazards: constant hazards, one per exit (0 and 1 are exact), or `None` for random routers.
        router_scale: standard deviation over tokens of the margins of random routers; their mean
            is -0.3, so every exit and the final head are used.
        parent: what the layers are those of; a Llama with `SIZES` when not given.
        overrides: configuration fields, which replace those of `SIZES`.
    """
    sizes = SIZES | {"tie_word_embeddings": tied} if parent is None else {"text_config": parent}
    config = NviumConfig(
        **(
            sizes
            | {
                "exit_layers": list(exit_layers),
                "exit_head": exit_head,
                "exit_adapter_size": 48,
                "final_adapter_size": 40,
                "router_intermediate_size": 32,
                "router_hidden_size": 64,
            }
            | overrides
        )
    )
    if hazards is not None and len(hazards) != len(config.exit_layers):
        raise ValueError(f"{len(hazards)} hazards for {len(config.exit_layers)} exits")
    torch.manual_seed(seed)
    model = NviumForCausalLM(config).eval()
    randomise_vectors(model, seed)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith("norm.weight"):  # still about one, with what the family adds
                parameter -= config.family.norm_offset
    generator = torch.Generator().manual_seed(seed + 2)

    def fill(parameter: torch.Tensor, std: float) -> None:
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        adapters = [exit.adapter for exit in model.exits] + [model.final_adapter]
        for adapter in adapters:
            if adapter is not None:  # a fresh one is the identity
                fill(adapter.fc2.weight, 0.5)
        for k, exit in enumerate(model.exits):
            head = exit.router.head
            if hazards is None:
                fill(head.weight, 1.0)
                fill(head.bias, 0.5)
            else:
                head.weight.zero_()
                head.bias.copy_(torch.tensor([0.0, hazard_logit(hazards[k])]))
        if hazards is None:
            _spread_margins(model, generator, router_scale)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(path)
    save_tokenizer(Path(path), config.vocab_size)
    return model


def _spread_margins(model: NviumForCausalLM, generator: torch.Generator, std: float) -> None:
    """Rescale router heads: what a random body has in common for all tokens would decide."""
    tokens = torch.randint(3, model.config.vocab_size, (4, 64), generator=generator)
    margins = model(tokens, use_cache=False, compute_logits=False).margins  # [4, 64, N-1]
    for k, exit in enumerate(model.exits):
        scale = std / margins[..., k].std()
        head = exit.router.head
        head.weight.mul_(scale)
        head.bias.mul_(scale)
        head.bias[1] -= scale * margins[..., k].mean() + 0.3


def hazard_logit(hazard: float) -> float:
    """Log-odds of a hazard, with +-1e4 standing for 1 and 0 (exact after a float32 sigmoid)."""
    if hazard in (0.0, 1.0):
        return 1e4 if hazard else -1e4
    return math.log(hazard) - math.log1p(-hazard)


def quantise_to_int8(path: str | Path, strategy: str = "channel") -> dict[str, torch.Tensor]:
    """Rewrites a dense checkpoint as compressed-tensors stores one in eight bits, with activations
    that are rounded as they come.

    Args:
        strategy: `"channel"` (a scale per output) or `"tensor"` (one per weight).

    Returns:
        what the weights stand for, float32, by their names.
    """
    file = Path(path) / "model.safetensors"
    tensors, meant = {}, {}
    for name, weight in load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        scale = (largest if strategy == "channel" else largest.amax().reshape(1)) / 127
        levels = (weight.float() / scale).round().to(torch.int8)
        tensors |= {name: levels, f"{name}_scale": scale}
        meant[name] = levels.float() * scale
    save_file(tensors, file, {"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": strategy, "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((Path(path) / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (Path(path) / "config.json").write_text(json.dumps(config))
    return meant
