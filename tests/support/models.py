"""Small models for tests, and what each of them must compute once it is compiled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile.gate import gate_name, own_gates
from sla_compile.kernels import reference
from tests.support.closeness import assert_close

WIDTH, HEADS = 32, 2

# Small blocks, so that a hundred tokens have several of each class.
OPTIONS: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 16, "block_k": 16, "min_tokens": 0}
MARGINAL: dict[str, Any] = {**OPTIONS, "linear": "marginal"}
"""The same with the paper's form, for tests of a gate's weight and bias."""


class Attention(nn.Module):
    """Self-attention as models write it: strided views in, (B, N, H, D) read out."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.arguments = arguments

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, **self.arguments)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SomeBlocks(Model):
    """Only so many of its blocks are called as the call says."""

    def forward(self, x: Tensor, blocks: int | None = None) -> Tensor:
        for block in self.blocks[:blocks]:
            x = block(x)
        return x


class CheckpointedModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            # Recomputation in eager would leave the definition's patch; compiled, it stays in the graph.
            x = checkpoint(block, x, use_reentrant=False) if torch.compiler.is_compiling() else block(x)
        return x


class TwoAttentions(Attention):
    """Two attention calls in one forward, the second with a scale of its own: two gates."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))


class CalledTwice(nn.Module):
    """One attention module called twice in one forward: one gate."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + self.attention(x))


class BrokenAttention(Attention):
    """A graph break between the start of the owner and its attention; the rest needs nothing of the owner."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class BrokenAttentionWithProjection(Attention):
    """The same break, but the rest of the forward calls a child of the owner."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        torch._dynamo.graph_break()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Doubled(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.attention(x)


def random_input(tokens: int = 100, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64)


def randomize_gates(model: nn.Module) -> None:
    """Give every gate random values: at zero, a gate that is never read would go unnoticed."""
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.normal_(std=0.5)


def numbers(gate: nn.Module) -> Tensor:
    """A copy of all parameters of ``gate``, of whatever form, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in gate.parameters()])


_PREPARED: dict[str, nn.Module] = {}


def prepared_model(**config: Any) -> Any:
    """A `Model` in float64 with gates, for tests of what comes after ``prepare``: a copy of one traced once for all."""
    model, x = Model().double(), random_input()
    key = repr(sorted(config.items()))
    if key not in _PREPARED:
        _PREPARED[key] = sla_compile.prepare(copy.deepcopy(model), (x,), config=config)
    found = copy.deepcopy(_PREPARED[key])
    found.load_state_dict(model.state_dict(), strict=False)  # all but the gates, which are zero
    return found


@contextlib.contextmanager
def defined(model: nn.Module) -> Iterator[None]:
    """Within this, eager calls of ``model`` compute the definition wherever an attention has a gate."""
    calls: list[tuple[nn.Module, list[int]]] = []
    handles = []
    for owner in model.modules():
        if own_gates(owner):
            handles.append(owner.register_forward_pre_hook(lambda module, _: calls.append((module, [0]))))
            handles.append(owner.register_forward_hook(lambda *_: calls.pop() and None))
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        if not calls:
            return original(q, k, v, **arguments)
        owner, count = calls[-1]
        gate = own_gates(owner).get(gate_name(count[0]))
        count[0] += 1
        if gate is None:
            return original(q, k, v, **arguments)
        options = {**gate.config.kernel_options(), **dict(zip(("topk", "bottomk"), gate.shares(), strict=True))}
        scale = arguments.get("scale")
        gated: dict[str, Any] = {"weight": gate.weight, "bias": gate.bias, "shift": gate.shift}
        out = reference.sparse_linear_attention(q, k, v, **gated, scale=scale, **options)
        if gate.log_scale is None:
            return out
        sparse = reference.sparse_linear_attention(q, k, v, scale=scale, **options)
        return out + (gate.log_scale.exp() - 1)[:, None, None] * sparse

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()


def assert_follows_definition(
    compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, budget: float = 1e-10
) -> None:
    """Output and every gradient (input, weights, gates) of ``compiled`` against the definition, in float64."""
    x = x.detach().requires_grad_()
    named = [("input", x), *((n, p) for n, p in model.named_parameters() if p.requires_grad)]
    cotangent = torch.randn_like(x)
    with defined(model):
        expected = model(x)
        wanted = torch.autograd.grad(expected, [p for _, p in named], cotangent)
    actual = compiled(x)
    got = torch.autograd.grad(actual, [p for _, p in named], cotangent)
    assert_close("output", actual, expected, budget)
    for (name, _), a, e in zip(named, got, wanted, strict=True):
        assert e.norm() > 0, f"{name}: the definition has no gradient, so nothing is tested"
        assert_close(f"gradient of {name}", a, e, budget)
