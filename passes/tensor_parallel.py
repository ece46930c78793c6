"""How an attention's heads, tokens or batch are spread over ranks, as DTensor's parallel plans and Ulysses do it.

Where each rank has a part of the heads the attention is rewritten, with the gate's tensors as that rank needs them: a
gate that all heads share as it is, its gradient summed over the ranks; of one for each head, the rank's own heads.
Under Ulysses, which exchanges tokens for heads, gradients are summed by whoever sums those of all parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sla_compile.common.limits import TAYLOR
from sla_compile.passes.attention_call import Obstacle
from sla_compile.passes.node_ops import read
from sla_compile.passes.operands import Operand, example

__all__ = ["SAME_HEADS", "Exchanged", "HeadShards", "exchanged", "gate_on_rank", "is_distributed", "sharding"]

SAME_HEADS = "all heads on every rank, or the same part of them for queries, keys and values"
_MOST_NODES = 400
_ENDS = {"linear", "scaled_dot_product_attention", "softmax"}


@dataclass(frozen=True)
class HeadShards:
    """Heads in equal parts over one axis of a mesh of ranks."""

    mesh: Any
    axis: int
    distributed: bool
    """Whether queries, keys and values are DTensors, with the sizes of all ranks together."""

    @property
    def local_parts(self) -> int:
        """How many times the heads of the traced queries all heads are."""
        return 1 if self.distributed else self.ranks

    @property
    def ranks(self) -> int:
        return int(self.mesh.size(self.axis))

    def unequal(self, heads: int) -> str:
        """How ``heads``, all there are, are in unequal parts; empty where the parts are equal."""
        return f"{heads} heads on {self.ranks} ranks" if heads % self.ranks else ""


@dataclass(frozen=True)
class Exchanged:
    """Heads in equal parts over ranks that exchanged their tokens for them, as Ulysses does, this rank's the part
    ``rank``."""

    ranks: int
    rank: int
    parts: tuple[int, ...] = ()
    """What each rank is sent, in any unit, where that is not as much as the others are."""

    @property
    def local_parts(self) -> int:
        """How many times the heads of the traced queries all heads are."""
        return self.ranks

    def unequal(self, heads: int) -> str:
        """How ``heads``, all there are, are in unequal parts; empty where the parts are equal."""
        if self.parts:
            return f"heads in parts of {', '.join(map(str, self.parts))} on {self.ranks} ranks"
        return f"{heads} heads on {self.ranks} ranks" if heads % self.ranks else ""


def exchanged(sides: Iterable[Any]) -> Exchanged | None:
    """The exchange that all ``sides``, queries, keys and values, come from; None where they do not."""
    found = {_exchange(side) for side in sides}
    (exchange,) = found if len(found) == 1 else (None,)
    if exchange is None:
        return None
    name, parts = exchange
    # a graph names its groups, and only this knows them by name
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    group = resolve(name)
    return Exchanged(torch.distributed.get_world_size(group), torch.distributed.get_rank(group), parts)


def _exchange(side: Any) -> tuple[str, tuple[int, ...]] | None:
    """The name of the group of an all-to-all between ``side`` and its projection, and the parts if they are unequal."""
    node = side.source if isinstance(side, Operand) else side
    if not isinstance(node, fx.Node):
        return None
    seen, pending = {node}, [node]
    while pending and len(seen) <= _MOST_NODES:
        node = pending.pop()
        owner = node.graph.owning_module
        parts = [getattr(owner, str(other.target), None) for other in node.all_input_nodes if other.op == "get_attr"]
        inside = [part for part in parts if isinstance(part, fx.GraphModule)]  # the forward of an autograd function
        for one in (node, *(inner for part in inside[:1] for inner in part.graph.nodes)):
            names = [argument for argument in one.args if isinstance(argument, str)]
            if "all_to_all_single" in str(one.target) and names:
                return names[-1], _unequal_parts(one)
        if read(node).word not in _ENDS:
            behind = set(node.all_input_nodes) - seen
            seen |= behind
            pending += behind
    return None


def _unequal_parts(exchange: fx.Node) -> tuple[int, ...]:
    """The sizes that an all-to-all sends to each rank where they are known to differ; they come after those it gets."""
    sizes = [argument for argument in exchange.args if isinstance(argument, list | tuple)]
    sent = tuple(size for size in sizes[-1] if isinstance(size, int)) if sizes else ()
    return sent if len(set(sent)) > 1 else ()


def sharding(side: Any) -> HeadShards | Obstacle | None:
    """How ``side`` is spread over ranks, from its projection on; None where nothing shows that it is.

    A local tensor counts too where it is the shard of a DTensor, as what ColwiseParallel gives is. An obstacle says
    how else than by heads.
    """
    node = side.source if isinstance(side, Operand) else side
    if not isinstance(node, fx.Node):
        return None
    if is_distributed(value := example(node)):
        return _by_heads(value, 1, True)
    seen, pending = {node}, [node]
    while pending and len(seen) <= _MOST_NODES:
        node = pending.pop()
        value = example(node)
        if is_distributed(value) and _is_in_parts(value):
            return _by_heads(value, value.dim() - 1, False)
        if read(node).word not in _ENDS:
            behind = set(node.all_input_nodes) - seen
            seen |= behind
            pending += behind
    return None


def is_distributed(value: Any) -> bool:
    """Whether it is a DTensor, told without the import of torch.distributed.tensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def _is_in_parts(value: Any) -> bool:
    return bool(_parts(value))


def _parts(value: Any) -> dict[int, Any]:
    """The placements of a DTensor along the axes of its mesh that have several ranks, but for replicas."""
    sizes = value.device_mesh.shape
    placed = enumerate(zip(value.placements, sizes, strict=True))
    return {axis: placement for axis, (placement, size) in placed if size > 1 and not placement.is_replicate()}


def _by_heads(value: Any, dim: int, distributed: bool) -> HeadShards | Obstacle:
    """The shards of a DTensor whose axis ``dim`` holds the heads."""
    parts = _parts(value)
    if not parts and distributed:
        return HeadShards(value.device_mesh, 0, distributed)
    ((axis, placement), *others) = parts.items()
    if not others and type(placement).__name__ == "Shard" and placement.dim % value.dim() == dim:
        return HeadShards(value.device_mesh, axis, distributed)
    how = f"a DTensor, {', '.join(map(str, value.placements))} over {value.device_mesh.size()} rank(s)"
    by_tokens = value.dim() == 4 and any(getattr(part, "dim", None) in (2, -2) for part in parts.values())
    if distributed and by_tokens:
        return Obstacle("context parallelism", how, "Ulysses, which has all tokens of a head on one rank")
    return Obstacle("tensor parallelism", how, SAME_HEADS)


def gate_on_rank(shards: HeadShards | Exchanged, by_head: bool) -> Callable[[Tensor], Tensor] | None:
    """A function of a graph: a gate's tensor, alike on all ranks, as an attention with these ``shards`` takes it.

    ``by_head``: its first axis are all heads. None where that is as it is.
    """
    return _of_exchanged(shards, by_head) if isinstance(shards, Exchanged) else _of_shards(shards, by_head)


def _of_exchanged(shards: Exchanged, by_head: bool) -> Callable[[Tensor], Tensor] | None:
    def sla_gate_on_rank(tensor: Tensor) -> Tensor:
        heads = tensor.shape[0] // shards.ranks
        return tensor.narrow(0, shards.rank * heads, heads)

    return sla_gate_on_rank if by_head else None


def _of_shards(shards: HeadShards, by_head: bool) -> Callable[[Tensor], Tensor]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if shards.distributed:
        _register_shardings()
    mesh = shards.mesh
    replicas: list[Any] = [Replicate()] * mesh.ndim
    of_heads, gradients = list(replicas), list(replicas)
    of_heads[shards.axis], gradients[shards.axis] = Shard(0), Partial()

    def sla_gate_on_rank(tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, replicas, run_check=False)
        if by_head:
            tensor = tensor.redistribute(mesh, of_heads)
        if shards.distributed:
            return tensor
        return tensor.to_local(grad_placements=of_heads if by_head else gradients)

    return sla_gate_on_rank


@functools.cache
def _register_shardings() -> None:
    """Let the ops take DTensors: whole, or in parts by heads. Arguments are known by their names in the schema."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placements(op: Any, arguments: Any, keywords: Any) -> list[tuple[list[Any], list[Any]]]:
        names = [argument.name for argument in op._schema.arguments]
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        by_head = {"weight": 3, "bias": 2, "shift": 1, "sparsity": 2}

        def of(name: str, value: Any) -> Any:
            if not hasattr(value, "tensor_meta"):
                return None
            if name in by_head:
                return Shard(0) if value.tensor_meta is not None and value.ndim == by_head[name] else Replicate()
            return Replicate() if name == "key_mask" else Shard(1)

        def of_gradient(name: str) -> Any:
            if name in "qkv":
                return Shard(1)
            placed = of(name, given.get(name))
            return placed if placed is not None and placed.is_shard() else Partial()

        returned = ("q", "k", "v", "weight", "bias", "shift") if op._schema.name == "sla::backward" else ()
        count = len(op._schema.returns)
        sharded = [of_gradient(name) for name in returned[:count]] if returned else _forward_results(given, count)
        inputs = [of(name, given[name]) for name in names if name in given]
        whole = [None if placed is None else Replicate() for placed in inputs]
        return [([Replicate()] * count, whole), (sharded, inputs)]

    def _forward_results(given: Any, count: int) -> list[Any]:
        branch = given["weight"] is not None and given["linear"] not in ("none", TAYLOR)
        return [Shard(1), Shard(1) if branch else Replicate(), *[Shard(1)] * (count - 2)]

    for op in (torch.ops.sla.forward.default, torch.ops.sla.backward.default):
        register_sharding(op)(lambda *arguments, op=op, **keywords: placements(op, arguments, keywords))
