# SPDX-License-Identifier: Apache-2.0
"""The configuration of an N-vium checkpoint: a Llama-family transformer plus its exits. vLLM, the
transformers reference and the converters all read this one class, and it refuses what none of them
could run.
"""

from typing import Any, Literal

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from vllm_nvium.errors import UserError

EXIT_HEADS = ("final", "embeddings", "own")


def default_router_intermediate_size(hidden_size: int) -> int:
    """Width of a router's inner layer: about 0.66 H, as in the paper, to a multiple of 32."""
    return max(32, round(0.66 * hidden_size / 32) * 32)


class NviumConfig(PretrainedConfig):
    """Configuration of `NviumForCausalLM` (arXiv:2605.13190, section 3).

    The Llama fields mean what they mean in `transformers.LlamaConfig`. Three more let one class
    describe the dense families that can be converted:

    - `qkv_bias`: biases on the q, k and v projections only (Qwen2). `attention_bias` puts them on
      all four projections (Llama) and so implies `qkv_bias`.
    - `qk_norm`: an RMSNorm over each query and key head before the rotation (Qwen3).
    - `head_dim`: independent of `hidden_size / num_attention_heads`.

    Fields of the exits (H = `hidden_size`, V = `vocab_size`):

    - `exit_layers`: layers already run at each exit, strictly increasing, each in
      `1 .. num_hidden_layers - 1`. The final head is not listed.
    - `exit_adapter_size`: inner width of the residual adapter at every exit, 0 for no adapter;
      H when not given.
    - `final_adapter_size`: the same for the final head.
    - `router_intermediate_size`: inner width of a router's blocks; about 0.66 H when not given.
    - `router_hidden_size`: output width R of a router's blocks; H when not given.
    - `router_num_blocks`: blocks of a router, one after the other; the first reads H, the others R.
    - `exit_head`: which unembedding the exits use: `"final"` (the final head's), `"embeddings"`
      (the embedding matrix), or `"own"` (one `[V, H]` matrix per exit).
    - `greedy_margin`: at temperature 0 a token leaves at the first exit whose log-odds of leaving
      `e_k - c_k` exceed this. 0, a hazard above one half, is the paper's release; training may
      find that exits speak well alone only where their routers are surer than that.

    Raises:
        UserError: a field has a value that no N-vium model can have; the message is one sentence
            with the field, its value and what would be right.
    """

    model_type = "nvium"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    qk_norm: bool = False
    mlp_bias: bool = False
    # A tuple, because a dataclass refuses a mutable default; `__post_init__` makes it a list.
    exit_layers: list[int] | tuple[int, ...] = (8, 16, 24)
    exit_adapter_size: int | None = None
    final_adapter_size: int | None = None
    router_intermediate_size: int | None = None
    router_hidden_size: int | None = None
    router_num_blocks: int = 1
    exit_head: Literal["final", "embeddings", "own"] = "final"
    greedy_margin: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "architectures", None) is None:
            self.architectures: list[str] | None = ["NviumForCausalLM"]
        self._validate_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size is {self.hidden_size}, and without head_dim it must be a "
                    f"multiple of num_attention_heads = {self.num_attention_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.exit_adapter_size is None:
            self.exit_adapter_size = self.hidden_size
        if self.final_adapter_size is None:
            self.final_adapter_size = self.hidden_size
        if self.router_intermediate_size is None:
            self.router_intermediate_size = default_router_intermediate_size(self.hidden_size)
        if self.router_hidden_size is None:
            self.router_hidden_size = self.hidden_size
        # vLLM's Llama reads `qkv_bias` for q, k, v and `attention_bias` for o: both must say yes.
        self.qkv_bias = bool(self.qkv_bias or self.attention_bias)
        self._validate_attention()
        self._refuse_sliding_window(kwargs)
        self._validate_exits()
        if self.rope_parameters is not None:
            # The base class fills in missing keys; the caller's dictionary is not ours to change.
            self.rope_parameters = dict(self.rope_parameters)
        super().__post_init__(**kwargs)
        self._validate_rope_is_whole_head()

    @property
    def num_heads_of_mixture(self) -> int:
        """N: the early exits and the final head."""
        return len(self.exit_layers) + 1

    def _validate_sizes(self) -> None:
        for field, smallest in (
            ("vocab_size", 1),
            ("hidden_size", 1),
            ("intermediate_size", 1),
            ("num_hidden_layers", 2),  # an exit needs a layer below and a layer above
            ("num_attention_heads", 1),
            ("num_key_value_heads", 1),
            ("head_dim", 1),
            ("max_position_embeddings", 1),
            ("exit_adapter_size", 0),
            ("final_adapter_size", 0),
            ("router_intermediate_size", 1),
            ("router_hidden_size", 1),
            ("router_num_blocks", 1),
        ):
            value = getattr(self, field)
            may_be_none = getattr(type(self), field, 0) is None
            if value is None and may_be_none:
                continue
            if not _is_int(value) or value < smallest:
                raise UserError(f"{field} is {value!r}, and an integer >= {smallest} is needed.")

    def _validate_attention(self) -> None:
        if self.hidden_act != "silu":
            raise UserError(
                f"hidden_act is {self.hidden_act!r}, and only 'silu' is implemented for N-vium."
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        assert kv_heads is not None and self.head_dim is not None  # filled in just before
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads is {heads}, and it must be a multiple of "
                f"num_key_value_heads = {kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}, and rotary embeddings need an even number."
            )

    def _refuse_sliding_window(self, kwargs: dict[str, Any]) -> None:
        """Refuse a window in use, and forget one that is not: vLLM would read the leftovers."""
        window = kwargs.pop("sliding_window", None)
        in_use = kwargs.pop("use_sliding_window", window is not None)
        layer_types = kwargs.pop("layer_types", None)
        kwargs.pop("max_window_layers", None)
        if in_use and window is not None:
            raise UserError(
                f"sliding_window is {window!r}, and N-vium attends to the whole context, so it "
                "must be null (or use_sliding_window false)."
            )
        other = sorted({str(kind) for kind in layer_types or ()} - {"full_attention"})
        if other:
            raise UserError(
                f"layer_types contains {other[0]!r}, and every layer of N-vium must be "
                "'full_attention'."
            )

    def _validate_exits(self) -> None:
        layers, last = self.exit_layers, self.num_hidden_layers - 1
        if not isinstance(layers, list | tuple) or not all(_is_int(layer) for layer in layers):
            raise UserError(f"exit_layers is {layers!r}, and a list of integers is needed.")
        if not layers:
            raise UserError("exit_layers is empty, and at least one early exit is needed.")
        for layer in layers:
            if not 1 <= layer <= last:
                raise UserError(
                    f"exit_layers contains {layer}, and with num_hidden_layers = "
                    f"{self.num_hidden_layers} every exit must lie in 1..{last}."
                )
        if list(layers) != sorted(set(layers)):
            raise UserError(
                f"exit_layers is {list(layers)}, and it must be strictly increasing, as in "
                f"{sorted(set(layers))}."
            )
        self.exit_layers = list(layers)
        if self.exit_head not in EXIT_HEADS:
            raise UserError(
                f"exit_head is {self.exit_head!r}, and it must be one of "
                f"{', '.join(map(repr, EXIT_HEADS))}."
            )
        margin = self.greedy_margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or margin != margin:
            raise UserError(f"greedy_margin is {margin!r}, and a number is needed.")
        self.greedy_margin = float(margin)

    def _validate_rope_is_whole_head(self) -> None:
        # transformers' Llama rotates the whole head whatever this says, vLLM obeys it: the two
        # would disagree without a word.
        partial = (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise UserError(
                f"rope_parameters.partial_rotary_factor is {partial!r}, and N-vium rotates whole "
                "heads, so it must be 1.0 or absent."
            )


def _is_int(value: object) -> bool:
    """A true integer: `True` counts as one in Python, but not as a size."""
    return isinstance(value, int) and not isinstance(value, bool)
