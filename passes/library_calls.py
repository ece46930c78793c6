"""Calls that hold a whole attention: torch's multi-head attention, flash-attn's and xformers' functions.

Those on packed samples are in ``passes/packed_calls.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sla_compile.passes.attention_call import AttentionCall, Obstacle, module_stack
from sla_compile.passes.call_arguments import HARMLESS, arguments_of, is_default, only_output, parameters_of
from sla_compile.passes.operands import Step, after, example
from sla_compile.passes.packed_calls import flash_attn_varlen, flex_attention, varlen_attn

__all__ = ["attention_inside_call"]

Reader = Callable[[fx.Node, fx.GraphModule], AttentionCall | None]


def attention_inside_call(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """The attention inside the call ``node``; None where it is no such call."""
    if node.op != "call_function":
        return None
    reader = _READERS.get(node.target) or _foreign(node.target)
    return reader(node, module) if reader is not None else None


def _foreign(target: Any) -> Reader | None:
    """The reader of a function of another package, known by its module and name, never imported."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        package, _, name = target._qualified_op_name.partition("::")
    else:
        package = str(getattr(target, "__module__", "")).partition(".")[0]
        name = getattr(target, "__name__", "")
    return _FOREIGN.get((package, name))


def _multi_head_attention_forward(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    given = arguments_of(torch.nn.functional.multi_head_attention_forward, node)
    if given is None:
        return None
    absent = ("bias_k", "bias_v", "static_k", "static_v")
    odd = [f"{name} given" for name in absent if given[name] is not None]
    odd += [f"{name}=True" for name in ("add_zero_attn", "use_separate_proj_weight") if given[name]]
    return _packed_projections(
        node,
        module,
        (given["query"], given["key"], given["value"]),
        (given["in_proj_weight"], given["in_proj_bias"]),
        (given["out_proj_weight"], given["out_proj_bias"]),
        padding=given["key_padding_mask"],
        masks=[name for name in ("attn_mask", "is_causal") if given[name] not in (None, False)],
        heads=given["num_heads"],
        dropout_p=given["dropout_p"] if given["training"] else 0.0,
        batch_first=False,
        odd=odd,
    )


_NATIVE = ("query", "key", "value", "embed_dim", "num_heads", "weight", "bias", "out_weight", "out_bias")
_NATIVE_OPTIONS = {"mask": None, "need_weights": True, "average_attn_weights": True, "mask_type": None}


def _native_multi_head_attention(node: fx.Node, module: fx.GraphModule) -> AttentionCall:
    positional = dict(zip((*_NATIVE, *_NATIVE_OPTIONS), node.args, strict=False))
    given: dict[str, Any] = {**_NATIVE_OPTIONS, **positional, **node.kwargs}
    over_keys = given["mask_type"] == 1
    return _packed_projections(
        node,
        module,
        (given["query"], given["key"], given["value"]),
        (given["weight"], given["bias"]),
        (given["out_weight"], given["out_bias"]),
        padding=given["mask"] if over_keys else None,
        masks=[] if given["mask"] is None or over_keys else ["mask"],
        heads=given["num_heads"],
        dropout_p=0.0,
        batch_first=True,
        odd=[],
    )


def _packed_projections(
    node: fx.Node,
    module: fx.GraphModule,
    inputs: tuple[Any, Any, Any],
    packed: tuple[Any, Any],
    projection: tuple[Any, Any],
    *,
    padding: Any,
    masks: list[str],
    heads: int,
    dropout_p: float,
    batch_first: bool,
    odd: list[str],
) -> AttentionCall:
    """Self-attention with its projections, of (B, N, E) or (N, B, E), as their linear steps around attention."""
    where = "attention inside torch.nn.MultiheadAttention"
    query, key, value = inputs
    alone = only_output(node)
    shape = example(query)
    if query is not key or key is not value:
        odd = [*odd, "query, key and value are different tensors"]
    if alone is None:
        odd = [*odd, "its attention weights are read"]
    if not isinstance(shape, torch.Tensor) or shape.dim() != 3 or not isinstance(packed[0], fx.Node):
        odd = [*odd, "no batched query with packed projections"]
    obstacle = None
    if odd:
        obstacle = Obstacle(where, ", ".join(odd), "self-attention of a batch whose attention weights are not read")
    elif masks:
        obstacle = Obstacle("attention mask", f"{', '.join(masks)} of torch.nn.MultiheadAttention", "no mask")
    if obstacle is not None or alone is None:
        return AttentionCall(node, module, module_stack(node), query, key, value, obstacle=obstacle)
    order = Step("transpose", (1, 2)) if batch_first else Step("permute", (1, 2, 0, 3))
    back = Step("transpose", (1, 2)) if batch_first else Step("permute", (2, 0, 1, 3))
    split = Step("unflatten", (-1, (3, heads, shape.shape[-1] // heads)))
    query, key, value = (after(query, _linear(packed), split, Step("select", (2, index)), order) for index in range(3))
    return AttentionCall(
        alone[0],
        module,
        module_stack(node),
        query,
        key,
        value,
        attn_mask=_over_keys(padding),
        dropout_p=dropout_p,
        pattern="multi_head_attention",
        restore=(back, Step("flatten", (2,)), _linear(projection)),
        interior=alone[1],
    )


def _over_keys(padding: Any) -> Any:
    """A key padding mask of torch, (B, keys) whose True is forbidden or which is added, as an ``attn_mask``."""
    value = example(padding)
    if not isinstance(value, torch.Tensor):
        return padding
    negated = [Step("logical_not")] if value.dtype == torch.bool else []
    return after(padding, *negated, Step("unsqueeze", (1,)), Step("unsqueeze", (1,)))


def _linear(parameters: tuple[Any, Any]) -> Step:
    return Step(torch.nn.functional.linear, parameters if parameters[1] is not None else parameters[:1])


def _transformer_encoder_layer(node: fx.Node, module: fx.GraphModule) -> AttentionCall:
    obstacle = Obstacle(
        "attention inside torch.nn.TransformerEncoderLayer",
        "its one fused call for inference",
        "prepare(model, ...) in training mode, before it is compiled for inference",
    )
    source: Any = node.args[0]
    return AttentionCall(node, module, module_stack(node), source, source, source, obstacle=obstacle)


def _flash_attn_func(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    return _token_major(node, module, node, ("q", "k", "v"), ("dropout_p", "softmax_scale", "causal"))


def _flash_attn_forward(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    alone = only_output(node)
    if alone is None:
        return None
    return _token_major(node, module, alone[0], ("q", "k", "v"), ("dropout_p", "softmax_scale", "causal"), alone[1])


def _memory_efficient_attention(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    return _token_major(node, module, node, ("query", "key", "value"), ("p", "scale", "causal"), bias="attn_bias")


def _token_major(
    node: fx.Node,
    module: fx.GraphModule,
    output: fx.Node,
    names: tuple[str, str, str],
    options: tuple[str, str, str],
    interior: tuple[fx.Node, ...] = (),
    bias: str = "",
) -> AttentionCall | None:
    """A call on tensors (B, N, H, D), or (B, N, D) of one head, which gives the same.

    ``names``, ``options`` (dropout, scale, causal) and ``bias``, which takes a tensor (B, H, N, keys), or (B, N, keys)
    of one head, are its parameters; any other must be at its default, and else is the obstacle. An option that it does
    not have gets a name all the same. ``output`` is the node with the result, ``interior`` the other nodes of the call.
    """
    parameters, given = parameters_of(node.target), arguments_of(node.target, node)
    if parameters is None or given is None or not {*names} <= {*parameters}:
        return None
    pattern = str(getattr(node.target, "__name__", node.target))
    mask = given.get(bias)
    if not isinstance(example(mask), torch.Tensor):
        bias = ""
    known = {*names, *options, *HARMLESS, bias}
    odd = [name for name, value in given.items() if name not in known and not is_default(value, parameters.get(name))]
    obstacle = None
    if odd:
        text = ", ".join(f"{name}={given[name]}" for name in odd)
        obstacle = Obstacle(f"an option of {pattern}", text, "its default")
    first = example(given[names[0]])
    single = isinstance(first, torch.Tensor) and first.dim() == 3
    heads = Step("unsqueeze", (2,)), Step("transpose", (1, 2))
    restore = Step("transpose", (1, 2)), Step("squeeze", (2,))
    query, key, value = (after(given[name], *heads[not single :]) for name in names)
    of_one_head = single and bias != "" and example(mask).dim() == 3
    added = [Step("unsqueeze", (1,))] if of_one_head else []
    return AttentionCall(
        output,
        module,
        module_stack(node),
        query,
        key,
        value,
        attn_mask=after(mask, *added) if bias and mask is not None else None,
        dropout_p=given.get(options[0], 0.0),
        scale=given.get(options[1]),
        is_causal=given.get(options[2], False),
        # flash-attn groups heads by itself; where a function does not, it was given as many heads of each.
        enable_gqa=not bias and options[2] in parameters,
        pattern=pattern,
        restore=restore[: 1 + single],
        interior=interior,
        obstacle=obstacle,
    )


_READERS: dict[Any, Reader] = {
    torch.nn.functional.multi_head_attention_forward: _multi_head_attention_forward,
    torch._native_multi_head_attention: _native_multi_head_attention,
    torch._transformer_encoder_layer_fwd: _transformer_encoder_layer,
    torch.ops.higher_order.flex_attention: flex_attention,
}
# By the first part of a function's __module__, or the namespace of an op, and its name.
_FOREIGN: dict[tuple[str, str], Reader] = {
    ("flash_attn", "flash_attn_func"): _flash_attn_func,
    ("flash_attn_interface", "flash_attn_func"): _flash_attn_func,
    ("flash_attn", "_flash_attn_forward"): _flash_attn_forward,
    ("flash_attn", "flash_attn_varlen_func"): flash_attn_varlen,
    ("flash_attn_interface", "flash_attn_varlen_func"): flash_attn_varlen,
    ("torch_attn", "_varlen_attn"): varlen_attn,
    ("xformers", "memory_efficient_attention"): _memory_efficient_attention,
}
