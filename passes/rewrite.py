"""Rewrite a graph: attention calls become ``sla::forward``, markers go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sla_compile.passes.decide import Rewrite
from sla_compile.passes.find_attention import AttentionCall, Marker
from sla_compile.passes.memory_layout import in_any_layout, laid_out_as
from sla_compile.passes.operands import REPLACED_BY, Step, after, build, example
from sla_compile.passes.parts import TURNED, from_batch, parts
from sla_compile.passes.tensor_parallel import gate_on_rank
from sla_compile.passes.token_order import back

__all__ = ["copied_meta", "erase_markers", "replace_attention", "replace_by_function"]


def replace_attention(
    call: AttentionCall, decision: Rewrite, marker: Marker, options: Mapping[str, Any], name: str | None = None
) -> fx.Node:
    """Put ``sla::forward`` where ``call`` stands, with the gate of ``marker``; the node that now stands for it.

    ``options`` are topk, bottomk, block_q, block_k, feature_map and linear; ``name`` is that of the op's node, which
    Inductor's generated code and logs repeat. The graph is not recompiled.
    """
    graph, before = call.module.graph, call.node.prev
    with graph.inserting_before(call.node):
        marker = _on_rank(graph, marker, decision)
        weight, bias, scaled_by = _gate(graph, marker, options["linear"])
        marker = replace(marker, weight=weight, bias=bias)
        outputs = [_run(graph, *part, marker, options, name) for part in parts(call, decision)]
        return _put(call, decision, outputs, scaled_by, before)


def replace_by_function(
    call: AttentionCall,
    decision: Rewrite,
    marker: Marker,
    function: Callable[[Rewrite], Callable[..., torch.Tensor]],
) -> fx.Node:
    """The same with functions in place of the op, in a graph that runs as it is; the node that now stands for ``call``.

    ``function`` gives one for each of `parts`. Its arguments are one of the gate's tensors, then queries, keys, values
    and key mask (or None) as the op has them, and `Rewrite.masked_queries` (or None); it returns (B, H, N, D), its
    tokens in the order of the queries.
    """
    gate = next(tensor for tensor in (marker.weight, marker.shift) if tensor is not None)
    graph, before = call.module.graph, call.node.prev
    outputs = []
    with graph.inserting_before(call.node):
        for part, its_own in parts(call, decision):
            operands = _operands(graph, part, its_own)
            masked = its_own.masked_queries()
            of_queries = None if masked is None else build(graph, (masked,))[0]
            output = graph.call_function(function(its_own), (gate, *operands, of_queries))
            output.meta["example_value"] = _result(example(operands[0]), example(call.node))
            outputs.append(output)
        return _put(call, decision, outputs, None, before)


def _put(
    call: AttentionCall, decision: Rewrite, outputs: list[fx.Node], scaled_by: fx.Node | None, before: fx.Node
) -> fx.Node:
    """Have what the model goes on with made of ``outputs``, of the ``parts`` of the attention, and take that out."""
    graph, node = call.module.graph, call.node
    output = _joined(graph, outputs, decision)
    scaling = () if scaled_by is None else (Step("mul", (scaled_by,)), Step("type_as", (output,)))
    whole = back(after(output, *scaling), decision.order.queries, *_fill(call, decision, output))
    (restored,) = build(graph, (after(whole, *call.restore),))
    if not in_any_layout(node, example(restored)):
        (restored,) = build(graph, (after(restored, *laid_out_as(example(node))),))
    added = _between(before, node)
    for new in added:
        known = {key: value for key, value in new.meta.items() if key == "example_value"}
        new.meta = {**copied_meta(node), **known}
    node.replace_all_uses_with(restored)
    node.meta[REPLACED_BY] = added
    graph.erase_node(node)
    _erase_unused(graph, call.interior)
    return restored


def _run(
    graph: fx.Graph,
    call: AttentionCall,
    decision: Rewrite,
    marker: Marker,
    options: Mapping[str, Any],
    name: str | None,
) -> fx.Node:
    """One call of the op, with the gate as ``marker`` has it; its output (B, H, N, D)."""
    query, key, value, key_mask = _operands(graph, call, decision)
    results = graph.create_node(
        "call_function",
        torch.ops.sla.forward.default,
        (query, key, value, marker.weight, marker.bias, key_mask, marker.sparsity),
        {**decision.options(), **options} | ({} if marker.shift is None else {"shift": marker.shift}),
        name=name,
    )
    output = graph.call_function(operator.getitem, (results, 0))
    output.meta["example_value"] = _result(example(query), example(call.node))
    return output


def _joined(graph: fx.Graph, outputs: list[fx.Node], decision: Rewrite) -> fx.Node:
    """The whole output of the ``parts`` of an attention."""
    if len(outputs) > 1:
        turned = build(graph, [after(output, TURNED) for output in outputs])
        together = graph.call_function(torch.cat, (turned, 1))
        together.meta["example_value"] = torch.cat([example(part) for part in turned], 1)
        (output,) = build(graph, [after(together, TURNED)])
        return output
    (output,) = build(graph, [after(outputs[0], *from_batch(decision))])
    return output


def _operands(
    graph: fx.Graph, call: AttentionCall, decision: Rewrite
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """Queries, keys, values and the key mask for the op."""
    if not decision.mean_if_masked or decision.key_mask is None:
        query, key, value, *key_mask = build(graph, (*decision.operands(call), *decision.masks()))
        return query, key, value, key_mask[0] if key_mask else None
    # queries of zero weigh all keys alike; and the gradients are those of filled scores too
    (over_keys,) = decision.masks()
    nothing = after(over_keys, Step("any", (-1, True)), Step("logical_not"))
    of_keys, of_queries = build(graph, (nothing, after(nothing, *[Step("unsqueeze", (-1,))] * 2)))
    masked = replace(call, query=after(call.query, Step("masked_fill", (of_queries, 0.0))))
    query, key, value, mask = build(
        graph, (*decision.operands(masked), after(over_keys, Step("logical_or", (of_keys,))))
    )
    return query, key, value, mask


def _fill(call: AttentionCall, decision: Rewrite, output: fx.Node) -> tuple[Step, ...]:
    """The steps that give masked queries what dense attention gives them, whatever the gate."""
    masked = decision.masked_queries()
    if masked is None:
        return ()
    if not decision.mean_if_masked:
        return (Step("masked_fill", (masked, 0.0)),)
    mean = after(call.value, Step("mean", (2, True)), Step("type_as", (output,)), *decision.for_each_query_head())
    return (Step("where", (after(masked, Step("logical_not")), mean)),)


def _on_rank(graph: fx.Graph, marker: Marker, decision: Rewrite) -> Marker:
    """``marker`` with the gate's tensors as this rank needs them."""
    if (shards := decision.shards) is None:
        return marker
    per_head = {"weight": 3, "bias": 2, "log_scale": 1, "shift": 1, "sparsity": 2}
    tensors: dict[str, Any] = {}
    for name, dim in per_head.items():
        node = getattr(marker, name)
        if node is not None and (name != "sparsity" or example(node).dim() == dim):
            on_rank = gate_on_rank(shards, example(node).dim() == dim)
            if on_rank is None:
                continue
            tensors[name] = graph.call_function(on_rank, (node,))
            tensors[name].meta["example_value"] = on_rank(example(node))
    return replace(marker, **tensors)


def _gate(graph: fx.Graph, marker: Marker, linear: str) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """Weight and bias for the op, and what its output is multiplied by: the gate's scale s, where it has one.

    s (O^s + O^l (W / s)^T + b / s) = s O^s + O^l W^T + b, so the op and its kernels know no scale.
    """
    if marker.log_scale is None or marker.weight is None or marker.bias is None:
        return marker.weight, marker.bias, None
    exp, axis = Step("exp"), Step("unsqueeze", (-1,))
    (scale,) = build(graph, [after(marker.log_scale, exp, axis, axis)])
    by_head = after(marker.log_scale, Step("neg"), exp, axis)
    inverse, inverses = build(graph, [by_head, after(by_head, axis)])
    (bias,) = build(graph, [after(marker.bias, Step("mul", (inverse,)))])
    if linear == "none":  # the op does not read the weight
        return marker.weight, bias, scale
    (weight,) = build(graph, [after(marker.weight, Step("mul", (inverses,)))])
    return weight, bias, scale


def _result(query: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """A traced value for the op's output (B, H, N, D): in memory (B, N, H, D), in the dtype of the ``dense`` one."""
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim, dtype=dense.dtype).transpose(1, 2)


def copied_meta(node: fx.Node) -> dict[str, Any]:
    """The meta of ``node`` for a node in its place: its module, source and the like, not its value."""
    return {key: value for key, value in node.meta.items() if key != "example_value"}


def _between(before: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that stand after ``before`` and before ``end``."""
    nodes = []
    while (before := before.next) is not end:
        nodes.append(before)
    return tuple(nodes)


def _erase_unused(graph: fx.Graph, interior: Iterable[fx.Node]) -> None:
    """Take out what only the replaced attention read; users come before what they use."""
    for node in interior:
        if not node.users and not node._erased:
            graph.erase_node(node)


def erase_markers(markers: Iterable[Marker]) -> None:
    """Take the markers out and recompile the graphs that held them."""
    touched = {id(marker.module): marker.module for marker in markers}
    for marker in markers:
        marker.module.graph.erase_node(marker.node)
    for module in touched.values():
        module.graph.lint()
        module.recompile()
