# SPDX-License-Identifier: Apache-2.0
"""The formulas once more, in float64, one sequence and one position at a time, from a dictionary of
tensors. They share no code with the package, so that an agreement means something.
"""

import math
from typing import Any

import torch

State = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    half = x.shape[0] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[half + i] * sin
        out[half + i] = x[half + i] * cos + x[i] * sin
    return out


def residuals(state: State, config: Any, tokens: list[int]) -> list[list[torch.Tensor]]:
    """`[layers already run][position]` -> residual stream `[H]` in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    config = config.get_text_config()
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    heads, kv_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
    )

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = state.get(f"{name}.bias")
        out = state[f"{name}.weight"] @ x
        return out if bias is None else out + bias

    stream = [[state["model.embed_tokens.weight"][token] for token in tokens]]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        keys: list[list[torch.Tensor]] = []
        values: list[list[torch.Tensor]] = []
        after = []
        for position, h in enumerate(stream[-1]):
            x = rms_norm(h, state[f"{at}.input_layernorm.weight"], eps)
            parts = {}
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                rows = list(linear(f"{at}.self_attn.{part}_proj", x).view(count, size))
                norm = state.get(f"{at}.self_attn.{part}_norm.weight")
                if norm is not None:
                    rows = [rms_norm(row, norm, eps) for row in rows]
                parts[part] = rows if part == "v" else [rotate(r, position, theta) for r in rows]
            keys.append(parts["k"])
            values.append(parts["v"])
            mixed = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = torch.stack([parts["q"][head] @ key[kv] for key in keys])
                weights = torch.softmax(scores / math.sqrt(size), dim=0)
                mixed.append(sum(w * v[kv] for w, v in zip(weights, values, strict=True)))
            h = h + linear(f"{at}.self_attn.o_proj", torch.cat(mixed))
            x = rms_norm(h, state[f"{at}.post_attention_layernorm.weight"], eps)
            gate, up = linear(f"{at}.mlp.gate_proj", x), linear(f"{at}.mlp.up_proj", x)
            after.append(h + linear(f"{at}.mlp.down_proj", silu(gate) * up))
        stream.append(after)
    return stream


def mixture(hazards: list[torch.Tensor], heads: list[torch.Tensor]) -> torch.Tensor:
    """`p_mix` `[V]` from N-1 hazards and N distributions `[V]`."""
    reached = torch.tensor(1.0, dtype=torch.float64)
    total = torch.zeros_like(heads[0])
    for hazard, head in zip(hazards, heads, strict=False):
        total = total + reached * hazard * head
        reached = reached * (1 - hazard)
    return total + reached * heads[-1]


def nvium(state: State, config: Any, tokens: list[int]) -> torch.Tensor:
    """`log p_mix` `[T, V]` of an N-vium checkpoint in this project's names."""
    stream = residuals(state, config, tokens)
    state = {name: tensor.double() for name, tensor in state.items()}
    eps = config.rms_norm_eps
    embeddings = state["model.embed_tokens.weight"]
    final_unembedding = embeddings if config.tie_word_embeddings else state["lm_head.weight"]

    def adapt(name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.fc1.weight" not in state:
            return x
        inner = silu(state[f"{name}.fc1.weight"] @ x)
        return x + state[f"{name}.fc2.weight"] @ inner

    rows = []
    for position in range(len(tokens)):
        hazards, heads = [], []
        for k, layer in enumerate(config.exit_layers):
            n = rms_norm(stream[layer][position], state[f"exits.{k}.norm.weight"], eps)
            unembedding = {
                "final": final_unembedding,
                "embeddings": embeddings,
                "own": state.get(f"exits.{k}.lm_head.weight"),
            }[config.exit_head]
            heads.append(torch.softmax(unembedding @ adapt(f"exits.{k}.adapter", n), dim=0))
            r, at = n, f"exits.{k}.router"
            for j in range(config.router_num_blocks):
                block = f"{at}.blocks.{j}"
                r = gelu(state[f"{block}.fc1.weight"] @ r + state[f"{block}.fc1.bias"])
                r = state[f"{block}.fc2.weight"] @ r + state[f"{block}.fc2.bias"]
            r = rms_norm(r, state[f"{at}.norm.weight"], eps)
            c, e = state[f"{at}.head.weight"] @ r + state[f"{at}.head.bias"]
            hazards.append(torch.exp(e) / (torch.exp(c) + torch.exp(e)))
        n = rms_norm(stream[-1][position], state["model.norm.weight"], eps)
        heads.append(torch.softmax(final_unembedding @ adapt("final_adapter", n), dim=0))
        rows.append(mixture(hazards, heads).log())
    return torch.stack(rows)


def release(state: State, config: Any, experiment: dict[str, Any], tokens: list[int]) -> Any:
    """`log p_mix` `[T, V]` of a checkpoint in the authors' names, with all tensors spelt out.

    `config` is the Llama configuration, `experiment` the YAML. Tied matrices are looked up by the
    tying fields and never read from the state.
    """
    stream = residuals(state, config, tokens)
    state = {name: tensor.double() for name, tensor in state.items()}
    eps, tying = config.rms_norm_eps, experiment["tying"]
    temperature = experiment["router"].get("router_temp", 1.0) or 1.0
    embeddings = state["model.embed_tokens.weight"]
    final = embeddings if tying["tie_final_to_embeddings"] else state["lm_head.weight"]

    def adapt(first: str, second: str, x: torch.Tensor) -> torch.Tensor:
        return x + state[second] @ silu(state[first] @ x)

    rows = []
    for position in range(len(tokens)):
        hazards, heads = [], []
        for k, layer in enumerate(experiment["early_layer_idx"]):
            n = rms_norm(stream[layer][position], state[f"early_norms.{k}.weight"], eps)
            u = n
            if experiment["early_adapter"]["enabled"]:
                u = adapt(f"early_adapters.{k}.0.weight", f"early_adapters.{k}.2.weight", n)
            if tying["tie_early_to_final"]:
                matrix = final
            elif tying["tie_early_to_embeddings"]:
                matrix = embeddings
            else:
                matrix = state[f"early_lm_heads.{k}.weight"]
            heads.append(torch.softmax(matrix @ u, dim=0))
            r = n
            for j in range(experiment["router"]["num_layers"]):
                at = f"router_layers.{k}.layers.{j}"
                r = gelu(state[f"{at}.fc1.weight"] @ r + state[f"{at}.fc1.bias"])
                r = state[f"{at}.fc2.weight"] @ r + state[f"{at}.fc2.bias"]
            r = rms_norm(r, state[f"router_final_norms.{k}.weight"], eps)
            logits = state[f"router_heads.{k}.weight"] @ r + state[f"router_heads.{k}.bias"]
            hazards.append(torch.softmax(logits / temperature, dim=0)[1])
        u = rms_norm(stream[-1][position], state["model.norm.weight"], eps)
        if experiment["final_adapter"]["enabled"]:
            u = adapt("final_adapter.0.weight", "final_adapter.2.weight", u)
        heads.append(torch.softmax(final @ u, dim=0))
        rows.append(mixture(hazards, heads).log())
    return torch.stack(rows)
