# SPDX-License-Identifier: Apache-2.0
"""The configuration of an N-vium checkpoint: that of its dense parent, plus the exits. vLLM, the
transformers reference and the converters all read this one class, and it refuses what none of them
could run.
"""

from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.families import FAMILIES, Family
from vllm_nvium.model_executor.models.parent import check_sizes, is_int, parent_of

EXIT_HEADS = ("final", "embeddings", "own")
# Field of the exits -> its smallest value.
EXIT_SIZES = {
    "exit_adapter_size": 0,
    "final_adapter_size": 0,
    "router_intermediate_size": 1,
    "router_hidden_size": 1,
    "router_num_blocks": 1,
}


def default_router_intermediate_size(hidden_size: int) -> int:
    """Width of a router's inner layer: about 0.66 H, as in the paper, to a multiple of 32."""
    return max(32, round(0.66 * hidden_size / 32) * 32)


def _parents(name: str) -> Any:
    """A field of the parent's configuration as one of this configuration."""

    def get(self: "NviumConfig") -> Any:
        return getattr(self.parent, name)

    def put(self: "NviumConfig", value: Any) -> None:
        setattr(self.parent, name, value)

    return property(get, put)


class NviumConfig(PretrainedConfig):
    """Configuration of `NviumForCausalLM` (arXiv:2605.13190, section 3).

    - `text_config`: the dense parent's own configuration, whose `model_type` is in `FAMILIES`. The
      name is the one under which vLLM and transformers look for the language model of a larger
      configuration. Checkpoints that were written before there were families have the fields of
      `transformers.LlamaConfig` beside those of the exits instead, and perhaps `qkv_bias` (Qwen2)
      or `qk_norm` (Qwen3); see `parent.py`.

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
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict[str, Any] | PretrainedConfig | None = None
    # A tuple, because a dataclass refuses a mutable default; `__post_init__` makes it a list.
    exit_layers: list[int] | tuple[int, ...] = (8, 16, 24)
    exit_adapter_size: int | None = None
    final_adapter_size: int | None = None
    router_intermediate_size: int | None = None
    router_hidden_size: int | None = None
    router_num_blocks: int = 1
    exit_head: Literal["final", "embeddings", "own"] = "final"
    greedy_margin: float = 0.0

    # What the exits, training and evaluation ask of the parent.
    vocab_size = _parents("vocab_size")
    hidden_size = _parents("hidden_size")
    num_hidden_layers = _parents("num_hidden_layers")
    rms_norm_eps = _parents("rms_norm_eps")
    max_position_embeddings = _parents("max_position_embeddings")
    initializer_range = _parents("initializer_range")
    tie_word_embeddings = _parents("tie_word_embeddings")
    use_cache = _parents("use_cache")

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "architectures", None) is None:
            self.architectures: list[str] | None = ["NviumForCausalLM"]
        self.text_config = parent_of(self.text_config, kwargs)
        hidden = self.hidden_size
        if self.exit_adapter_size is None:
            self.exit_adapter_size = hidden
        if self.final_adapter_size is None:
            self.final_adapter_size = hidden
        if self.router_intermediate_size is None:
            self.router_intermediate_size = default_router_intermediate_size(hidden)
        if self.router_hidden_size is None:
            self.router_hidden_size = hidden
        check_sizes(vars(self), EXIT_SIZES)
        self._validate_exits()
        super().__post_init__(**kwargs)

    @property
    def parent(self) -> Any:
        """`text_config`, which is a configuration of transformers from `__post_init__` on."""
        return self.text_config

    @property
    def family(self) -> Family:
        """The row of the parent's family."""
        return FAMILIES[self.parent.model_type]

    @property
    def num_heads_of_mixture(self) -> int:
        """N: the early exits and the final head."""
        return len(self.exit_layers) + 1

    def _validate_exits(self) -> None:
        layers, last = self.exit_layers, self.num_hidden_layers - 1
        if not isinstance(layers, list | tuple) or not all(is_int(layer) for layer in layers):
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
