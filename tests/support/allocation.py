"""A model of uneven attentions, videos for it, and the errors of its attentions by the definition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.kernels import reference
from tests.support.models import MARGINAL, WIDTH, Model

TOKENS, BLOCK = 320, 16  # 20 blocks


BUDGET = 0.2


def uneven(blocks: int = 4) -> Model:
    """Even blocks attend to their own neighbourhood, which few critical blocks hold; odd ones to everything."""
    model = Model(blocks)
    for i, block in enumerate(model.blocks):
        with torch.no_grad():
            query, key, _ = block.attention.qkv.weight.view(3, WIDTH, WIDTH)
            query.copy_(torch.eye(WIDTH) * (4.0 if i % 2 == 0 else 0.3))
            key.copy_(torch.eye(WIDTH) * (1.0 if i % 2 == 0 else 0.3))
    return model


def batches(count: int = 2) -> list[tuple[Tensor]]:
    """Neighbouring tokens are alike, as in a video."""
    around = torch.randn(count, 1, TOKENS // BLOCK, 1, WIDTH).expand(-1, -1, -1, BLOCK, -1)
    return [(x,) for x in (around + 0.3 * torch.randn_like(around)).reshape(count, 1, TOKENS, WIDTH)]


def prepared(model: nn.Module, **settings: Any) -> Any:
    """With gates of zero and no virtual keys, so that all that is not critical is missing."""
    return sla_compile.prepare(model, batches()[0], config={**MARGINAL, "topk": BUDGET, "bottomk": 0.1, **settings})


def errors(model: nn.Module, data: list[tuple[Tensor]], topks: dict[str, float]) -> dict[str, float]:
    """||O - dense|| / ||dense|| at each attention by the definition."""
    sums: dict[str, list[float]] = {}

    def observe(call: GatedCall) -> Tensor:
        gate, options = call.gate, call.gate.config.kernel_options()
        options |= {"topk": topks[call.path], "bottomk": gate.shares()[1], "scale": call.scale}
        parameters: dict[str, Any] = dict(gate.named_parameters())
        out = reference.sparse_linear_attention(call.query, call.key, call.value, **parameters, **options)
        total = sums.setdefault(call.path, [0.0, 0.0])
        total[0] += (out - call.dense).square().sum().item()
        total[1] += call.dense.square().sum().item()
        return call.dense

    with gated_calls(model, observe), torch.no_grad():
        for batch in data:
            model(*batch)
    return {path: math.sqrt(error / dense) for path, (error, dense) in sums.items()}


def topks(model: nn.Module) -> dict[str, float]:
    return {path: gate.shares()[0] for path, gate in sla_compile.gates(model).items()}
