# SPDX-License-Identifier: Apache-2.0
"""Some layers of a decoder as a module that vLLM compiles by itself: N-vium's segments and VIA-SD's
slim pass. vLLM names the artefact of a compiled module after the qualified name and the line of its
`forward`, with names of its attention layers inside, so modules that shared one would load each
other's: each gets a class and a `forward` of its own.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig


def make_slice(
    name: str,
    base: type[nn.Module],
    forward: Callable[..., Any],
    dynamic_dims: Mapping[str, int],
    tag: str,
    vllm_config: VllmConfig,
    init: Callable[..., None] | None = None,
    **arguments: Any,
) -> nn.Module:
    """An instance of a new class `name(base)`.

    Args:
        forward: its `forward`, copied under a name of its own.
        dynamic_dims: argument of `forward` -> its dimension that is the number of rows.
        tag: vLLM's name for what it compiles; kinds of modules need different ones.
        init: its `__init__`; None for that of `base`.
        arguments: given to `__init__`, beside `vllm_config`.
    """
    members: dict[str, Any] = {"forward": _renamed(forward, name), "__doc__": base.__doc__}
    if init is not None:
        members["__init__"] = init
    cls = type(name, (base,), members)
    compiled: Any = support_torch_compile(dynamic_arg_dims=dict(dynamic_dims))(cls)
    with set_model_tag(tag):
        return compiled(vllm_config=vllm_config, **arguments)


def _renamed(forward: Callable[..., Any], name: str) -> types.FunctionType:
    assert isinstance(forward, types.FunctionType)
    own = types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{name}"),
        forward.__globals__,
        "forward",
        forward.__defaults__,
        forward.__closure__,
    )
    own.__qualname__ = f"{name}.forward"
    own.__annotations__ = dict(forward.__annotations__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own
