"""Prepared models, batches, and the calls of their attentions, for tests of what fits gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.gate import PREPARED
from sla_compile.kernels import reference
from tests.support.closeness import relative_error
from tests.support.models import HEADS, MARGINAL, WIDTH, prepared_model, random_input

DIM = WIDTH // HEADS


class Failed(Exception):
    pass


def batches(count: int = 3, tokens: int = 100) -> list[tuple[Tensor]]:
    return [(random_input(tokens),) for _ in range(count)]


def made(model: nn.Module | None = None, **options: Any) -> Any:
    """A float64 model (two blocks by default) with gates."""
    config = {**MARGINAL, **options}
    if model is None:
        return prepared_model(**config).eval()
    return sla_compile.prepare(model.double().eval(), (random_input(),), config=config)


def recorded(model: nn.Module, data: list[tuple[Tensor]]) -> dict[str, list[GatedCall]]:
    calls: dict[str, list[GatedCall]] = {}

    def record(call: GatedCall) -> Tensor:
        calls.setdefault(call.path, []).append(call)
        return call.dense

    with torch.no_grad(), gated_calls(model, record):
        for args in data:
            model(*args)
    return calls


def defined_error(calls: list[GatedCall], weight: Tensor | None = None, bias: Tensor | None = None) -> float:
    """||O - dense|| / ||dense|| by the definition; with the site's own gate unless one is given."""
    outs, denses = [], []
    for call in calls:
        gate = call.gate.weight if weight is None else weight, call.gate.bias if bias is None else bias
        outs.append(
            reference.sparse_linear_attention(
                call.query, call.key, call.value, *gate, scale=call.scale, **call.gate.config.kernel_options()
            ).flatten()
        )
        denses.append(call.dense.flatten())
    return relative_error(torch.cat(outs), torch.cat(denses))


def direct_solution(calls: list[GatedCall], ridge: float) -> tuple[Tensor, Tensor]:
    """weight and bias of ``calls`` by least squares over all tokens at once, the ridge as extra rows."""
    gate = calls[0].gate
    heads = range(gate.heads) if gate.weight.dim() == 3 else [slice(None)]
    solved = []
    for head in heads:
        parts = []
        for call in calls:
            sparse, linear = call.branches()
            assert linear is not None
            parts.append([t[:, head].reshape(-1, DIM) for t in (linear, call.dense - sparse)])
        x, r = (torch.cat(rows) for rows in zip(*parts, strict=True))
        variance = (x - x.mean(0)).square().sum() / DIM
        penalty = torch.cat([(ridge * variance).sqrt() * torch.eye(DIM, dtype=x.dtype), x.new_zeros(DIM, 1)], dim=1)
        x = torch.cat([F.pad(x, (0, 1), value=1.0), penalty])
        solved.append(torch.linalg.lstsq(x, torch.cat([r, r.new_zeros(DIM, DIM)])).solution)
    solution = torch.stack(solved)
    weight, bias = solution[:, :DIM].mT, solution[:, DIM]
    return weight.reshape(gate.weight.shape), bias.reshape(gate.bias.shape)


def state(model: nn.Module) -> dict[str, Any]:
    hooks = {
        name: (list(m._forward_pre_hooks.items()), list(m._forward_hooks.items()), m.__dict__.get(PREPARED))
        for name, m in model.named_modules()
    }
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {path: (g.config, g.settings, g.model_config) for path, g in sla_compile.gates(model).items()}
    return {"hooks": hooks, "tensors": tensors, "settings": settings}


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["settings"] == expected["settings"]
    assert actual["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in actual["tensors"].items():
        assert torch.equal(tensor, expected["tensors"][name]), name

    # ``prepare`` renews its markers; what they do is in their attributes.
    def plain(hooks: dict[str, Any]) -> Any:
        return {n: ([vars(h) for _, h in pre], list(post), prepared) for n, (pre, post, prepared) in hooks.items()}

    assert plain(actual["hooks"]) == plain(expected["hooks"])


def wan() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A small WanTransformer3DModel of diffusers, a batch by keyword, and settings for its 192 tokens."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    batch = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }
    return model, batch, {**MARGINAL, "min_tokens": 64}
